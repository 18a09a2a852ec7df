"""What a run keeps on disk: its folder, its record, its checkpoints.

Read ``run_folder`` first, then ``checkpoint``.
"""
