"""Every configuration and command that is shipped."""
