"""LoRA adapters of several clients on one frozen model.

Read ``linear`` first. Only ``adapters`` uses PEFT.
"""
