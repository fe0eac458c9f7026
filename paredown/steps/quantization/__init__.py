"""Fewer bits for each number."""
