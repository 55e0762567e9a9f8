"""VGG for small images (Simonyan and Zisserman, ICLR 2015, Table 1), with BatchNorm and one linear layer.

Five blocks of 3x3 convolutions with bias, max-pooling between them, global average pooling, linear. Parameter
names (block0..4, classifier), counts and initial weights are those of the field's CIFAR-100 checkpoints; vgg8
is the field's own. The first two stages are block 1 of SFTN (arXiv 2102.07650, Tables 10 to 12).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.network import GlobalAveragePool, Network, conv_bn, normal_by_fan_out

WIDTHS = (64, 128, 256, 512, 512)
LAYERS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def convolutions(in_channels: int, out_channels: int, layers: int) -> nn.Sequential:
    """[N, in, H, W] -> [N, out, H, W]: convolution, BatchNorm and ReLU, without the last ReLU."""
    parts: list[nn.Module] = []
    for index in range(layers):
        channels = out_channels if index else in_channels
        parts += [nn.ReLU()] if index else []
        parts += conv_bn(channels, out_channels, 3, bias=True)
    return nn.Sequential(*parts)


class PoolLargeMaps(nn.Module):
    """Halves maps of side 8 and more: the last block sees 4x4 for images of 32 and of 64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if x.shape[-1] >= 8 else x


class VGG(Network):
    """VGG of `depth` 8, 11, 13, 16 or 19. Maps for 3x32x32: 64x32x32, 128x16x16, 256x8x8, 512x4x4, 512x4x4."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        channels = 3
        for index, (width, layers) in enumerate(zip(WIDTHS, LAYERS[depth], strict=True)):
            self.add_module(f"block{index}", convolutions(channels, width, layers))
            channels = width
        self.classifier = nn.Linear(channels, num_classes)
        normal_by_fan_out(self)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)
        stages = [nn.Sequential(self.block0, nn.ReLU())]
        for block in (self.block1, self.block2, self.block3):
            stages.append(nn.Sequential(nn.MaxPool2d(2), block, nn.ReLU()))
        stages.append(nn.Sequential(PoolLargeMaps(), self.block4, nn.ReLU()))
        self.set_stages(stages, GlobalAveragePool(), first=2)

    @property
    def fc(self) -> nn.Linear:
        return self.classifier
