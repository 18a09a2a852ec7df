"""Who gets what: the rows of a common pool go to clients, and clients to processes."""
