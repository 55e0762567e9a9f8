"""MobileNetV2 for small images (Sandler et al., CVPR 2018, Table 2), as the field's CIFAR-100 benchmarks have it.

Width 0.5 and expansion 6; against the paper the second stage keeps its size, ReLU6 is ReLU, the first unit
expands too (by 1), channels are not rounded to multiples of 8, and there is no dropout.
"""

from torch import Tensor, nn

from models.network import GlobalAveragePool, Network, conv_bn, initialise

# (expansion, channels at width 1, units, stride)
ROWS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
LAST = 1280


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without activation (section 3.3); x + that where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        up = (*conv_bn(in_channels, wide, 1), nn.ReLU())
        depthwise = (*conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU())
        self.conv = nn.Sequential(*up, *depthwise, *conv_bn(wide, out_channels, 1))
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(Network):
    """Maps for 3x32x32 at width 0.5: 16x16x16 (the stem), 12x16x16, 16x8x8, 48x4x4, 160x2x2.

    All but the stem's are linear bottlenecks, signed; the pre-activations are the maps themselves.
    """

    def __init__(self, width: float, num_classes: int):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn(3, channels, 3, 2), nn.ReLU())
        self.layers = nn.ModuleList()
        for expansion, wanted, units, stride in ROWS:
            row = nn.Sequential()
            for unit in range(units):
                row.append(InvertedResidual(channels, int(wanted * width), 1 if unit else stride, expansion))
                channels = int(wanted * width)
            self.layers.append(row)
        self.conv2 = nn.Sequential(*conv_bn(channels, LAST, 1), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(LAST, num_classes))
        initialise(self)
        rows = self.layers
        stages = (self.conv1, nn.Sequential(*rows[:2]), rows[2], nn.Sequential(*rows[3:5]), nn.Sequential(*rows[5:]))
        embed = nn.Sequential(self.conv2, GlobalAveragePool())
        self.set_stages(stages, embed, preact=(*stages, embed), first=2)

    @property
    def fc(self) -> nn.Linear:
        return self.classifier[0]
