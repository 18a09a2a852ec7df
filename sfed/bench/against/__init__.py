"""``--against``: whole rounds beside loops that people write. Read ``contest`` first."""
