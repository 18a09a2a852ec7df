"""The command ``python -m sfed.report``: run folders become one HTML page.

Read ``__main__`` first, then ``page`` and ``templates/report.html.j2``. Nothing here needs torch.
"""
