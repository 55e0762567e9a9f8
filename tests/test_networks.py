"""Every family of networks against a second one, in plain functions, written from the papers' definitions.

The weights follow a formula, so that nothing is left to chance: what a network computes of them is its fingerprint.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.branches import feature_transform
from models.network import Network
from models.pool import NAS_STUDENTS, Pool, PoolNet
from models.supernet import Draw, Supernet


class Plain:
    """Layers by the names of their tensors, in evaluation."""

    def __init__(self, module: nn.Module):
        self.weights = module.state_dict()

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance, gain, shift = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return gain * (x - mean) / torch.sqrt(variance + 1e-5) + shift

    def conv_norm(self, conv: str, norm: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        return self.norm(norm, self.conv(conv, x, stride, groups))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


WAVE = torch.sin(0.1 * torch.arange(1, 4099, dtype=torch.float64).square())


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    """The module in float64, every tensor a wave of sines, convolutions at a scale that keeps signals alive."""
    with torch.device("meta"):  # nothing is drawn that would be written over
        module = build().double().eval()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, tensor) in enumerate(module.state_dict().items()):
            wave = WAVE.roll(number).repeat(-(-tensor.numel() // len(WAVE)))[: tensor.numel()].view(tensor.shape)
            if tensor.ndim > 1:
                tensor.copy_(wave * math.sqrt(4 / tensor[0].numel()))
            else:
                tensor.copy_(0.3 * wave + float(name.endswith(("running_var", ".weight"))))
    return module


def images(size: int) -> Tensor:
    return torch.sin(1.7 * torch.arange(3 * size * size, dtype=torch.float64).square()).view(1, 3, size, size)


def average(x: Tensor) -> Tensor:
    return x.mean((2, 3))


Found = tuple[list[Tensor], Tensor]  # feature maps, logits


# --- ResNets: He et al. (2016), section 3 and 4.2 -------------------------------------------------------------------


def shortcut(net: Plain, name: str, x: Tensor, y: Tensor, stride: int) -> Tensor:
    """Identity where the shape stays, else a 1x1 projection with BatchNorm."""
    if stride == 1 and x.shape[1] == y.shape[1]:
        return x
    return net.conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)


def basic_block(net: Plain, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(net.conv_norm(f"{name}.conv1", f"{name}.bn1", x, stride))
    y = net.conv_norm(f"{name}.conv2", f"{name}.bn2", y)
    return F.relu(y + shortcut(net, name, x, y, stride))


def bottleneck(net: Plain, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(net.conv_norm(f"{name}.conv1", f"{name}.bn1", x))
    y = F.relu(net.conv_norm(f"{name}.conv2", f"{name}.bn2", y, stride))
    y = net.conv_norm(f"{name}.conv3", f"{name}.bn3", y)
    return F.relu(y + shortcut(net, name, x, y, stride))


def resnet(net: Plain, x: Tensor, depths: tuple[int, ...], block=basic_block) -> Found:
    """Stages after the first halve the map; above images of 64 the stem is 7x7 and max-pooled (Table 1)."""
    large = x.shape[-1] > 64
    x = F.relu(net.conv_norm("conv1", "bn1", x, 2 if large else 1))
    maps = [x]
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for stage, depth in enumerate(depths, start=1):
        for number in range(depth):
            x = block(net, f"layer{stage}.{number}", x, 2 if number == 0 and stage > 1 else 1)
        maps.append(x)
    return maps, net.linear("fc", average(x))


# --- Zagoruyko and Komodakis (2016), Table 1 and figure 1; Huang et al. (2017), section 3 ---------------------------


def wide_resnet(net: Plain, x: Tensor, blocks: int) -> Found:
    x = net.conv("conv1", x)
    maps = [x]
    for stage in (1, 2, 3):
        for number in range(blocks):
            name, stride = f"block{stage}.layer.{number}", 2 if stage > 1 and number == 0 else 1
            active = F.relu(net.norm(f"{name}.bn1", x))
            y = net.conv(f"{name}.conv1", active, stride)
            y = net.conv(f"{name}.conv2", F.relu(net.norm(f"{name}.bn2", y)))
            same = stride == 1 and x.shape[1] == y.shape[1]
            x = y + (x if same else net.conv(f"{name}.convShortcut", active, stride))
        maps.append(x)
    return maps, net.linear("fc", average(F.relu(net.norm("bn1", x))))


def densenet(net: Plain, x: Tensor, layers: int, bottlenecks: bool) -> Found:
    x = net.conv("conv1", x)
    maps = [x]
    for block in (1, 2, 3):
        for number in range(layers):
            name = f"block{block}.{number}"
            y = net.conv(f"{name}.2", F.relu(net.norm(f"{name}.0", x)))
            if bottlenecks:
                y = net.conv(f"{name}.5", F.relu(net.norm(f"{name}.3", y)))
            x = torch.cat([x, y], 1)
        maps.append(x)
        if block < 3:
            x = net.conv(f"transition{block}.2", F.relu(net.norm(f"transition{block}.0", x)))
            x = F.avg_pool2d(x, 2)
    return maps, net.linear("fc", average(F.relu(net.norm("bn1", x))))


# --- Simonyan and Zisserman (2015), Table 1; Sandler et al. (2018), Table 2 -----------------------------------------


def vgg(net: Plain, x: Tensor, layers: tuple[int, ...]) -> Found:
    """Max-pooling between blocks; before the last only from maps of 8x8 on, as in the field's CIFAR-100 code."""
    maps = []
    for block, count in enumerate(layers):
        if 0 < block < 4 or (block == 4 and x.shape[-1] >= 8):
            x = F.max_pool2d(x, 2)
        for number in range(count):
            name = f"block{block}.{3 * number}"
            assert f"{name}.bias" in net.weights  # the paper's convolutions have one
            x = F.relu(net.conv_norm(name, f"block{block}.{3 * number + 1}", x))
        maps.append(x)
    return maps, net.linear("classifier", average(x))


def mobilenet(net: Plain, x: Tensor) -> Found:
    """Half of Table 2's widths; its second row keeps the size."""
    x = F.relu(net.conv_norm("conv1.0", "conv1.1", x, 2))
    maps = [x]
    for row, (units, stride) in enumerate(((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))):
        for unit in range(units):
            name, step = f"layers.{row}.{unit}.conv", stride if unit == 0 else 1
            y = F.relu(net.conv_norm(f"{name}.0", f"{name}.1", x))
            y = F.relu(net.conv_norm(f"{name}.3", f"{name}.4", y, step, groups=y.shape[1]))
            y = net.conv_norm(f"{name}.6", f"{name}.7", y)
            x = x + y if step == 1 and x.shape == y.shape else y
        maps += [x] if row in (1, 2, 4, 6) else []
    return maps, net.linear("classifier.0", average(F.relu(net.conv_norm("conv2.0", "conv2.1", x))))


# --- Zhang et al. (2018), figure 2 and Table 1; Ma et al. (2018), figure 3 and Table 5 ------------------------------


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channel c of group g goes to place c * groups + g."""
    width = x.shape[1] // groups
    return x[:, [g * width + c for c in range(width) for g in range(groups)]]


def shufflenet_v1(net: Plain, x: Tensor) -> Found:
    x = F.relu(net.conv_norm("conv1", "bn1", x))
    maps = [x]
    for stage, units in ((1, 4), (2, 8), (3, 4)):
        for unit in range(units):
            name, groups, stride = f"layer{stage}.{unit}", 1 if (stage, unit) == (1, 0) else 3, 1 if unit else 2
            y = shuffled(F.relu(net.conv_norm(f"{name}.conv1", f"{name}.bn1", x, groups=groups)), groups)
            y = F.relu(net.conv_norm(f"{name}.conv2", f"{name}.bn2", y, stride, groups=y.shape[1]))
            y = net.conv_norm(f"{name}.conv3", f"{name}.bn3", y, groups=3)
            x = F.relu(x + y) if unit else F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
        maps.append(x)
    return maps, net.linear("linear", average(x))


def shufflenet_v2(net: Plain, x: Tensor) -> Found:
    large = x.shape[-1] > 64  # as for ImageNet; the small form's stem is 1x1
    x = F.relu(net.conv_norm("conv1.0", "conv1.1", x, 2 if large else 1))
    maps = [x]
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for stage, units in ((2, 4), (3, 8), (4, 4)):
        for unit in range(units):
            name, stride = f"stage{stage}.{unit}", 1 if unit else 2
            kept, y = x.chunk(2, 1) if unit else (x, x)
            if not unit:
                kept = net.conv_norm(f"{name}.branch1.0", f"{name}.branch1.1", kept, 2, groups=kept.shape[1])
                kept = F.relu(net.conv_norm(f"{name}.branch1.2", f"{name}.branch1.3", kept))
            y = F.relu(net.conv_norm(f"{name}.branch2.0", f"{name}.branch2.1", y))
            y = net.conv_norm(f"{name}.branch2.3", f"{name}.branch2.4", y, stride, groups=y.shape[1])
            y = F.relu(net.conv_norm(f"{name}.branch2.5", f"{name}.branch2.6", y))
            x = shuffled(torch.cat([kept, y], 1), 2)
        maps.append(x)
    return maps, net.linear("fc", average(F.relu(net.conv_norm("conv5.0", "conv5.1", x))))


# --- Students of a pool and the supernet: Binici et al. (arXiv 2407.16040), supplement, section 1 -------------------


def candidate(net: Plain, name: str, kind: str, x: Tensor, stride: int, width: int) -> Tensor | float:
    same = stride == 1 and x.shape[1] == width
    if kind == "zero":
        return 0.0
    if kind == "identity":
        return x if same else net.conv_norm(f"{name}.0", f"{name}.1", x, stride)
    kernel, depth = map(int, kind.removeprefix("res").split("x"))
    assert net.weights[f"{name}.0.conv1.weight"].shape[-2:] == (kernel, kernel)
    for block in range(depth // 2):
        x = basic_block(net, f"{name}.{block}", x, stride if block == 0 else 1)
    return x


def student(net: Plain, x: Tensor, layers: list[tuple[str, str, int, int]], added: bool = True) -> Tensor:
    """Logits; a layer is (the name of its tensors, kind, stride, width), `added` to x where the shape stays."""
    x = F.relu(net.conv_norm("stem.0", "stem.1", x))
    for name, kind, stride, width in layers:
        same = stride == 1 and x.shape[1] == width
        y = candidate(net, name, kind, x, stride, width)
        x = x + y if added and same else y
    return net.linear("fc", average(F.relu(net.conv_norm("head.0", "head.1", x))))


# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "resnet8": lambda net, x: resnet(net, x, (1, 1, 1)),
    "resnet14": lambda net, x: resnet(net, x, (2, 2, 2)),
    "resnet8x4": lambda net, x: resnet(net, x, (1, 1, 1)),
    "wrn16_2": lambda net, x: wide_resnet(net, x, 2),
    "densenet10_12": lambda net, x: densenet(net, x, 2, False),
    "densenetbc16_12": lambda net, x: densenet(net, x, 2, True),
    "vgg8": lambda net, x: vgg(net, x, (1, 1, 1, 1, 1)),
    "vgg13": lambda net, x: vgg(net, x, (2, 2, 2, 2, 2)),
    "mobilenetv2": mobilenet,
    "shufflenetv1": shufflenet_v1,
    "shufflenetv2": shufflenet_v2,
    "shufflenet_v2": shufflenet_v2,
    "resnet18": lambda net, x: resnet(net, x, (2, 2, 2, 2)),
    "resnet50": lambda net, x: resnet(net, x, (3, 4, 6, 3), bottleneck),
}
SIZES = {"shufflenet_v2": (96,), "vgg13": (32,), "resnet18": (32, 96), "resnet50": (32, 64)}


def alike(found: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all() and expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in FAMILIES for size in SIZES.get(name, (32, 64))])
def test_logits_and_maps_are_those_of_the_papers_definition(name, size):
    model = filled(lambda: create_model(name, 7, image_size=size))
    with torch.no_grad():
        maps, logits = FAMILIES[name](Plain(model), images(size))
        found, seen, _ = model(images(size), features=True)
    for mine, theirs in zip([*seen, found], [*maps, logits], strict=True):
        alike(mine, theirs)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_networks_for_imagenet_are_torchvisions(name):
    from torchvision.models import get_model

    ours = filled(lambda: create_model(name, 7, image_size=96))
    theirs = get_model(name, weights=None, num_classes=7)
    theirs.double().eval().load_state_dict(ours.state_dict())
    with torch.no_grad():
        alike(ours(images(96)), theirs(images(96)))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["nas_s", "nas_m"])
def test_the_papers_students(name, size):
    """Their tables' layers, none of them added to its input."""
    rows = [
        (f"res{layer['kernel']}x{layer['depth']}" if layer["type"] == "res" else layer["type"], layer)
        for layer in NAS_STUDENTS[name]["layers"][1:-2]
    ]
    layers = [(f"layers.{i}.operation", kind, row["stride"], row["out"]) for i, (kind, row) in enumerate(rows)]
    model = filled(lambda: create_model(name, 7))
    with torch.no_grad():
        alike(model(images(size)), student(Plain(model), images(size), layers, added=False))


POOL = Pool(stem=4, widths=[4, 4, 6, 6, 8, 8], strides=[1, 1, 1, 1, 2, 2], head=8)
PATHS = [
    ("res3x2", "zero", "identity", "res5x4", "res3x6", "identity"),
    ("identity", "res5x2", "res3x4", "zero", "identity", "res5x6"),
    ("zero", "identity", "res5x2", "identity", "res5x4", "res3x2"),
]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_a_path_and_the_student_cut_out_of_it(path, size):
    """In a layer that keeps its shape identity gives 2x and zero x: what is drawn is added to the input."""
    supernet = filled(lambda: Supernet(POOL, 7))
    places = zip(path, POOL.strides, POOL.widths, strict=True)
    layers = [(f"layers.{i}.candidates.{kind}", kind, stride, width) for i, (kind, stride, width) in enumerate(places)]
    draws = [Draw(layer.names.index(kind)) for layer, kind in zip(supernet.layers, path, strict=True)]
    cut = PoolNet(POOL.spec(list(path)), 7).double().eval()
    renamed = {name: next((f"{at}{name.removeprefix(f'layers.{i}.operation')}" for i, (at, *_) in enumerate(layers)
                           if name.startswith(f"layers.{i}.")), name) for name in cut.state_dict()}  # fmt: skip
    cut.load_state_dict({name: supernet.state_dict()[source] for name, source in renamed.items()})
    with torch.no_grad():
        expected = student(Plain(supernet), images(size), layers)
        alike(supernet(images(size), draws), expected)
        alike(cut(images(size)), expected)


@pytest.mark.parametrize(("side", "target"), [(8, 8), (16, 8), (16, 4), (8, 16)])
def test_a_branchs_transform(side, target):
    """Park et al. (2021), section 3.1: 3x3 with stride 2 down, transposed 4x4 with stride 2 up, 1x1 to stay."""
    transform = filled(lambda: feature_transform((3, side), (5, target)))
    net, x = Plain(transform), images(side)
    steps = round(abs(math.log2(side / target))) or 1
    for step in range(steps):
        name = str(3 * step)
        if target > side:
            x = F.conv_transpose2d(x, net.weights[f"{name}.weight"], stride=2, padding=1)
        else:
            x = net.conv(name, x, 2 if target < side else 1)
        x = F.relu(net.norm(str(3 * step + 1), x))
    with torch.no_grad():
        alike(transform(images(side)), x)


# --- What networks start from ---------------------------------------------------------------------------------------

ZERO_BIAS = ("wrn", "densenet", "vgg")  # of the classifier


def expected_deviation(family: str, module: nn.Module) -> float:
    """He et al. (2015), equation 14, by fan-out, for convolutions; PyTorch's default for classifiers, VGG's 0.01."""
    if isinstance(module, nn.Linear):
        return 0.01 if family == "vgg" else 1 / math.sqrt(3 * module.in_features)
    return math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.weight.shape[0]))


@pytest.mark.parametrize(
    "name", ["resnet8x4", "wrn16_4", "densenet10_24", "densenetbc16_24", "vgg8", "mobilenetv2", "shufflenetv1",
             "shufflenetv2", "resnet18", "nas_s"],
)  # fmt: skip
def test_initial_weights_have_the_deviation_of_their_kind(name):
    torch.manual_seed(0)
    check_initial(create_model(name, 300), name.rstrip("0123456789_x").removesuffix("bc"))


def test_initial_weights_of_supernets_and_transforms():
    torch.manual_seed(0)
    check_initial(Supernet(Pool(widths=[32, 32, 64, 64, 64, 96]), 300), "supernet")
    check_initial(feature_transform((64, 8), (48, 16)), "transform")


def check_initial(network: Network | nn.Module, family: str) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert (module.running_var == 1).all() and not module.running_mean.any()
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            continue
        count, scaled = module.weight.numel(), module.weight.detach() / expected_deviation(family, module)
        linear = isinstance(module, nn.Linear)
        assert abs(scaled.std().item() - 1) < 5 / math.sqrt(2 * count) and abs(scaled.mean()) < 5 / math.sqrt(count)
        if count > 1000:  # normal, not uniform: values beyond what a uniform distribution of that deviation has
            assert (scaled.abs().max() > 2) == (not linear or family == "vgg")
        if module.bias is not None:
            deviation = 0.0 if not linear or family in ZERO_BIAS else 1 / math.sqrt(3 * module.in_features)
            assert module.bias.std().item() == pytest.approx(deviation, rel=0.25)
