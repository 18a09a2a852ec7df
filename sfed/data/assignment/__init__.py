"""The assignment of the rows of a common pool to clients, and of clients to processes."""
