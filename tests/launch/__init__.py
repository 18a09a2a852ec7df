"""Launchers, containers and clusters."""
