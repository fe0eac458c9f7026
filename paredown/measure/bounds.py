"""How large a share can be that was seen to be small."""


def proportion_bound(count: int, n: int, confidence: float = 0.95) -> float:
    """The most that a proportion can be, surely enough, of which ``count`` of ``n`` were seen.

    Exact, one-sided, by the binomial distribution (Clopper and Pearson 1934, Biometrika 26:404).
    Raises ValueError for a count that is not from 0 to n, or no examples.

    >>> f"{proportion_bound(0, 80):.4f} {proportion_bound(1, 200):.4f}"
    '0.0368 0.0235'
    """
    from scipy.stats import beta

    if not 0 <= count <= n or n < 1:
        raise ValueError(f"count: expected 0 to n of at least 1 example, got {count} of {n}")
    return 1.0 if count == n else float(beta.ppf(confidence, count + 1, n - count))
