"""What validation saw of the candidate, which live traffic is held against."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.core.settings import check_arguments, check_count, check_fields, require
from paredown.ship.guard.betting import rate_bounds
from paredown.ship.guard.profile import Profile


@dataclass(frozen=True)
class Bound:
    """What validation saw.

    Args:
        rate: of the pairs, how many disagreed.
        upper: the upper bound of that rate; live traffic is held against it.
        profile: of inputs and outputs, for drift; None asks for none.

    Raises:
        UserError: a rate is none, the bound lies below it, or the profile is none.

    Example:
        >>> Bound(rate=0.01, upper=0.02).upper
        0.02
    """

    rate: float
    upper: float
    profile: Profile | None = None

    @staticmethod
    def of(disagreements: int, pairs: int, profile: Profile | None = None) -> Bound:
        """The bound from a validation's pairs, with 99 % confidence.

        Raises:
            UserError: there are no pairs, or more disagreements than pairs.

        Example:
            >>> bound = Bound.of(disagreements=10, pairs=1000)
            >>> f"{bound.rate:.2f}, {bound.upper:.3f}"
            '0.01, 0.029'
        """
        check_count("pairs", pairs)
        check_count("disagreements", disagreements, least=0, most=pairs)
        upper = rate_bounds(disagreements, pairs, 0.99)[1]
        return Bound(disagreements / pairs, upper, profile)

    def __post_init__(self) -> None:
        check_fields(self)
        check_arguments(profile=(self.profile, Profile | None))
        require("rate", self.rate, 0 <= self.rate <= 1, "a share from 0 to 1")
        fits = 0 < self.upper < 1 and self.rate <= self.upper
        require("upper", self.upper, fits, "a share above 0, below 1 and at least the rate")
