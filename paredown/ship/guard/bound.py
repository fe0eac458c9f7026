"""What validation saw of the candidate, which live traffic is held against."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.core.settings import require
from paredown.ship.guard.profile import Profile


@dataclass(frozen=True)
class Bound:
    """What validation saw.

    Args:
        rate: of the pairs, how many disagreed.
        upper: the upper bound of that rate; live traffic is held against it.
        profile: of inputs and outputs, for drift; None asks for none.

    Raises:
        UserError: a rate is none, or the bound lies below it.

    Example:
        >>> Bound(rate=0.01, upper=0.02).upper
        0.02
    """

    rate: float
    upper: float
    profile: Profile | None = None

    def __post_init__(self) -> None:
        require("rate", self.rate, 0 <= self.rate <= 1, "a share from 0 to 1")
        fits = 0 < self.upper < 1 and self.rate <= self.upper
        require("upper", self.upper, fits, "a share above 0, below 1 and at least the rate")
