"""The frozen backbone: loading, sharding, heads, losses, and the demo's model.

Read ``backbone`` first. Only ``deepspeed`` uses DeepSpeed.
"""
