"""Members of a pool drawn uniformly over their sizes, not over choices (which crowd in the middle)."""

from collections import Counter
from functools import cache
from itertools import accumulate

from common import derive_seed

BINS = 32  # equal widths between the smallest and the largest size
QUANTA = 1024  # sizes are counted in this many steps, so that sums of any number of layers stay countable


def draw_by_size(costs: tuple[tuple[int, ...], ...], seed: int) -> list[int]:
    """The candidate of every layer, for the member number `seed`.

    One of the `BINS` that hold a member is drawn, all alike, then one of its members, all alike. No member
    is built or enumerated: the numbers of ways to a size come from a table over layers and sizes.

    Args:
        costs: costs[l][j] is the size of candidate j of layer l; a member's size is a sum of one a layer.
        seed: any whole number; the same member on every machine.
    """
    steps, ways, binned = _table(costs)
    sizes = binned[derive_seed("pool sizes", seed, "bin") % len(binned)]
    ends = list(accumulate(ways[0][size] for size in sizes))
    member = derive_seed("pool sizes", seed, "member") % ends[-1]  # its number among those of the bin
    index = next(index for index, end in enumerate(ends) if member < end)
    rest, member = sizes[index], member - (ends[index] - ways[0][sizes[index]])
    choice = []
    for layer, following in zip(steps, ways[1:], strict=True):
        candidate = 0
        while member >= following[rest - layer[candidate]]:
            member -= following[rest - layer[candidate]]
            candidate += 1
        choice.append(candidate)
        rest -= layer[candidate]
    return choice


@cache
def _table(costs: tuple[tuple[int, ...], ...]) -> tuple[list[list[int]], list[Counter[int]], list[list[int]]]:
    """(steps, ways, sizes in each bin that holds any).

    steps[l][j]: costs above the layer's least; ways[l][s]: how many choices of layers l.. add up to s steps.
    """
    spread = sum(max(layer) - min(layer) for layer in costs)
    unit = max(1.0, spread / QUANTA)
    steps = [[round((cost - min(layer)) / unit) for cost in layer] for layer in costs]
    ways = [Counter({0: 1})]
    for layer in reversed(steps):
        sums: Counter[int] = Counter()
        for size, number in ways[0].items():
            for step in layer:
                sums[size + step] += number
        ways.insert(0, sums)
    binned: dict[int, list[int]] = {}
    largest = max(ways[0])
    for size in sorted(ways[0]):
        binned.setdefault(size * BINS // (largest + 1), []).append(size)
    return steps, ways, list(binned.values())
