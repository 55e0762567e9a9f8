"""What is searched for, and by what: the options that search.py and fleet.py have in common."""

from dataclasses import dataclass, field
from typing import Literal

from searching.scoring import ScoringOptions


@dataclass
class SearchOptions(ScoringOptions):
    """What is searched for, and by what.

    Args:
        budgets: what a student may cost, each for a student of its own: 0.5ms (one image, one thread), 300kparams,
            20Mmacs, or several that hold together, 1ms,300kparams.
        rank: supernet (scores on held-out images), macs (the more the better), or auto: supernet where there is one and
            Kendall's tau of its scores with the accuracies of trained members exceeds that of MACs (python -m
            benchmarks.ranking trains some); where none were trained, where its scores are above chance and predicted
            better than by MACs, which says little of students.
        finalists: the best members of each budget that are scored and measured themselves.
        profile: latencies of another device, or of this one: what profile_device.py wrote there; default: this device
            is measured.
    """

    title = "search"

    budgets: list[str] = field(default_factory=list)
    rank: Literal["auto", "supernet", "macs"] = "auto"
    finalists: int = 8
    profile: str | None = None
