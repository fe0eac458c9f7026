"""Where each request goes. It is asked a thousand times a second, and takes no lock."""

from __future__ import annotations

import hashlib
import itertools

from paredown.ship.guard.moves import weight_at
from paredown.ship.guard.observation import CANDIDATE, ORIGINAL
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.stages import WHOLE, Position, Route, Stage

SALT = b"paredown"  # never another: who was routed to the candidate stays there as weights rise
GOLDEN = 0.6180339887498949  # multiples of it, less their whole part, are spread evenly


class Router:
    """Routes by a hash of the request's key, and picks requests to be shadowed.

    Example:
        >>> router = Router(Policy(), now=0.0)
        >>> router.follow(Position(Stage.PROMOTED))
        >>> router.weight, router.route(b"a request", now=0.0).model
        (10000, 'candidate')
    """

    def __init__(self, policy: Policy, now: float):
        self.policy = policy
        self.weight = 0  # of 10,000
        self._share: float | None = None  # of the requests that are shadowed; None: no candidate
        self._compares = False  # latencies, for which a part of each window is without shadows
        self._requests = itertools.count(1)
        self._shadows = 0  # in this window
        self._window_at = now

    def follow(self, position: Position) -> None:
        """Route as a position asks for, from the next request on."""
        policy, more = self.policy, position.cause == "drift"
        self._compares = position.where is Stage.CANARY
        share = policy.shadow_more if more else policy.shadow_share
        self._share = share if position.judged else None
        self.weight = weight_at(position, policy)

    def window(self, now: float) -> None:
        """A new window begins."""
        self._window_at, self._shadows = now, 0

    def quiet(self, now: float) -> bool:
        """Whether this part of the window is without shadows, for latency to be compared."""
        part = (now - self._window_at) / self.policy.window_s
        return self.policy.quiet_share == 0 or part >= 1 - self.policy.quiet_share

    def route(self, key: bytes, now: float) -> Route:
        """Where a request goes; every request is shadowed until the window has its first pairs."""
        weight, share = self.weight, self._share
        if share is None:
            return Route(ORIGINAL, False)
        model = CANDIDATE if weight and bucket(key) < weight else ORIGINAL
        if self._compares and self.policy.quiet_share and self.quiet(now):
            return Route(model, False)
        due = self.policy.min_pairs > 0 and self._shadows < self.policy.top_up
        shadow = next(self._requests) * GOLDEN % 1 < share or due
        self._shadows += shadow
        return Route(model, shadow)


def bucket(key: bytes) -> int:
    """Of 10,000, the one that a key falls into, at any time and on any machine.

    Example:
        >>> bucket(b"a request") == bucket(b"a request") < 10_000
        True
    """
    digest = hashlib.blake2b(key, digest_size=8, key=SALT).digest()
    return int.from_bytes(digest, "little") % WHOLE
