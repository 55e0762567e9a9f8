"""The supernet: every path is the student of its spec, none is dead, branches fit their teacher."""

import pytest
import torch

from common import UserError
from models import create_model
from models.branches import feature_transform, graft
from models.network import block_shapes
from models.pool import Pool, PoolNet
from models.supernet import Draw, Supernet, input_shape

NARROW = {"stem": 4, "widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 2], "head": 8}


def supernet(pool: Pool) -> Supernet:
    torch.manual_seed(0)
    return Supernet(pool, 5)


@pytest.mark.parametrize("seed", range(4))
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
    ],
)
def test_transform_shapes_and_kernels(source, target, kernels):
    transform = feature_transform(source, target)
    out = transform(torch.randn(2, source[0], source[1], source[1]))
    assert out.shape == (2, target[0], target[1], target[1])
    assert [part.kernel_size for part in transform if hasattr(part, "kernel_size")] == kernels
    assert (out >= 0).all()  # BatchNorm and ReLU end every step


def test_transform_refuses_sizes_that_no_factor_of_2_connects():
    with pytest.raises(UserError, match="factor of 2"):
        feature_transform((8, 12), (8, 8))


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
