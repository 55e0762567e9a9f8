"""What a score costs at least: the Pareto fronts of all members, as numbers and as a plot."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

LABELS = {"ms": "latency, ms", "params": "thousand parameters", "macs": "million multiply-accumulates"}
SCALES = {"ms": 1.0, "params": 1e3, "macs": 1e6}
NAMES = {"ms": "ms", "params": "k params", "macs": "M MACs"}  # of a table's columns
TEXTS = {"ms": "{:.3f}", "params": "{:,.1f}", "macs": "{:,.2f}"}
MOST = 12  # rows of a front in a table
SHOWN = 4000  # members that are drawn, of more evenly many
COLOURS = {"members": "#b8c2cc", "front": "#3b82c4", "chosen": "#c4473b", "others": "#8a8f3c"}


def front(cost: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Numbers of the members that no other beats in cost or score without being worse in the other, cheapest first."""
    order = np.lexsort((-scores, cost))
    best = np.maximum.accumulate(scores[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def rows(fronts: Mapping[str, Sequence[Mapping]]) -> list[dict[str, str]]:
    """The cells of a table of the fronts of search.json, the cheapest first: of each at most MOST members, evenly along
    it, its ends among them."""
    cells = []
    for unit, members in fronts.items():
        shown = np.unique(np.linspace(0, len(members) - 1, min(MOST, len(members))).round().astype(int))
        for place in shown.tolist():
            costs = members[place]["costs"]
            row = {"front": NAMES[unit], "place": f"{place + 1}/{len(members)}"}
            row |= {NAMES[name]: TEXTS[name].format(costs[name] / SCALES[name]) for name in NAMES if name in costs}
            row |= {"predicted": f"{members[place]['score']:.2f}", "layers": " ".join(members[place]["choice"])}
            cells.append(row)
    return cells


def plot(
    costs: Mapping[str, np.ndarray],
    scores: np.ndarray,
    unit: str,
    chosen: Mapping[str, tuple[Mapping[str, float], float]],
    others: Mapping[str, Mapping[str, float]],
) -> bytes:
    """A PNG with a panel for each cost.

    Args:
        costs: by unit, [members].
        scores: [members], predicted.
        unit: of the scores.
        chosen: (costs, score) by the name of the budget.
        others: costs of students that are no members, and have no score: lines.
    """
    figure = Figure(figsize=(5 * len(costs), 4.2), layout="constrained")
    shown = np.arange(0, len(scores), max(1, len(scores) // SHOWN))
    for axis, (name, cost) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
        scale = SCALES[name]
        cost = cost / scale
        axis.plot(cost[shown], scores[shown], ".", markersize=2, color=COLOURS["members"], label="members")
        best = front(cost, scores)
        axis.step(cost[best], scores[best], where="post", color=COLOURS["front"], label="Pareto front")
        _mark(axis, [(text, each[name] / scale, score) for text, (each, score) in chosen.items()])
        for text, each in others.items():
            if (value := each.get(name, np.inf) / scale) <= 1.05 * cost.max():
                axis.axvline(value, color=COLOURS["others"], linestyle=":", linewidth=1)
                axis.annotate(text, (value, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8)
        axis.set(xlabel=LABELS[name], ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _mark(axis, points: Sequence[tuple[str, float, float]]) -> None:
    axis.plot([x for _, x, _ in points], [y for _, _, y in points], "o", color=COLOURS["chosen"], label="chosen")
    for text, x, y in points:
        axis.annotate(text, (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
