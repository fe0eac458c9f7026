"""A mistake of the user's, told in plain sentences."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's, told in plain sentences and shown without a traceback."""
