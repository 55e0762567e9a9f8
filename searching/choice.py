"""The member to take for a budget, and why."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common import UserError
from searching.budget import Budget, check_possible, in_words
from searching.members import Members
from searching.ranking import Ranking


@dataclass
class Field:
    """What members are chosen from.

    Attributes:
        members: of the pool.
        costs: by unit (ms, where latency was measured, params, macs), float64 [members].
        ranking: of all members.
        finalists: how many of the best are looked at for real.
        score: of a member for real, in the ranking's unit; None: the ranking is exact.
        milliseconds: of a member measured whole on the device of the budgets; None: that is not this one.
    """

    members: Members
    costs: dict[str, np.ndarray]
    ranking: Ranking
    finalists: int
    score: Callable[[int], float] | None = None
    milliseconds: Callable[[int], float] | None = None

    def cost(self, member: int) -> dict[str, float]:
        """What a member costs, by unit."""
        return {unit: float(values[member]) for unit, values in self.costs.items()}


def choose(budget: Budget, field: Field) -> dict:
    """The entry of search.json for a budget: the best of the finalists that keep to it, the latency as measured.

    Where all finalists turn out too slow, the best among the members that should be faster than any of them come next.

    Raises:
        UserError: a budget that no member keeps to; the member that comes nearest is named.
    """
    check_possible(budget, field.members, field.costs)
    fine, fitting = budget.within(field.costs), []
    found = int(fine.sum())
    measured: dict[int, float] = {}
    while not fitting and fine.any():
        finalists = field.ranking.best(fine, field.finalists)
        if field.milliseconds and "ms" in budget.limits:
            measured |= {member: field.milliseconds(member) for member in finalists}
        fitting = [member for member in finalists if measured.get(member, 0.0) <= budget.limits.get("ms", 0.0)]
        if "ms" in field.costs:
            fine &= field.costs["ms"] < field.costs["ms"][finalists].min()
    if not fitting:
        nearest = min(measured, key=measured.get)
        raise UserError(
            f"--budgets {budget.name}: no member keeps to it: the fastest, {' '.join(field.members.choice(nearest))}, "
            f"measures {in_words('ms', measured[nearest])}"
        )
    score = field.score or (lambda member: float(field.ranking.scores[member]))
    scores = {member: score(member) for member in fitting}
    chosen = max(fitting, key=lambda member: (scores[member], -field.costs["macs"][member]))
    entry = {"choice": field.members.choice(chosen), "limits": budget.limits, "costs": field.cost(chosen)}
    if chosen in measured:
        entry["measured_ms"] = measured[chosen]
    entry |= {"predicted_score": float(field.ranking.scores[chosen]), "score": scores[chosen]}
    entry |= {"within_budget": found, "finalists": len(fitting)}
    return entry | {"why": _why(budget, entry, field.ranking, len(field.members))}


def _why(budget: Budget, entry: dict, ranking: Ranking, members: int) -> str:
    costs = entry["costs"] | ({"ms": entry["measured_ms"]} if "measured_ms" in entry else {})
    shares = {unit: costs[unit] / limit for unit, limit in budget.limits.items()}
    tightest = max(shares, key=shares.get)
    return (
        f"the best by {ranking.by} of {entry['finalists']} finalists, and those of {entry['within_budget']:,} members, "
        f"of {members:,}, that keep to the budget; it takes {shares[tightest]:.0%} of its "
        f"{in_words(tightest, budget.limits[tightest])}"
    )
