"""DenseNets for small images (Huang et al., CVPR 2017, section 3 and Table 2), without dropout.

A 3x3 stem, three dense blocks on maps of 32, 16 and 8, transitions between them; every layer adds `growth`
channels to all it was given. Plain: layers BatchNorm-ReLU-3x3, stem of 16, transitions keep the channels.
BC: 1x1 convolutions to 4 * growth before the 3x3, stem of 2 * growth, transitions halve the channels.
"""

import torch
from torch import Tensor, nn

from models.activation_checkpointing import checkpoint_if_deep
from models.network import GlobalAveragePool, Network, initialise


def norm_relu_conv(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    """BatchNorm, ReLU and a convolution that keeps the size."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(), convolution]


class DenseLayer(nn.Sequential):
    """All maps so far, each [N, C_i, H, W] -> [N, growth, H, W].

    They come one by one and are joined in here: where layers are recomputed, no joined map is kept.
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: bool):
        narrow = norm_relu_conv(in_channels, 4 * growth, 1) if bottleneck else []
        super().__init__(*narrow, *norm_relu_conv(4 * growth if bottleneck else in_channels, growth, 3))

    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(torch.cat(maps, 1))


class DenseBlock(nn.ModuleList):
    """[N, C, H, W] -> [N, C + layers * growth, H, W]: the input and what every layer adds."""

    def __init__(self, in_channels: int, growth: int, layers: int, bottleneck: bool, depth: int):
        super().__init__(DenseLayer(in_channels + i * growth, growth, bottleneck) for i in range(layers))
        self.runners = tuple(checkpoint_if_deep(self, depth))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.runners:
            maps.append(layer(*maps))
        return torch.cat(maps, 1)


class DenseNet(Network):
    """DenseNet-depth (k = growth), or DenseNet-BC. Maps: the stem's and each dense block's output, raw sums.

    DenseNet-100-12 for 3x32x32: 16x32x32, 400x32x32, 784x16x16, 1168x8x8. The pre-activations are the maps
    after the next BatchNorm (of the transition, or the last one); the stem's map stays raw. From depth 100
    on, layers are recomputed in the backward pass: DenseNet-100-12 keeps 0.7 GB for it instead of 7.4,
    DenseNet-100-24 1.3 instead of 14.4 (batch 64 of 3x32x32, fp32: what autograd saves in the forward pass,
    each storage once, parameters and buffers left out).
    """

    def __init__(self, depth: int, growth: int, num_classes: int, bc: bool = False):
        super().__init__()
        layers, remainder = divmod(depth - 4, 6 if bc else 3)
        if remainder or layers < 1 or growth < 1:
            raise ValueError(f"depth must be {'6n' if bc else '3n'} + 4 and growth >= 1; got {depth} and {growth}")
        channels = 2 * growth if bc else 16
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for index in (1, 2, 3):
            self.add_module(f"block{index}", DenseBlock(channels, growth, layers, bc, depth))
            channels += layers * growth
            if index < 3:
                out_channels = channels // 2 if bc else channels
                transition = nn.Sequential(*norm_relu_conv(channels, out_channels, 1), nn.AvgPool2d(2))
                self.add_module(f"transition{index}", transition)
                channels = out_channels
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

        first, second = self.transition1, self.transition2
        head = nn.Sequential(nn.ReLU(), GlobalAveragePool())
        stages = (self.conv1, self.block1, nn.Sequential(first, self.block2), nn.Sequential(second, self.block3))
        preact = (
            self.conv1,
            nn.Sequential(self.block1, first[0]),
            nn.Sequential(first[1:], self.block2, second[0]),
            nn.Sequential(second[1:], self.block3, self.bn1),
            head,
        )
        self.set_stages(stages, nn.Sequential(self.bn1, *head), preact, normalised=True)
