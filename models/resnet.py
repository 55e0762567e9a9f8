"""ResNets for small images (He et al., CVPR 2016, section 4.2), with projection shortcuts.

Depth 6n + 2: a 3x3 stem, then three stages of n basic blocks; stages 2 and 3 halve the map. Parameter names
(conv1, bn1, layer1..3, fc) and counts are those of the field's CIFAR-100 checkpoints, which put a 1x1
convolution with BatchNorm wherever the shape changes.
"""

from torch import Tensor, nn
from torch.nn.functional import relu

from models.network import EndsInReLU, GlobalAveragePool, Network, conv_bn, initialise


class BasicBlock(EndsInReLU):
    """Two convolutions and a shortcut: relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kernel: int = 3):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, kernel, stride)
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels, kernel)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))

    def before_relu(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return out + (x if self.downsample is None else self.downsample(x))

    def residual(self) -> tuple[tuple[nn.Conv2d, nn.BatchNorm2d], ...]:
        """The convolutions beside the shortcut, each with the BatchNorm that follows it."""
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


def chain(in_channels: int, out_channels: int, stride: int, kernel: int, blocks: int) -> nn.Sequential:
    """Basic blocks in a row, the first of which changes channels and size."""
    first = BasicBlock(in_channels, out_channels, stride, kernel)
    rest = [BasicBlock(out_channels, out_channels, 1, kernel) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class ResNet(Network):
    """ResNet of depth 6n + 2 and widths (stem, stage 1, stage 2, stage 3)."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1; got {depth}")
        stem, *stages = widths
        self.conv1, self.bn1 = conv_bn(3, stem, 3)
        self.layer1 = chain(stem, stages[0], 1, 3, blocks)
        self.layer2 = chain(stages[0], stages[1], 2, 3, blocks)
        self.layer3 = chain(stages[1], stages[2], 2, 3, blocks)
        self.fc = nn.Linear(stages[2], num_classes)
        initialise(self)
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU())
        self.set_stages((first, self.layer1, self.layer2, self.layer3), GlobalAveragePool())
