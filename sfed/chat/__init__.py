"""The command ``sfed chat``: an adapter answers in the terminal.

Read ``answers.py`` first: how a line becomes the prompt with which the adapter was trained.
"""
