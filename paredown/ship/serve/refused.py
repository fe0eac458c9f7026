"""A request that is not answered with what it asked for, told in plain words."""

from __future__ import annotations


class Refused(Exception):
    """A request is refused.

    Attributes:
        status: of HTTP: 400 malformed, 401 no token, 404 unknown, 408 too slow, 409 not now, 413
            too large, 415 an encoding that is not known, 501 not supported, 503 busy or not ready.

    Example:
        >>> Refused(404, "no model 'm'.").status
        404
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
