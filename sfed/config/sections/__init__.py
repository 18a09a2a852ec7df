"""The sections of the configuration: the keys of each with type, bound, default and meaning."""
