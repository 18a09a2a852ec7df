"""From records to batches: tasks, sources, tokens, partition over clients, packing, scores.

Read ``splits`` first, then ``batches``.
"""
