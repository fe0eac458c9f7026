"""Containers for delivery: an artifact, entropy-coded tensor by tensor, and back bit for bit."""

from paredown.ship.pack.container import Contents, contents, pack, packed_bytes, unpack

__all__ = ["Contents", "contents", "pack", "packed_bytes", "unpack"]
