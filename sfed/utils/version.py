"""The version of sfed. Nothing below imports the package's root."""

__version__ = "0.1.0"
