"""Student branches grafted on a teacher: a transform of the teacher's feature map, then student blocks."""

from collections.abc import Sequence

from torch import Tensor, nn

from common import UserError
from models.network import conv_bn, initialise, macs
from models.pool import Pool
from models.supernet import Draw, Supernet, input_shape


def feature_transform(source: tuple[int, int], target: tuple[int, int]) -> nn.Sequential:
    """T^i of SFTN, section 3.1: from one (channels, side) to another, each step with BatchNorm and ReLU.

    3x3 convolutions with stride 2 shrink the map, 4x4 transposed convolutions with stride 2 enlarge it, a
    1x1 convolution keeps its size. Factors over 2 repeat the step. Raises UserError where no number of
    steps leads from one side to the other.
    """
    (channels, side), (target_channels, target_side) = source, target
    steps: list[nn.Module] = []
    if side == target_side:
        steps += [*conv_bn(channels, target_channels, 1), nn.ReLU()]
    while side > target_side:
        steps += [*conv_bn(channels, target_channels, 3, stride=2), nn.ReLU()]
        channels, side = target_channels, -(-side // 2)
    while side < target_side:
        grow = nn.ConvTranspose2d(channels, target_channels, 4, stride=2, padding=1, bias=False)
        steps += [grow, nn.BatchNorm2d(target_channels), nn.ReLU()]
        channels, side = target_channels, side * 2
    if side != target_side:
        raise UserError(
            f"no factor of 2 leads from the teacher's {source[1]}x{source[1]} map to the student's "
            f"{target_side}x{target_side}; choose an --image_size that is a power of 2"
        )
    transform = nn.Sequential(*steps)
    initialise(transform)
    return transform


class Branch(nn.Module):
    """T^i followed by the supernet's blocks i+1..N and its classifier."""

    def __init__(self, transform: nn.Module, supernet: Supernet):
        super().__init__()
        self.transform = transform
        self.supernet = supernet

    def forward(self, feature: Tensor, draws: Sequence[Draw]) -> Tensor:
        return self.supernet(self.transform(feature), draws)

    def macs(self, shape: tuple[int, int], chances: Sequence[Sequence[float]]) -> float:
        """Mean multiply-accumulates over paths, for one feature map of this (channels, side).

        A layer's candidates give outputs of one shape, so its mean cost is that of its candidates, weighted by
        `chances`, their probabilities.
        """
        total, x = macs(self.transform, self.supernet.fc.weight.new_zeros(1, shape[0], shape[1], shape[1]))
        for layer, row in zip(self.supernet.layers, chances, strict=True):
            here = [macs(layer.candidates[name], x) for name in layer.names]
            total += sum(chance * cost for chance, (cost, _) in zip(row, here, strict=False))
            x = next((out for _, out in here if out is not None), x)  # where there is only zero, the shortcut
        return total + macs(nn.Sequential(self.supernet.head, self.supernet.fc), x)[0]


def graft(
    shapes: Sequence[tuple[int, int]],
    pool: Pool,
    num_classes: int,
    image_size: int,
    share: bool = False,
    places: Sequence[int] = (),
) -> nn.ModuleList:
    """Branches behind the teacher's blocks `places`, counted from 1 and rising; () is all but the last block.

    `shapes` holds the (channels, side) of those blocks' feature maps; `share` ties the branches' blocks.
    """
    pool = pool.for_images(image_size)
    if len(shapes) != len(pool.blocks()) - 1:
        raise UserError(f"pool.partition: the teacher has {len(shapes) + 1} blocks, the pool {len(pool.blocks())}")
    branches = nn.ModuleList()
    for index in places or range(1, len(shapes) + 1):
        shared = branches[0].supernet if share and branches else None
        transform = feature_transform(shapes[index - 1], input_shape(pool, index, image_size))
        branches.append(Branch(transform, Supernet(pool, num_classes, index, shared)))
    return branches
