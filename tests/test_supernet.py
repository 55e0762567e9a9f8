"""The supernet: every path is the student of its spec, none is dead, branches fit their teacher."""

import pytest
import torch

from common import UserError
from models import create_model
from models.branches import feature_transform, graft
from models.network import block_shapes, run_blocks
from models.pool import Pool, PoolNet
from models.supernet import Draw, Supernet, input_shape

NARROW = {"stem": 4, "widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 2], "head": 8}


def supernet(pool: Pool) -> Supernet:
    torch.manual_seed(0)
    return Supernet(pool, 5)


@pytest.mark.parametrize("seed", range(8))  # eight rotations: every candidate in every layer
def test_a_path_computes_what_the_student_of_its_spec_computes(seed):
    pool = Pool(**NARROW)
    net, choice = supernet(pool), []
    for layer in range(6):
        names = pool.choices(layer)
        choice.append(names[(seed + layer) % len(names)])
    student = PoolNet(pool.spec(choice), 5)
    student.stem.load_state_dict(net.stem.state_dict())
    student.head.load_state_dict(net.head.state_dict())
    student.fc.load_state_dict(net.fc.state_dict())
    for mine, layer, name in zip(student.layers, net.layers, choice, strict=True):
        mine.operation.load_state_dict(layer.candidates[name].state_dict())
    images = torch.randn(4, 3, 16, 16)
    draws = [Draw(layer.names.index(name)) for layer, name in zip(net.layers, choice, strict=True)]
    assert torch.equal(net(images, draws), student(images))  # training mode: batch statistics
    assert torch.equal(net.eval()(images, draws), student.eval()(images))


@pytest.mark.parametrize("training", [True, False])
def test_no_candidate_choice_gives_dead_logits(training):
    pool = Pool(**NARROW)
    net = supernet(pool).train(training)
    images = torch.randn(4, 3, 16, 16)
    for layer in range(6):
        for index, name in enumerate(pool.choices(layer)):
            draws = [Draw(0)] * 6
            draws[layer] = Draw(index)
            logits = net(images, draws)
            assert (logits - logits[:1]).abs().max() > 1e-4, f"layer {layer}: {name}"
    for name in ("identity", "zero"):  # and where every layer that can is skipped
        draws = [Draw(n.index(name) if name in n else n.index("identity")) for n in map(pool.choices, range(6))]
        logits = net(images, draws)
        assert (logits - logits[:1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("source", "target", "kernels"),
    [
        ((16, 8), (32, 8), [(1, 1)]),
        ((16, 16), (32, 8), [(3, 3)]),
        ((16, 32), (32, 8), [(3, 3), (3, 3)]),
        ((16, 8), (32, 16), [(4, 4)]),
        ((16, 4), (32, 16), [(4, 4), (4, 4)]),
        ((16, 7), (32, 4), [(3, 3)]),
        ((16, 16), (16, 16), [(1, 1)]),
    ],
)
def test_transform_shapes_and_kernels(source, target, kernels):
    transform = feature_transform(source, target)
    out = transform(torch.randn(2, source[0], source[1], source[1]))
    assert out.shape == (2, target[0], target[1], target[1])
    assert [part.kernel_size for part in transform if hasattr(part, "kernel_size")] == kernels
    assert (out >= 0).all()
    kinds = [type(part) for part in transform]
    convolution = torch.nn.ConvTranspose2d if target[1] > source[1] else torch.nn.Conv2d
    assert kinds == [convolution, torch.nn.BatchNorm2d, torch.nn.ReLU] * len(kernels)
    assert all(part.stride == ((1, 1) if source[1] == target[1] else (2, 2)) for part in transform[::3])


@pytest.mark.parametrize(("source", "target"), [(12, 8), (8, 12), (16, 5), (3, 16)])
def test_transform_refuses_sizes_that_no_factor_of_2_connects(source, target):
    with pytest.raises(UserError, match=f"factor of 2 leads from the teacher's {source}x{source} .* {target}x{target}"):
        feature_transform((8, source), (8, target))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("teacher", ["resnet8", "wrn16_1"])
def test_branches_fit_teachers_at_every_size(teacher, size):
    pool, model = Pool(**NARROW), create_model(teacher, 5)
    shapes = block_shapes(model, size)
    branches = graft(shapes, pool, 5, size)
    assert [len(branch.supernet.layers) for branch in branches] == [5, 3, 1]
    for index, (branch, (channels, side)) in enumerate(zip(branches, shapes, strict=True), start=1):
        feature = torch.randn(2, channels, side, side)
        wanted = input_shape(pool, index, size)
        assert branch.transform(feature).shape[1:] == (wanted[0], wanted[1], wanted[1])
        assert branch(feature, [Draw(0)] * len(branch.supernet.layers)).shape == (2, 5)


def test_the_papers_pool_meets_resnet32_where_it_should():
    assert [input_shape(Pool(), block, 32) for block in (1, 2, 3)] == [(64, 32), (64, 32), (256, 8)]
    assert block_shapes(create_model("resnet32", 100), 32) == [(16, 32), (16, 32), (32, 16)]


def test_partition_must_have_as_many_blocks_as_the_teacher():
    with pytest.raises(UserError, match="partition"):
        graft([(16, 16)] * 3, Pool(**NARROW, partition=[3, 3]), 5, 16)


def copy_path(net: Supernet, student: PoolNet, choice: list[str]) -> None:
    """Give the last len(choice) layers of a student, and its classifier, the supernet's weights."""
    student.head.load_state_dict(net.head.state_dict())
    student.fc.load_state_dict(net.fc.state_dict())
    for mine, layer, name in zip(student.layers[-len(choice) :], net.layers, choice, strict=True):
        mine.operation.load_state_dict(layer.candidates[name].state_dict())


@pytest.mark.parametrize("partition", [[], [3, 1, 0, 2]])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_supernet_that_starts_later_is_the_rest_of_the_student(first, partition):
    torch.manual_seed(first)
    pool = Pool(**NARROW, partition=partition)
    names = pool.sample(first)["layers"][1:-2]
    choice = [f"res{x['kernel']}x{x['depth']}" if x["type"] == "res" else x["type"] for x in names]
    skipped = sum(pool.blocks()[:first])
    net, student = Supernet(pool, 5, first), PoolNet(pool.spec(choice), 5)
    copy_path(net, student, choice[skipped:])
    maps, logits = run_blocks(student.eval(), torch.randn(3, 3, 16, 16))
    draws = [Draw(layer.names.index(name)) for layer, name in zip(net.layers, choice[skipped:], strict=True)]
    assert torch.equal(net.eval()(maps[first - 1], draws), logits)
    assert input_shape(pool, first, 16) == maps[first - 1].shape[1:3]


def test_gates_change_nothing_about_the_logits():
    pool = Pool(**NARROW)
    net, images = supernet(pool).eval(), torch.randn(2, 3, 16, 16)
    for seed in range(8):
        active = [(seed + layer) % len(pool.choices(layer)) for layer in range(6)]
        pairs = [(j, (j + 1) % len(layer.names)) for j, layer in zip(active, net.layers, strict=True)]
        if seed % 2:
            pairs = [pair[::-1] for pair in pairs]
        gates = [torch.tensor([float(j == a) for j in pair]) for a, pair in zip(active, pairs, strict=True)]
        gated = net(images, [Draw(a, pair, g) for a, pair, g in zip(active, pairs, gates, strict=True)])
        assert torch.equal(gated, net(images, [Draw(a) for a in active]))


@pytest.mark.parametrize("draws", [5, 7])
def test_a_path_must_have_one_draw_a_layer(draws):
    with pytest.raises(ValueError):
        supernet(Pool(**NARROW))(torch.randn(1, 3, 16, 16), [Draw(0)] * draws)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
def test_logits_depend_on_the_input_whatever_a_layer_does_beside_skipped_ones(training, shortcut):
    """Every candidate of every layer while the others skip where they can, else take their 1x1 convolution."""
    pool = Pool(**NARROW, shortcut=shortcut)
    net = supernet(pool).train(training)
    images = torch.randn(4, 3, 16, 16)
    skip = [n.index("zero") if "zero" in n else n.index("identity") for n in map(pool.choices, range(6))]
    for layer in range(6):
        for index, name in enumerate(pool.choices(layer)):
            draws = [Draw(index if place == layer else j) for place, j in enumerate(skip)]
            logits = net(images, draws)
            assert (logits - logits[:1]).abs().amax(1)[1:].min() > 1e-5, f"layer {layer}: {name}"


def test_sharing_branches_tie_their_weights_and_others_do_not():
    pool, shapes = Pool(**NARROW), [(16, 16), (16, 16), (32, 8)]
    shared, own = (graft(shapes, pool, 5, 16, share) for share in (True, False))
    ids = [[{id(p) for p in branch.supernet.parameters()} for branch in branches] for branches in (shared, own)]
    assert ids[0][2] < ids[0][1] < ids[0][0]
    assert not (ids[1][0] & ids[1][1] or ids[1][0] & ids[1][2] or ids[1][1] & ids[1][2])
    transforms = [{id(p) for p in branch.transform.parameters()} for branch in shared]
    assert not (transforms[0] & transforms[1] or transforms[1] & transforms[2] or transforms[0] & ids[0][0])
    assert [len(branch.supernet.layers) for branch in shared] == [len(branch.supernet.layers) for branch in own]
    for layers in zip(*(reversed(branch.supernet.layers) for branch in shared), strict=False):
        assert layers[0] is layers[1] is layers[2]
