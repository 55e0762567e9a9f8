"""The weight-sharing supernet: every reconfigurable layer holds all its candidates, a draw picks what runs.

Source: Binici et al. (arXiv 2407.16040), supplement, section 1; gates after ProxylessNAS (ICLR 2019).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import gated_mix
from models.network import initialise
from models.pool import Pool, build_candidate, build_head, build_stem


class Draw(NamedTuple):
    """What one layer runs: candidate `active`; with `gates` [J] also the others of `candidates`, whose
    outputs are wanted for the gates' gradient. `active` is an index into the layer's candidates and among
    `candidates`, which are J or fewer: the gates of a layer with fewer are filled up."""

    active: int
    candidates: tuple[int, ...] = ()
    gates: Tensor | None = None


class MixedLayer(nn.Module):
    """One reconfigurable layer of the pool: x -> [x +] candidate(x) of the drawn candidate."""

    def __init__(self, pool: Pool, layer: int):
        super().__init__()
        self.names = pool.choices(layer)
        self.shortcut = pool.shortcut and pool.keeps_shape(layer)
        self.candidates = nn.ModuleDict({name: build_candidate(pool.layer_spec(layer, name)) for name in self.names})

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        output = self._candidate(draw.active)(x)
        shortcut = x if self.shortcut else None
        if draw.gates is not None:
            # An inactive candidate's gate is 0, so nothing flows back through it: only its output is needed.
            with torch.no_grad():
                outputs = [output if j == draw.active else self._candidate(j)(x) for j in draw.candidates]
            outputs += [None] * (len(draw.gates) - len(outputs))
            return gated_mix(outputs, draw.gates, draw.candidates.index(draw.active), shortcut)
        if output is None:
            return x
        return output if shortcut is None else x + output

    def _candidate(self, index: int) -> nn.Module:
        return self.candidates[self.names[index]]


class Supernet(nn.Module):
    """The pool's supernet from block `first` (counted from 0) to the logits.

    With first = 0 it takes images [N, 3, H, W] and has the stem; otherwise it takes the feature map that
    block `first` of a student would. `shared`, another supernet of the pool that starts earlier, lends its
    layers and head instead of new ones.
    """

    def __init__(self, pool: Pool, num_classes: int, first: int = 0, shared: "Supernet | None" = None):
        super().__init__()
        skipped = sum(pool.blocks()[:first])
        self.stem = build_stem(pool.stem, pool.stem_stride or 1) if first == 0 else nn.Identity()
        if shared is None:
            self.layers = nn.ModuleList(MixedLayer(pool, i) for i in range(skipped, len(pool.widths)))
            self.head = build_head(pool.widths[-1], pool.head)
            self.fc = nn.Linear(pool.head, num_classes)
            initialise(self)
        else:
            self.layers = shared.layers[len(shared.layers) - len(pool.widths) + skipped :]
            self.head, self.fc = shared.head, shared.fc

    def forward(self, x: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Logits [N, num_classes] of the path that `draws`, one a layer, describe."""
        x = self.stem(x)
        for layer, draw in zip(self.layers, draws, strict=True):
            x = layer(x, draw)
        return self.fc(self.head(x))


def input_shape(pool: Pool, block: int, image_size: int) -> tuple[int, int]:
    """(channels, side) of the feature map that block `block` >= 1 of the pool's students takes."""
    layers = sum(pool.blocks()[:block])
    side = image_size
    for stride in (pool.for_images(image_size).stem_stride, *pool.strides[:layers]):
        side = -(-side // stride)
    return (pool.inputs() + pool.widths[-1:])[layers], side
