"""What takes long, or needs root."""
