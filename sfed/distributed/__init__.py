"""The processes of a run: start, barriers, collectives, watchdog, shutdown.

Read ``world`` first. Only this folder and ``models/deepspeed`` use torch.distributed.
"""
