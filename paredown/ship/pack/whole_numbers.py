"""Whole numbers as bytes (LEB128), one after the other, and names; read with distrust."""

from __future__ import annotations

from paredown.ship.pack.entropy import Damaged


def number(value: int) -> bytes:
    """
    Example:
        >>> number(300).hex(), Reader(number(300)).number()
        ('ac02', 300)
    """
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def signed(value: int) -> bytes:
    """A number of either sign: 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return number(2 * value if value >= 0 else -2 * value - 1)


class Reader:
    """What `number`, `signed` and bytes put down, one after the other.

    Raises:
        Damaged: it is cut off, or a number has no end.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes, so at most so many numbers, that can still come."""
        return len(self._data) - self._at

    def number(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.bytes(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise Damaged("it holds a number without an end")

    def signed(self) -> int:
        value = self.number()
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def count(self) -> int:
        """A number of entries, each at least a byte of what is left."""
        value = self.number()
        if value > self.left:
            raise Damaged("it promises more than it holds")
        return value

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise Damaged("it is cut off inside")
        self._at += count
        return self._data[self._at - count : self._at]

    def finish(self) -> None:
        if self.left:
            raise Damaged("it holds more than it should")
