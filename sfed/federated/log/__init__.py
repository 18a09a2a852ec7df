"""What a run says of itself: its header at the start, and an event and a line for each round."""
