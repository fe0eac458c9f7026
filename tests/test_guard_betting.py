"""The betting tests: fair games, beside confseq and brute force; what they find, and how soon."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from paredown.ship.guard.betting import (
    FACTORS,
    HELD,
    LATE,
    SHARES,
    STAKES,
    MeanBounds,
    MeanTest,
    RateTest,
    RatioTest,
    Wealth,
    rate_bounds,
)

CONFSEQ = json.loads((Path(__file__).parent / "guard_confseq.json").read_text())


def draws():
    made = np.random.default_rng(CONFSEQ["seed"])
    rates = (made.random(CONFSEQ["at"][-1]) < 0.03).astype(float)
    return rates, made.beta(2, 3, len(rates))


def held(n):
    return HELD / (1 + math.log1p(n / LATE))


def first_over(log_evidence, alpha, at, found):
    """Note the first time at which each run's wealth passes 1 / alpha."""
    found[(log_evidence >= math.log(1 / alpha)) & np.isinf(found)] = at


def found_after(test, alpha, batches):
    """After how many batches each run is refused; inf where it never was."""
    found = None
    for at, batch in enumerate(batches, 1):
        test.add(*batch)
        value = test.log_evidence()
        found = np.full(len(value), np.inf) if found is None else found
        first_over(value, alpha, at, found)
    return found


def test_wealth_is_what_confseq_wins_with_the_same_bets():
    rates, means = draws()
    for limit, capitals in CONFSEQ["rate"].items():
        for place, n in enumerate(CONFSEQ["at"]):
            test = RateTest(float(limit))
            test.add(rates[:n].sum(), n)
            won = sum(share * each[place] for share, each in zip(SHARES, capitals, strict=True))
            assert math.exp(test.log_evidence()) == pytest.approx(held(n) + (1 - held(n)) * won)
    for limit, capitals in CONFSEQ["mean"].items():
        for place, n in enumerate(CONFSEQ["at"]):
            test = MeanTest(float(limit), low=0.0)
            test.add(means[:n])
            won = sum(each[place] for each in capitals) / len(STAKES)
            assert math.exp(test.log_evidence()) == pytest.approx(held(n) + (1 - held(n)) * won)


def test_bounds_of_a_mean_are_those_of_confseq():
    """It centres by the plain mean, and this by the paper's, so they differ by a little."""
    bounds, means = MeanBounds(0.95), draws()[1]
    for n, value in enumerate(means, 1):
        bounds.add([value])
        if n in CONFSEQ["at"][1:]:
            place = CONFSEQ["at"].index(n)
            low, high = bounds.bounds()
            assert low == pytest.approx(CONFSEQ["lower"][place], abs=0.003)
            assert high == pytest.approx(CONFSEQ["upper"][place], abs=0.003)


@pytest.mark.parametrize("yes, n", [(0, 300), (6, 300), (300, 300), (2, 1000)])
def test_bounds_of_a_rate_are_where_the_mixture_wins_by_brute_force(yes, n):
    from scipy.integrate import quad

    def mixture(rate):  # over all alternatives, by Jeffreys' prior
        def ratio(q):
            prior = 1 / (math.pi * math.sqrt(q * (1 - q)))
            told = yes * math.log(q / rate) + (n - yes) * math.log((1 - q) / (1 - rate))
            return prior * math.exp(told)

        mid = min(max(yes / n, 1e-4), 1 - 1e-4)
        return sum(quad(ratio, *ends, limit=500)[0] for ends in ((0, mid), (mid, 1)))

    low, high = rate_bounds(yes, n, 0.95)
    for bound in (low, high):
        if 0 < bound < 1:
            assert mixture(bound) == pytest.approx(20, rel=0.02)
    assert low <= yes / n <= high
    assert (low == 0) == (yes == 0) and (high == 1) == (yes == n)


def test_bounds_of_a_rate_hold_at_all_times_together():
    made, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        seen = np.cumsum(made.random(2000) < 0.05)
        sides = [rate_bounds(int(seen[n - 1]), n, 0.95) for n in range(20, 2001, 60)]
        wrong += any(not low <= 0.05 <= high for low, high in sides)
    assert wrong <= 6  # 10 % were allowed for both sides; these give fewer


@pytest.mark.parametrize("limit", [0.001, 0.02, 0.3])
def test_no_bet_on_a_rate_wins_at_the_limit(limit):
    """The expected gain of every bet in one draw is 1, or less below the limit."""
    test = RateTest(limit)
    for rate in (limit, limit / 2):
        gains = rate * np.exp(test._yes) + (1 - rate) * np.exp(test._no)
        assert (gains <= 1 + 1e-12).all()
        assert (abs(gains - 1) < 1e-12).all() == (rate == limit)


def expected_gain(ratio, floor, n1, n2, r1, r2, both):
    """Of each bet, over n pairs and the samples left over, exactly."""
    factors = np.array(FACTORS)
    b = (ratio * n1 + n2) / (factors * ratio * n1 + n2)
    a, pairs = factors * b, min(n1, n2)
    pair = 1 + r1 * (a - 1) + r2 * (b - 1) + both * (a - 1) * (b - 1)
    alone = (1 + r1 * (a - 1)) ** (n1 - pairs) * (1 + r2 * (b - 1)) ** (n2 - pairs)
    return pair**pairs * alone * np.exp(-n1 * floor * (a - 1))


@pytest.mark.parametrize("n1, n2", [(1, 1), (50, 50), (5, 500), (500, 5), (30, 0)])
@pytest.mark.parametrize("r2", [0.0, 0.001, 0.05, 0.4])
@pytest.mark.parametrize("floor", [0.0, 0.001])
def test_no_bet_on_two_rates_wins_where_the_hypothesis_holds(n1, n2, r2, floor):
    """Also where a pair's two answers fail together, and whatever the second rate is."""
    r1 = min(1.0, 2 * r2 + floor)
    for both in (0.0, min(r1, r2)) if n1 == n2 else (0.0,):
        assert (expected_gain(2.0, floor, n1, n2, r1, r2, both) <= 1 + 1e-9).all()


def test_what_is_added_is_what_the_expectation_was_of():
    for n1, n2, k1, k2 in ((50, 50, 3, 1), (5, 500, 1, 0), (30, 0, 2, 0)):
        test = RatioTest(2.0, 0.001)
        test.add(k1, n1, k2, n2)
        factors = np.array(FACTORS)
        b = (2 * n1 + n2) / (factors * 2 * n1 + n2)
        gains = (factors * b) ** k1 * b**k2 * np.exp(-n1 * 0.001 * (factors * b - 1))
        won = held(n1) + (1 - held(n1)) * (np.array(SHARES) * gains).sum()
        assert math.exp(test.log_evidence()) == pytest.approx(won)


def test_under_no_change_almost_no_run_is_refused():
    """200 runs of 20,000 at the very limit, looked at after each ten."""
    made = np.random.default_rng(1)
    batches = ((made.binomial(10, 0.02, 200), 10) for _ in range(2000))
    assert np.isfinite(found_after(RateTest(0.02, (200,)), 0.01, batches)).sum() <= 4
    both = (
        (made.binomial(10, 0.04 * at + 0.001, 200), 10, made.binomial(90, 0.02 * at, 200), 90)
        for at in 0.2 + made.random(2000)  # the rates move, together
    )
    assert np.isfinite(found_after(RatioTest(2.0, 0.001, (200,)), 0.01, both)).sum() <= 4
    drops = ((made.choice([-1.0, 0.0, 1.0], (200, 10), p=[0.02, 0.95, 0.03]),) for _ in range(500))
    assert np.isfinite(found_after(MeanTest(0.01, -1.0, (200,)), 0.01, drops)).sum() <= 4


def test_twice_the_disagreement_is_found_within_1500_pairs():
    """The best test that knew the 4 % beforehand needs 510 pairs, and 1,460 in 95 of 100 runs."""
    made = np.random.default_rng(2)
    batches = ((made.binomial(10, 0.04, 400), 10) for _ in range(600))
    found = 10 * found_after(RateTest(0.02, (400,)), 0.01, batches)
    assert np.median(found) <= 700
    assert (found <= 1500).mean() >= 0.9
    assert np.isfinite(found).all()


def test_what_begins_late_is_found():
    """After 200,000 good pairs a plain product of bets would hold 1e-200 of its stake."""
    made, test = np.random.default_rng(3), RateTest(0.02, (20,))
    for _ in range(200):
        test.add(made.binomial(1000, 0.01, 20), 1000)
    assert (test.log_evidence() < 0).all()
    found = 10 * found_after(test, 0.01, ((made.binomial(10, 0.04, 20), 10) for _ in range(800)))
    assert np.median(found) <= 3000 and np.isfinite(found).all()


def test_bets_go_on_when_so_much_was_seen_that_nothing_more_is_placed():
    test = RateTest(0.02)
    test.add(0, 10**17)
    before = test.log_evidence()
    test.add(0, 0)
    assert test.log_evidence() == before
    for _ in range(3):
        test.add(10**17, 10**17)
    assert test.log_evidence() > 100 and math.isfinite(test.log_evidence())


def test_wealth_goes_round_through_json():
    test = RateTest(0.02)
    for told in (test.wealth.to_json(), None):
        again = RateTest(0.02)
        test.add(3, 50)
        again.wealth.restore(json.loads(json.dumps(told or test.wealth.to_json())))
        if told is None:
            assert again.log_evidence() == test.log_evidence()
    with pytest.raises(ValueError, match="expected"):
        Wealth((1.0,)).restore({"samples": 1, "log": [0.0, 0.0]})
