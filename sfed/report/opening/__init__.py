"""What a report opens with: one sentence and one picture on the run's own numbers.

Read ``outcome`` first: the numbers and the sentence; ``picture`` places them. Nothing needs torch.
"""
