"""What makes the maps of any two networks comparable: stages are paired, sizes and channels adapted."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor, nn


def pair_stages(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Pairs (stage of the student, stage of the teacher), order kept, the stems left out.

    Where one network has more stages than the other, some of its stages have no partner: those whose omission
    makes the sizes in the pairs agree best (sum of |log2 of the ratio of sides|), deeper stages being kept in
    a tie. The field's code pairs from the front there, whatever the sizes are.
    """
    few, many = sorted((student[1:], teacher[1:]), key=len)

    def misfit(chosen: tuple[int, ...]) -> float:
        pairs = zip(few, (many[index] for index in chosen), strict=True)
        return sum(abs(math.log2(a.shape[-1] / b.shape[-1])) for a, b in pairs)

    # max prefers the first of equals, and the reversed order has the deepest choices first.
    chosen = min(reversed(list(combinations(range(len(many)), len(few)))), key=misfit)
    pairs = [(index + 1, other + 1) for index, other in enumerate(chosen)]
    return pairs if len(student) <= len(teacher) else [(other, index) for index, other in pairs]


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, ..., H, W], the larger averaged down to the smaller one's size."""
    if a.shape[-1] > b.shape[-1]:
        a = F.adaptive_avg_pool2d(a, b.shape[-2:])
    elif b.shape[-1] > a.shape[-1]:
        b = F.adaptive_avg_pool2d(b, a.shape[-2:])
    return a, b


def by_pixel(maps: Tensor) -> Tensor:
    """[N, C, ...] -> [N, ... C], each image a vector: of maps in channels_last a view, and so is its gradient."""
    return maps.movedim(1, -1).flatten(1)


class Resize(nn.Module):
    """Averages a map down to a side, or repeats pixels up to it."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > self.side:
            return F.adaptive_avg_pool2d(x, self.side)
        return F.interpolate(x, size=self.side, mode="nearest") if x.shape[-1] < self.side else x


def regressor(source: Tensor, target: Tensor, rectified: bool) -> nn.Sequential:
    """From maps like `source` to the shape of `target`: convolutions with bias, BatchNorm, maybe a ReLU.

    1x1 where the sides agree; a factor of 2 is a 3x3 convolution with stride 2, or a transposed 4x4 one, and
    is repeated for its powers; other ratios are resized first.
    """
    channels, side, wanted, target_side = source.shape[1], source.shape[-1], target.shape[1], target.shape[-1]
    steps: list[nn.Module] = []
    factor = math.log2(side / target_side)
    if factor != round(factor):
        steps.append(Resize(target_side))
        factor = 0
    for _ in range(round(abs(factor)) or 1):
        if factor > 0:
            steps.append(nn.Conv2d(channels, wanted, 3, stride=2, padding=1))
        elif factor < 0:
            steps.append(nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1))
        else:
            steps.append(nn.Conv2d(channels, wanted, 1))
        steps.append(nn.BatchNorm2d(wanted))
        channels = wanted
    return nn.Sequential(*steps, *([nn.ReLU()] if rectified else []))


def is_rectified(maps: Tensor) -> bool:
    """Whether these maps of random images come out of a ReLU."""
    return bool(maps.min() >= 0)
