"""Weights set to zero; channels, heads and blocks cut."""
