"""Means and paired differences over seeds, with 95% intervals."""

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95
Interval = tuple[float, float]


@dataclass
class Difference:
    """Mean of paired differences and its 95% interval over seeds, None of fewer than 2."""

    mean: float
    interval: Interval | None
    pairs: int
    seeds: int

    def verdict(self) -> str:
        """In words."""
        if self.interval is None:
            return "too few seeds to tell"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "not distinguishable with this many seeds"

    def as_dict(self) -> dict:
        return asdict(self) | {"verdict": self.verdict()}


def paired_difference(
    values: dict[Hashable, float], baseline: dict[Hashable, float], seeds: dict[Hashable, int]
) -> Difference:
    """The difference between `values` and `baseline` over the keys that both have; seeds[key] is a key's seed.

    Raises:
        ValueError: no key is in both.
    """
    by_seed: dict[int, list[float]] = {}
    for key in values.keys() & baseline.keys():
        by_seed.setdefault(seeds[key], []).append(values[key] - baseline[key])
    if not by_seed:
        raise ValueError("nothing to compare: no runs in common")
    mean, interval = over_seeds(by_seed)
    return Difference(mean, interval, sum(map(len, by_seed.values())), len(by_seed))


def over_seeds(by_seed: dict[int, list[float]]) -> tuple[float, Interval | None]:
    """The mean of each seed's mean, and its 95% interval by Student's t over the seeds.

    Runs of one seed share a teacher and are no independent draws: were they counted one by one, the interval would be
    too short.
    """
    means = [statistics.mean(by_seed[seed]) for seed in sorted(by_seed)]
    return statistics.mean(means), student_interval(means)


def student_interval(values: Sequence[float]) -> Interval | None:
    """The mean's 95% interval by Student's t; None of fewer than 2 values."""
    if len(values) < 2:
        return None
    half = student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half
