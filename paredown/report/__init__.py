"""A finished run, told on one page."""
