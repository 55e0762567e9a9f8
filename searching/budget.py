"""Budgets: what a student may cost, as it is typed, and which members of a pool keep to it."""

import math
import re
from dataclasses import dataclass

import numpy as np

from common import UserError
from searching.members import Members

FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
LIMIT = re.compile(r"(\d+\.?\d*|\.\d+)\s*(?:(ms)|([kmg]?)\s*(params|macs))", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Budget:
    """What a student may cost at most.

    Attributes:
        name: as it was typed, fit for a file.
        limits: by unit: ms of a single image, params, macs.
    """

    name: str
    limits: dict[str, float]

    def within(self, costs: dict[str, np.ndarray]) -> np.ndarray:
        """bool [members]: who keeps to all limits."""
        return self.excess(costs) <= 1

    def excess(self, costs: dict[str, np.ndarray]) -> np.ndarray:
        """float64 [members]: the largest, over the limits, of what a member costs over the limit."""
        return np.max([costs[unit] / limit for unit, limit in self.limits.items()], axis=0)


def parse_budget(text: str) -> Budget:
    """`0.5ms`, `300kparams`, `20Mmacs`, or several with commas between them.

    Raises:
        UserError: what is no number with one of these units, a limit of 0, or two limits of a unit.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        match = LIMIT.fullmatch(part.strip())
        if not match:
            raise UserError(
                f"--budgets {text}: '{part.strip()}' is no budget; write a number and ms, params or macs with k, M or "
                "G, for example 0.5ms, 300kparams, 20Mmacs, and a comma between limits that hold together"
            )
        number, milliseconds, factor, counted = match.groups()
        unit = (milliseconds or counted).lower()
        limit = float(number) * FACTORS[(factor or "").lower()]
        if not 0 < limit < math.inf or unit in limits:
            raise UserError(f"--budgets {text}: '{part.strip()}' must be above 0, and each unit stand once")
        limits[unit] = limit
    return Budget("-".join(part.replace(" ", "") for part in text.split(",")), limits)


def parse_budgets(texts: list[str]) -> list[Budget]:
    """As `parse_budget`, each; two of the same name are one student, and a mistake."""
    if not texts:
        raise UserError("--budgets: name at least one, for example --budgets 0.5ms 300kparams 1ms,20Mmacs")
    found = [parse_budget(text) for text in texts]
    if len({budget.name.lower() for budget in found}) < len(found):
        raise UserError(f"--budgets {' '.join(texts)}: one of them stands twice")
    return found


def is_name(text: str) -> bool:
    """Whether a budget could be called so."""
    try:
        return parse_budget(text.replace("-", ",")).name == text
    except UserError:
        return False


def check_possible(budget: Budget, members: Members, costs: dict[str, np.ndarray]) -> None:
    """Raise UserError for a budget that no member keeps to, naming the one that comes nearest."""
    excess = budget.excess(costs)
    nearest = int(excess.argmin())
    if excess[nearest] <= 1:
        return
    needs = " and ".join(in_words(unit, float(costs[unit][nearest])) for unit in budget.limits)
    which = "the smallest member" if len(budget.limits) == 1 else "the member that comes nearest"
    raise UserError(
        f"--budgets {budget.name}: no member of the pool keeps to it: {which}, "
        f"{' '.join(members.choice(nearest))}, takes {needs}"
    )


def in_words(unit: str, value: float) -> str:
    """A cost with its unit."""
    if unit == "ms":
        return f"{value:.3g} ms"
    return f"{value:,.0f} parameters" if unit == "params" else f"{value / 1e6:,.2f} million MACs"
