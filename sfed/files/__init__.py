"""Files of one's own data: which ones a key names, what is read of each, and the names of clients.

Read ``kinds`` first: it says which files are read. Needs no torch.
"""
