"""Means, spreads and paired differences with 95% intervals."""

import math
import random
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

from scipy.stats import t as student_t

BOOTSTRAPS = 10_000
CONFIDENCE = 0.95


@dataclass
class Difference:
    """Mean of paired differences, and what it may be.

    `interval` is Student's over all pairs; `bootstrap` resamples whole groups (seeds: runs of one seed share a teacher,
    so that pairs within one are no independent draws), None where there are fewer than 2.
    """

    mean: float
    deviation: float
    pairs: int
    interval: tuple[float, float] | None
    groups: int
    bootstrap: tuple[float, float] | None

    def verdict(self) -> str:
        """In words, by the wider of the two intervals."""
        if self.interval is None or self.bootstrap is None:
            return "too few runs to tell"
        low, high = min(self.interval[0], self.bootstrap[0]), max(self.interval[1], self.bootstrap[1])
        return "better" if low > 0 else "worse" if high < 0 else "not distinguishable with this many runs"

    def as_dict(self) -> dict:
        return asdict(self) | {"verdict": self.verdict()}


def paired_difference(values: dict[Hashable, float], baseline: dict[Hashable, float], groups: dict) -> Difference:
    """The difference between `values` and `baseline` over the keys that both have; groups[key] is a key's seed.

    Raises:
        ValueError: no key is in both.
    """
    keys = [key for key in values if key in baseline]
    if not keys:
        raise ValueError("nothing to compare: no runs in common")
    differences = {key: values[key] - baseline[key] for key in keys}
    every = list(differences.values())
    deviation = statistics.stdev(every) if len(every) > 1 else 0.0
    by_group: dict = {}
    for key in keys:
        by_group.setdefault(groups[key], []).append(differences[key])
    return Difference(
        mean=statistics.mean(every),
        deviation=deviation,
        pairs=len(every),
        interval=student_interval(every),
        groups=len(by_group),
        bootstrap=_bootstrap(list(by_group.values())),
    )


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean's 95% interval by Student's t; None of fewer than 2 values."""
    if len(values) < 2:
        return None
    half = student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def _bootstrap(groups: list[list[float]]) -> tuple[float, float] | None:
    if len(groups) < 2:
        return None
    source = random.Random(0)
    means = sorted(
        statistics.fmean([value for group in source.choices(groups, k=len(groups)) for value in group])
        for _ in range(BOOTSTRAPS)
    )
    cut = round((1 - CONFIDENCE) / 2 * BOOTSTRAPS)
    return means[cut], means[-cut - 1]
