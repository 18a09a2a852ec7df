"""What every folder may use: errors, commands, redaction, randomness, files, text.

Read ``errors`` first. Nothing here imports another folder of sfed, nor torch.
"""
