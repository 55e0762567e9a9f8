"""All members of a pool at once: a cost that is a sum over layers is a table of sums, computed without building any."""

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import nn

from common import UserError
from models.network import count_parameters, macs
from models.pool import Pool, PoolLayer, build_head, build_stem

MOST = 10**7  # members: an array of a number each is then 80 MB
FIXED = ("stem", "head")


class Members:
    """Every choice of a candidate for each layer of a pool; the last layer's varies first.

    Args:
        pool: whose; its stem's stride is settled (Pool.for_images).

    Attributes:
        options: the candidates of each layer.
        shape: how many there are of them.

    Raises:
        UserError: more members than can be enumerated.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        self.options = [pool.choices(layer) for layer in range(len(pool.widths))]
        self.shape = tuple(map(len, self.options))
        if len(self) > MOST:
            raise UserError(
                f"--teacher: its pool has {len(self):.1e} members, and search.py looks at each of up to {MOST:,}; "
                "fewer candidates a layer, or fewer layers, make a smaller pool"
            )

    def __len__(self) -> int:
        return int(np.prod([float(count) for count in self.shape]))

    def sums(self, costs: Sequence[Sequence[float]], fixed: float = 0.0) -> np.ndarray:
        """float64 [members]: `fixed` plus costs[l][j] of the candidate j that a member has in layer l."""
        return fixed + reduce(np.add.outer, [np.asarray(layer, dtype=np.float64) for layer in costs]).ravel()

    def places(self, members: Sequence[int]) -> np.ndarray:
        """int64 [members, layers]: which candidate each of these members, by number, has in each layer."""
        return np.stack(np.unravel_index(np.asarray(members, dtype=np.int64), self.shape), axis=1)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `places`."""
        return np.ravel_multi_index(tuple(np.asarray(places).T), self.shape)

    def choice(self, member: int) -> list[str]:
        """The candidates of a member, by name."""
        return [names[place] for names, place in zip(self.options, self.places([member])[0], strict=True)]

    def number(self, choice: Sequence[str]) -> int:
        """The member that has these candidates."""
        places = [names.index(name) for names, name in zip(self.options, choice, strict=True)]
        return int(self.numbers(np.array([places]))[0])

    def by_block(self, costs: dict[str, float]) -> np.ndarray:
        """`sums` of costs by the names of `blocks`; what is not named costs nothing."""
        layers = [[costs.get(block_name(i, name), 0.0) for name in names] for i, names in enumerate(self.options)]
        return self.sums(layers, sum(costs[name] for name in FIXED))

    def sizes(self, num_classes: int, image_size: int) -> dict[str, np.ndarray]:
        """Parameters and multiply-accumulates of an image, [members] each; nothing is computed, all is on `meta`."""
        parameters, operations = {}, {}
        with torch.device("meta"):
            for name, module, shape in blocks(self.pool, num_classes, image_size):
                parameters[name] = count_parameters(module)
                operations[name] = macs(module, torch.empty(1, *shape))[0]
        return {"params": self.by_block(parameters), "macs": self.by_block(operations)}


def block_name(layer: int, candidate: str) -> str:
    """What a candidate of a layer, counted from 0, is called among the blocks."""
    return f"layer{layer + 1}.{candidate}"


def blocks(pool: Pool, num_classes: int, image_size: int) -> Iterator[tuple[str, nn.Module, tuple[int, int, int]]]:
    """(name, module, shape C x H x W of what it takes) of what the members are made of, but of what computes nothing.

    The stem, every candidate of every layer with its shortcut, and the last convolution with the classifier, each with
    fresh weights, on the default device.
    """
    side, stride = image_size, pool.stem_stride or 1
    yield "stem", build_stem(pool.stem, stride), (3, side, side)
    side = -(-side // stride)
    for layer, channels in enumerate(pool.inputs()):
        for name in pool.choices(layer):
            module = PoolLayer(pool.layer_spec(layer, name))
            if name != "zero" and (module.shortcut or not isinstance(module.operation, nn.Identity)):
                yield block_name(layer, name), module, (channels, side, side)
        side = -(-side // pool.strides[layer])
    head = nn.Sequential(build_head(pool.widths[-1], pool.head), nn.Linear(pool.head, num_classes))
    yield "head", head, (pool.widths[-1], side, side)
