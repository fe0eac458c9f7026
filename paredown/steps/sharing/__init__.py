"""Fewer distinct numbers."""
