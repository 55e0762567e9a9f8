"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016): depth 6n + 4, width factor k, no dropout."""

import math

from torch import Tensor, nn
from torch.nn.functional import relu

from models.network import Network, global_average_pool


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two convolutions; the shortcut shares the first where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if stride != 1 or in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(relu(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    """n blocks in a row; the attribute `layer` is the name that published checkpoints use."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = PreActivationBlock(in_channels, out_channels, stride)
        rest = [PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(Network):
    """WRN-d-k. Its stage maps are the raw sums of the blocks, signed, before the next BatchNorm and ReLU."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1 or width < 1:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 and width >= 1; got {depth} and {width}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * width, 1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
                nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)
        embed = nn.Sequential(self.bn1, nn.ReLU(), global_average_pool())
        self.set_stages((self.conv1, self.block1, self.block2, self.block3), embed)
