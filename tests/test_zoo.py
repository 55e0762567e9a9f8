"""The zoo against published figures: parameters, multiply-accumulates, feature maps, and the cuts of SFTN."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, relu

from common import UserError
from models import activation_checkpointing, create_model, list_models
from models.branches import feature_transform
from models.network import block_shapes, run_blocks
from tests.runs import forked, succeeded

# name: (parameters at 100 classes, million multiply-accumulates at 32x32, the feature maps, the embedding).
# The counts are those of the field's CIFAR-100 benchmarks; DenseNets as in their paper's Table 2 (1.0 M, 7.0 M).
SMALL = {
    "resnet8": (83_892, 12.5, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet14": (181_108, 26.7, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet20": (278_324, 40.8, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet32": (472_756, 69.1, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet44": (667_188, 97.4, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet56": (861_620, 125.8, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet110": (1_736_564, 253.2, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "resnet8x2": (315_764, 44.5, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "resnet14x2": (703_732, 101.1, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "resnet20x2": (1_091_700, 157.7, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "resnet32x2": (1_867_636, 271.0, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "resnet8x4": (1_233_540, 177.1, "32x32x32 64x32x32 128x16x16 256x8x8", 256),
    "resnet32x4": (7_433_860, 1083.0, "32x32x32 64x32x32 128x16x16 256x8x8", 256),
    "resnet18": (11_220_132, 555.5, "64x32x32 64x32x32 128x16x16 256x8x8 512x4x4", 512),
    "resnet34": (21_328_292, 1159.4, "64x32x32 64x32x32 128x16x16 256x8x8 512x4x4", 512),
    "resnet50": (23_705_252, 1298.0, "64x32x32 256x32x32 512x16x16 1024x8x8 2048x4x4", 2048),
    "wrn10_1": (83_700, 12.5, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "wrn10_2": (315_316, 44.5, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "wrn16_1": (180_916, 26.7, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "wrn16_2": (703_284, 101.1, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "wrn16_4": (2_772_020, 392.6, "16x32x32 64x32x32 128x16x16 256x8x8", 256),
    "wrn28_2": (1_479_220, 214.4, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "wrn28_4": (5_872_180, 845.6, "16x32x32 64x32x32 128x16x16 256x8x8", 256),
    "wrn28_10": (36_536_884, 5243.4, "16x32x32 160x32x32 320x16x16 640x8x8", 640),
    "wrn40_1": (569_780, 83.3, "16x32x32 16x32x32 32x16x16 64x8x8", 64),
    "wrn40_2": (2_255_156, 327.6, "16x32x32 32x32x32 64x16x16 128x8x8", 128),
    "wrn40_4": (8_972_340, 1298.6, "16x32x32 64x32x32 128x16x16 256x8x8", 256),
    "vgg8": (3_965_028, 96.2, "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4", 512),
    "vgg11": (9_277_284, 209.4, "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4", 512),
    "vgg13": (9_462_180, 284.9, "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4", 512),
    "vgg16": (14_774_436, 398.2, "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4", 512),
    "vgg19": (20_086_692, 511.4, "64x32x32 128x16x16 256x8x8 512x4x4 512x4x4", 512),
    "mobilenetv2": (812_836, 6.5, "16x16x16 12x16x16 16x8x8 48x4x4 160x2x2", 1280),
    "shufflenetv1": (949_258, 38.7, "24x32x32 240x16x16 480x8x8 960x4x4", 960),
    "shufflenetv2": (1_355_528, 44.5, "24x32x32 116x16x16 232x8x8 464x4x4", 1024),
    "densenet40_12": (1_060_132, None, "16x32x32 160x32x32 304x16x16 448x8x8", 448),
    "densenet100_12": (7_084_852, None, "16x32x32 400x32x32 784x16x16 1168x8x8", 1168),
    "densenetbc40_12": (188_092, None, "24x32x32 96x32x32 120x16x16 132x8x8", 132),
    "densenetbc100_12": (800_032, None, "24x32x32 216x32x32 300x16x16 342x8x8", 342),
}
# Parameters at 1000 classes and maps at 224x224, as torchvision publishes them.
LARGE = {
    "resnet18": (11_689_512, "64x112x112 64x56x56 128x28x28 256x14x14 512x7x7", 512),
    "resnet34": (21_797_672, "64x112x112 64x56x56 128x28x28 256x14x14 512x7x7", 512),
    "resnet50": (25_557_032, "64x112x112 256x56x56 512x28x28 1024x14x14 2048x7x7", 2048),
    "resnet101": (44_549_160, "64x112x112 256x56x56 512x28x28 1024x14x14 2048x7x7", 2048),
    "resnet152": (60_192_808, "64x112x112 256x56x56 512x28x28 1024x14x14 2048x7x7", 2048),
    "mobilenet_v2": (3_504_872, "16x112x112 24x56x56 32x28x28 96x14x14 320x7x7", 1280),
    "efficientnet_b0": (5_288_548, "16x112x112 24x56x56 40x28x28 112x14x14 320x7x7", 1280),
    "shufflenet_v2": (2_278_604, "24x112x112 116x28x28 232x14x14 464x7x7", 1024),
}


def wrn(depth: int, width: int) -> int:
    """Parameters of WRN-depth-width at 100 classes, by arithmetic: convolutions and 2 a BatchNorm channel."""
    blocks, channels, total = (depth - 4) // 6, 16, 3 * 16 * 9
    for out in (16 * width, 32 * width, 64 * width):
        for index in range(blocks):
            inside = channels if index == 0 else out
            total += 2 * inside + 9 * inside * out + 2 * out + 9 * out * out
            total += inside * out if index == 0 and (out != 16 or inside != out) else 0
        channels = out
    return total + 2 * channels + 100 * channels + 100


def densenet(depth: int, growth: int) -> int:
    """The same for a plain DenseNet."""
    channels, total = 16, 3 * 16 * 9
    for block in range(3):
        for _ in range((depth - 4) // 3):
            total += 2 * channels + 9 * channels * growth
            channels += growth
        total += (2 * channels + channels * channels) if block < 2 else 2 * channels
    return total + 100 * channels + 100


# conv + BatchNorm = in * out * k * k + 2 * out, summed over the rows of the GTN supplement's Tables 1 to 3.
COUNTED = {"nas_s": 1_655_476, "nas_m": 7_017_140, "nas_l": 19_322_292}
WRNS = [(16, k) for k in (3, 6, 8, 11)] + [(28, k) for k in (1, 3, 5, 6, 7, 8)]
WRNS += [(depth, 2) for depth in (52, 64, 76, 88, 100, 154, 250)]
COUNTED |= {f"wrn{depth}_{width}": wrn(depth, width) for depth, width in WRNS}
COUNTED |= {f"densenet{depth}_{growth}": densenet(depth, growth) for depth, growth in ((40, 24), (40, 48), (100, 24))}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes_of(model: nn.Module, size: int, features=True) -> tuple[str, tuple[int, ...]]:
    _, maps, embedding = model(torch.zeros(2, 3, size, size), features=features)
    return " ".join("x".join(map(str, each.shape[1:])) for each in maps), tuple(embedding.shape)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_have_the_published_size_and_maps(name):
    count, _, maps, width = SMALL[name]
    with torch.device("meta"):
        model = create_model(name, 100)
        assert parameters(model) == count
        assert shapes_of(model, 32) == shapes_of(model, 32, "preact") == (maps, (2, width))


@pytest.mark.parametrize("name", LARGE)
def test_imagenet_networks_have_the_published_size_and_maps(name):
    count, maps, width = LARGE[name]
    with torch.device("meta"):
        model = create_model(name, 1000, image_size=224)
        assert parameters(model) == count
        assert shapes_of(model, 224) == shapes_of(model, 224, "preact") == (maps, (2, width))


@pytest.mark.parametrize("name", COUNTED)
def test_other_sizes_follow_from_arithmetic(name):
    with torch.device("meta"):
        assert parameters(create_model(name, 100)) == COUNTED[name]


def test_the_table_shows_every_listed_network_as_published():
    done = succeeded(forked("-m", "models"))
    header, *rows = (line.split() for line in done.stdout.splitlines())
    assert header == ["name", "parameters", "MFLOPs", "image", "block", "outputs"]
    found = {(row[0], row[3]): row for row in rows}
    assert {name for name, _ in found} == set(list_models())
    assert set(list_models()) <= set(SMALL) | set(LARGE) | set(COUNTED)
    for name, (count, macs, maps, _) in SMALL.items():
        if row := found.get((name, "32")):
            assert row[1] == f"{count:,}" and row[4:] == maps.split()[-4:]
            # Twice the published multiply-accumulates, which are rounded to 0.1.
            assert macs is None or float(row[2].replace(",", "")) == pytest.approx(2 * macs, abs=0.11)
    assert found["resnet50", "224"][1] == "25,557,032"


FAMILIES = ["resnet8x4", "wrn10_2", "vgg8", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2", "densenet10_12",
            "densenetbc10_12", "resnet18", "resnet50", "nas_s", "nas_m", "pool:3"]  # fmt: skip
IMAGENET = ["resnet50", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2"]


@pytest.mark.parametrize(("name", "size"), [(name, 32) for name in FAMILIES] + [(name, 96) for name in IMAGENET])
def test_features_and_blocks_follow_the_contract(name, size):
    torch.manual_seed(0)
    model, images = create_model(name, 7, image_size=size).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits, maps, embedding = model(images, features=True)
        assert torch.equal(model(images), logits) and logits.shape == (2, 7)
        assert torch.equal(model.fc(embedding), logits)
        outputs, last = run_blocks(model, images)
        assert len(model.blocks) == 4 and torch.equal(last, logits)
        assert all(torch.equal(a, b) for a, b in zip(outputs, maps[-4:-1], strict=True))
        assert block_shapes(model, size) == [(each.shape[1], each.shape[2]) for each in outputs]


NORMALISED = ("wrn", "densenet")  # the pre-activations are the next BatchNorm of the maps, but for the stem's


@pytest.mark.parametrize(
    ("name", "size"), [(name, 32) for name in FAMILIES] + [(name, 96) for name in IMAGENET], ids=str
)
def test_a_relu_of_the_preactivations_is_the_map(name, size):
    torch.manual_seed(0)
    model, images = create_model(name, 7, image_size=size), torch.randn(2, 3, size, size)
    model(images)  # BatchNorm statistics that are not the initial ones
    model.eval()
    with torch.no_grad():
        logits, maps, embedding = model(images, features=True)
        again, preact, same = model(images, features="preact")
        both = model(images, features="both")
    for found, expected in zip(both, (logits, maps, preact, embedding), strict=True):
        pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    assert torch.allclose(again, logits, atol=1e-5) and torch.allclose(same, embedding, atol=1e-5)
    if not name.startswith(NORMALISED):
        for before, after in zip(preact, maps, strict=True):
            rectified = relu(before) if before.min() < 0 <= after.min() else before
            assert torch.allclose(rectified, after, atol=1e-6)
        return
    next_of = {
        "wrn": ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
        "den": ["transition1.0", "transition2.0", "bn1"],
    }
    assert torch.equal(preact[0], maps[0])
    for before, after, norm in zip(preact[1:], maps[1:], next_of[name[:3]], strict=True):
        assert torch.allclose(before, model.get_submodule(norm)(after), atol=1e-5) and before.min() < 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_batch_norm_runs_once_whatever_is_asked_for(name):
    torch.manual_seed(0)
    state, images, seen = create_model(name, 7).state_dict(), torch.randn(2, 3, 16, 16), []
    for features in (False, True, "both", "preact"):
        model = create_model(name, 7)
        model.load_state_dict(state)
        model(images, features=features)
        seen.append({key: value for key, value in model.state_dict().items() if "running" in key or "tracked" in key})
    for other in seen[1:]:
        assert all(torch.allclose(seen[0][key].float(), other[key].float(), atol=1e-6) for key in seen[0])
    assert {int(value) for key, value in seen[3].items() if "tracked" in key} == {1}


def test_the_cut_is_that_of_sftn():
    """SFTN (arXiv 2102.07650), Tables 10 to 12: VGG13 with branches of VGG8; every transform is a 1x1 convolution."""
    teacher, student = create_model("vgg13", 100).eval(), create_model("vgg8", 100).eval()
    sides, student_sides = block_shapes(teacher, 32), block_shapes(student, 32)
    assert sides == student_sides == [(128, 16), (256, 8), (512, 4)]
    assert [len([m for m in block.modules() if isinstance(m, nn.Conv2d)]) for block in teacher.blocks] == [4, 2, 2, 2]
    assert [len([m for m in block.modules() if isinstance(m, nn.Conv2d)]) for block in student.blocks] == [2, 1, 1, 1]
    maps, _ = run_blocks(teacher, torch.randn(2, 3, 32, 32))
    inside: list[tuple[int, ...]] = []
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output: inside.append((*inputs[0].shape[1:], *output.shape[1:]))
            )
    # What each branch's convolutions take and give, rows Conv2d-40 to Conv2d-47 of Table 12.
    rows = [(128, 8, 8, 256, 8, 8), (256, 4, 4, 512, 4, 4), (512, 4, 4, 512, 4, 4)]
    for branch, (source, target) in enumerate(zip(sides, student_sides, strict=True), start=1):
        transform = feature_transform(source, target).eval()
        assert [(m.kernel_size, m.stride) for m in transform if isinstance(m, nn.Conv2d)] == [((1, 1), (1, 1))]
        x = transform(maps[branch - 1])
        inside.clear()
        for block in student.blocks[branch:]:
            x = block(x)
        assert inside == rows[branch - 1 :] and x.shape == (2, 100)


@pytest.mark.parametrize("name", ["wrn16_2", "densenet10_12", "densenetbc10_12"])
@pytest.mark.parametrize("features", [True, "preact"])
def test_recomputing_changes_no_gradient_and_no_statistic(name, features, monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 5
    state, results = create_model(name, 5).double().state_dict(), []
    for deep in (1000, 1):
        monkeypatch.setattr(activation_checkpointing, "DEEP", deep)
        model = create_model(name, 5).double()
        model.load_state_dict(state)
        logits, maps, _ = model(images, features=features)
        (cross_entropy(logits, labels) + sum(each.square().mean() for each in maps)).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append(gradients | {key: value.double() for key, value in model.named_buffers()})
    kept, recomputed = results
    assert all(torch.allclose(kept[key], recomputed[key], rtol=1e-9, atol=1e-12) for key in kept)
    assert recomputed["bn1.num_batches_tracked"] == 1


def saved_bytes(name: str) -> int:
    """What autograd keeps of a forward pass of 64 images, counted without computing it: each storage once."""
    with FakeTensorMode() as mode:
        model, images = create_model(name, 100), torch.zeros(64, 3, 32, 32)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), images)}
        kept: dict[int, object] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no later storage takes its place
            return tensor

        with mode, saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(images)
        assert logits.requires_grad
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("name", "limit"), [("densenet100_12", 1.0), ("wrn250_2", 1.0)])
def test_deep_networks_keep_little_at_batch_64(name, limit, monkeypatch):
    assert saved_bytes(name) < limit * 1e9
    if name == "wrn250_2":  # the same count finds what they would keep otherwise
        monkeypatch.setattr(activation_checkpointing, "DEEP", 1000)
        assert saved_bytes(name) > 2e9


@pytest.mark.parametrize("name", ["wrn17_2", "wrn4_2", "densenet41_12", "densenet4_12", "densenetbc13_12", "wrn16_0"])
def test_depths_that_a_family_does_not_have_are_refused(name):
    with pytest.raises(UserError, match=f"--student {name}: .*(depth is \\dn \\+ 4|width 1 or more)"):
        create_model(name, 10, argument="--student")
