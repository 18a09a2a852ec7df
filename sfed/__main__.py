"""``python -m sfed`` is the command ``sfed``."""

from sfed.cli import run

if __name__ == "__main__":
    run()
