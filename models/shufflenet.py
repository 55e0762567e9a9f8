"""ShuffleNets for small images, as the field's CIFAR-100 benchmarks have them: a 1x1 stem that keeps the size.

V1: Zhang et al., CVPR 2018, Table 1, 3 groups. V2: Ma et al., ECCV 2018, Table 5, width 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import relu

from models.network import EndsInReLU, GlobalAveragePool, Network, conv_bn, initialise

STEM = 24


class GroupUnit(EndsInReLU):
    """A unit of V1 (section 3.2): grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; pooled and joined, or added.

    As in the field's checkpoints a ReLU follows the depthwise convolution, which the paper leaves out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        new = out_channels - in_channels if stride == 2 else out_channels
        middle = new // 4
        self.groups = 1 if in_channels == STEM else groups  # too few channels to group after the stem
        self.conv1, self.bn1 = conv_bn(in_channels, middle, 1, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride, groups=middle)
        self.conv3, self.bn3 = conv_bn(middle, new, 1, groups=groups)

    def before_relu(self, x: Tensor) -> Tensor:
        out = F.channel_shuffle(relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return out + x
        return torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), 1)


class ShuffleNetV1(Network):
    """Maps for 3x32x32: 24x32x32, 240x16x16, 480x8x8, 960x4x4."""

    def __init__(self, num_classes: int, groups: int = 3):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, STEM, 1)
        channels = STEM
        for index, (width, units) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
            first = GroupUnit(channels, width, 2, groups)
            rest = (GroupUnit(width, width, 1, groups) for _ in range(units - 1))
            self.add_module(f"layer{index}", nn.Sequential(first, *rest))
            channels = width
        self.linear = nn.Linear(channels, num_classes)
        initialise(self)
        stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU())
        self.set_stages((stem, self.layer1, self.layer2, self.layer3), GlobalAveragePool())

    @property
    def fc(self) -> nn.Linear:
        return self.linear


class SplitBeforeReLU(nn.Module):
    """A unit of torchvision's V2 without its last ReLUs; they commute with the shuffle that ends it.

    The channels are in the order of the unit's output. A half that is passed on comes out of the ReLU of
    an earlier unit and is not negative.
    """

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit
        kept, x = x.chunk(2, dim=1) if unit.stride == 1 else (unit.branch1[:-1](x), x)
        return F.channel_shuffle(torch.cat((kept, unit.branch2[:-1](x)), 1), 2)


class ShuffleNetV2(Network):
    """torchvision's network and parameter names; maps for 3x32x32: 24x32x32, 116x16x16, 232x8x8, 464x4x4.

    With `small` False it is torchvision's shufflenet_v2_x1_0 as it is, for ImageNet: 24x112x112, 116x28x28,
    232x14x14, 464x7x7, with max-pooling at the start of stage2. The embedding has 1024 dimensions.
    """

    def __init__(self, num_classes: int, small: bool = True):
        from torchvision.models import ShuffleNetV2 as Source  # here, because torchvision is slow to import

        super().__init__()
        source = Source([4, 8, 4], [STEM, 116, 232, 464, 1024], num_classes)
        self.conv1 = nn.Sequential(*conv_bn(3, STEM, 1), nn.ReLU()) if small else source.conv1
        self.stage2, self.stage3, self.stage4 = source.stage2, source.stage3, source.stage4
        self.conv5, self.fc = source.conv5, source.fc
        initialise(self)
        shrink = [] if small else [source.maxpool]
        embed = nn.Sequential(self.conv5, GlobalAveragePool())
        one, two, three = (
            nn.Sequential(stage[:-1], SplitBeforeReLU(stage[-1])) for stage in (self.stage2, self.stage3, self.stage4)
        )
        preact = (
            self.conv1[:-1],
            nn.Sequential(nn.ReLU(), *shrink, one),
            nn.Sequential(nn.ReLU(), two),
            nn.Sequential(nn.ReLU(), three),
            nn.Sequential(nn.ReLU(), embed),
        )
        stages = (self.conv1, nn.Sequential(*shrink, self.stage2), self.stage3, self.stage4)
        self.set_stages(stages, embed, preact)
        self.published = None if small else "shufflenet_v2_x1_0"
