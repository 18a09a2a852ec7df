"""The command ``python -m sfed.report``: run folders become one HTML page.

Read ``__main__`` first, then ``page``. Nothing here needs torch.
"""
