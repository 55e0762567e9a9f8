"""torchvision's networks for ImageNet, with its parameter names: its state dicts load as they are.

ResNets (He et al., CVPR 2016, Table 1) have a second form for small images, the field's CIFAR-100 ResNet50:
a 3x3 stem with stride 1 and no max-pooling. MobileNetV2 (Sandler et al., CVPR 2018) and EfficientNet-B0 (Tan
and Le, ICML 2019) are torchvision's modules, cut where the map is halved.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from common import check_name
from models.foreign import Foreign
from models.network import EndsInReLU, GlobalAveragePool, Network, conv_bn, initialise
from models.resnet import BasicBlock

SMALL_IMAGE = 64  # up to this side a ResNet takes the form for small images


class Bottleneck(EndsInReLU):
    """1x1 down, 3x3 (with the stride, as torchvision puts it), 1x1 up, and a shortcut; `width` is the 3x3's."""

    def __init__(self, in_channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.downsample = None
        if stride != 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(*conv_bn(in_channels, 4 * width, 1, stride))

    def before_relu(self, x: Tensor) -> Tensor:
        out = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))

    def residual(self) -> tuple[tuple[nn.Conv2d, nn.BatchNorm2d], ...]:
        """The convolutions beside the shortcut, each with the BatchNorm that follows it."""
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)


RESNETS = {
    "resnet18": (BasicBlock, 1, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, 1, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, 4, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, 4, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, 4, (3, 8, 36, 3)),
}


class ImageNetResNet(Network):
    """Five maps: the stem's and those of layer1..4.

    ResNet-50 for 3x224x224: 64x112x112, 256x56x56, 512x28x28, 1024x14x14, 2048x7x7, with max-pooling at the
    start of layer1; its small form for 3x32x32: 64x32x32, 256x32x32, 512x16x16, 1024x8x8, 2048x4x4.
    """

    def __init__(self, name: str, num_classes: int, image_size: int):
        super().__init__()
        small = image_size <= SMALL_IMAGE
        block, expansion, depths = RESNETS[name]
        self.conv1, self.bn1 = conv_bn(3, 64, 3) if small else conv_bn(3, 64, 7, 2)
        channels = 64
        for index, depth in enumerate(depths):
            width, stride = 64 * 2**index, 1 if index == 0 else 2
            first = block(channels, width, stride)
            channels = expansion * width
            rest = (block(channels, width) for _ in range(depth - 1))
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)
        stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU())
        layer1 = self.layer1 if small else nn.Sequential(nn.MaxPool2d(3, 2, padding=1), self.layer1)
        stages = (stem, layer1, self.layer2, self.layer3, self.layer4)
        self.set_stages(stages, GlobalAveragePool(), first=2)
        self.published = None if small else name


def torchvision_network(
    name: str, num_classes: int, image_size: int, argument: str = "model", stages: Sequence[str] = ()
) -> Foreign:
    """`torchvision:NAME`, any of its classifiers as it is, with submodules for stages. Raises UserError: an unknown
    name, or what Foreign does."""
    import torchvision.models  # here, because it is slow to import

    prefix = "torchvision:"
    known = torchvision.models.list_models(module=torchvision.models)
    plain = check_name(argument, name, [prefix + each for each in known]).removeprefix(prefix)
    model = Foreign(
        name, torchvision.models.get_model(plain, weights=None, num_classes=num_classes), image_size, argument, stages
    )
    model.published = plain
    return model


# Between which of torchvision's `features` the stages lie; what follows the last belongs to the embedding.
CUTS = {"mobilenet_v2": (0, 2, 4, 7, 14, 18), "efficientnet_b0": (0, 2, 3, 4, 6, 8)}


class ImageNetFeatures(Network):
    """mobilenet_v2 and efficientnet_b0: the last map of each resolution, all of them linear, signed.

    For 3x224x224 the maps have sides 112, 56, 28, 14 and 7 and 16, 24, 32, 96, 320 (MobileNetV2) or 16, 24,
    40, 112, 320 (EfficientNet-B0) channels. The last 1x1 convolution and the dropout belong to the embedding.
    """

    def __init__(self, name: str, num_classes: int):
        from torchvision.models import get_model  # here, because torchvision is slow to import

        super().__init__()
        source = get_model(name, weights=None, num_classes=num_classes)
        self.features, self.classifier = source.features, source.classifier
        dropout, _ = self.classifier
        embed = nn.Sequential(self.features[CUTS[name][-1] :], GlobalAveragePool(), dropout)
        self.set_stages([self.features[start:end] for start, end in pairwise(CUTS[name])], embed, first=2)
        self.published = name

    @property
    def fc(self) -> nn.Linear:
        return self.classifier[1]
