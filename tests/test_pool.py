"""The pool of students: its choices, its specs, and the paper's three students."""

import json
from collections import Counter

import pytest
import torch

from common import UserError
from models import create_model
from models.pool import NAS_STUDENTS, Pool, PoolNet, check_spec, even_blocks

# (type, in, out, kernel, stride) of every row of the GTN supplement's Tables 1, 2 and 3, and of each ResBlock
# the number in its "(xn)".
TABLES = {
    "nas_s": [
        ("identity", 16, 16, None, 1, 0),
        ("res", 16, 64, 3, 1, 1),
        ("res", 64, 128, 3, 2, 1),
        ("res", 128, 256, 3, 2, 1),
    ],
    "nas_m": [
        ("identity", 16, 16, None, 1, 0),
        ("res", 16, 64, 3, 1, 2),
        ("res", 64, 64, 3, 1, 1),
        ("identity", 64, 64, None, 1, 0),
        ("res", 64, 128, 5, 2, 2),
        ("res", 128, 256, 3, 2, 1),
        ("res", 256, 512, 3, 2, 1),
    ],
    "nas_l": [
        ("identity", 16, 16, None, 1, 0),
        ("res", 16, 64, 3, 1, 2),
        ("identity", 64, 64, None, 1, 0),
        ("res", 64, 64, 3, 1, 3),
        ("identity", 64, 128, None, 1, 0),
        ("res", 128, 128, 3, 2, 3),
        ("identity", 128, 128, None, 1, 0),
        ("res", 128, 128, 3, 1, 3),
        ("res", 128, 256, 3, 2, 3),
        ("res", 256, 512, 3, 2, 3),
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_nas_students_are_those_of_the_tables(name):
    model, x = create_model(name, 100), torch.randn(2, 3, 32, 32)
    x = model.stem(x)
    assert x.shape == (2, 16, 32, 32)
    for layer, (kind, channels_in, channels_out, kernel, stride, blocks) in zip(
        model.layers, TABLES[name], strict=True
    ):
        assert x.shape[1] == channels_in
        side = x.shape[2] // stride
        x = layer(x)
        assert x.shape == (2, channels_out, side, side)
        kernels = [c.kernel_size[0] for n, c in layer.named_modules() if n.endswith(("conv1", "conv2"))]
        assert kernels == [kernel] * 2 * blocks if kind == "res" else not kernels
    assert model.head(x).shape == (2, 1280)
    assert model.fc.weight.shape == (100, 1280)


def test_the_papers_pool_offers_zero_only_where_a_shortcut_keeps_the_signal():
    pool = Pool()
    assert [len(pool.choices(layer)) for layer in range(6)] == [7, 8, 8, 7, 7, 7]
    assert all("zero" not in pool.choices(layer) for layer in (0, 3, 4, 5))
    assert all("zero" not in Pool(shortcut=False).choices(layer) for layer in range(6))
    assert pool.blocks() == [1, 2, 2, 1]


def test_even_blocks_sum_up_and_differ_by_one_at_most():
    for layers in range(4, 30):
        sizes = even_blocks(layers)
        assert sum(sizes) == layers and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_a_spec_survives_json_and_rebuilds_the_same_network(seed):
    spec = Pool().sample(seed)
    again = json.loads(json.dumps(spec))
    assert again == spec
    first, second = PoolNet(spec, 10).eval(), PoolNet(again, 10).eval()
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(images), second(images))


def choice(spec: dict) -> list[str]:
    return [f"{x['type']}{x.get('kernel', '')}x{x.get('depth', '')}".rstrip("x") for x in spec["layers"][1:-2]]


PINNED = {
    0: ["identity", "res3x6", "res5x6", "res3x6", "res3x4", "res5x4"],
    7: ["res3x6", "res5x2", "res3x6", "res3x4", "res3x2", "res3x6"],
}


def test_a_seed_names_the_same_student_on_every_machine():
    assert choice(Pool().sample(7)) == PINNED[7]
    assert choice(Pool().sample(0)) == PINNED[0]


def test_sampling_is_uniform_over_choices():
    draws = 4000
    counts = [Counter(choices) for choices in zip(*(choice(Pool().sample(i)) for i in range(draws)), strict=True)]
    for layer, counter in enumerate(counts):
        options = len(Pool().choices(layer))
        assert len(counter) == options
        deviation = (draws * (1 / options) * (1 - 1 / options)) ** 0.5
        assert all(abs(times - draws / options) < 5 * deviation for times in counter.values())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"strides": [1, 1]}, "pool.widths"),
        ({"strides": [1, 1, 1, 2, 2, 3]}, "pool.strides"),
        ({"stem": 0}, "pool.stem"),
        ({"partition": [3, 2]}, "pool.partition"),
        ({"candidates": ["res3x3"]}, "even depth"),
        ({"candidates": ["res4x2"]}, "odd kernel"),
        ({"candidates": ["identty"]}, "identity"),
        ({"candidates": ["zero"]}, "besides 'zero'"),
        ({"candidates": ["identity", "identity"]}, "nothing twice"),
    ],
)
def test_pools_that_make_no_sense_are_refused(fields, named):
    with pytest.raises(UserError, match=named):
        Pool(**fields).check()


def broken(change) -> dict:
    spec = json.loads(json.dumps(NAS_STUDENTS["nas_s"]))
    change(spec)
    return spec


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda spec: spec["layers"].pop(), "layers must be"),
        (lambda spec: spec["layers"][2].update({"in": 32}), "layer 2"),
        (lambda spec: spec["layers"][3].update({"type": "ress"}), "did you mean res"),
        (lambda spec: spec["layers"][3].update({"kernel": 4}), "layer 3"),
        (lambda spec: spec["layers"][3].update({"shortcut": True}), "layer 3"),
        (lambda spec: spec["layers"][1].update({"type": "zero"}), "layer 1"),
        (lambda spec: spec["layers"][2].pop("stride"), "stride"),
        (lambda spec: spec.update(blocks=[1, 1]), "blocks"),
        (lambda spec: spec.pop("blocks"), "blocks"),
        (lambda spec: spec.update(layers=3), "spec"),
    ],
)
def test_specs_that_cannot_be_built_are_refused_with_the_place(change, named):
    with pytest.raises(UserError, match=named):
        check_spec(broken(change))


def test_a_spec_file_is_a_student(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(Pool().sample(3)))
    assert create_model(str(file), 10).state_dict().keys() == create_model("pool:3", 10).state_dict().keys()
    file.write_text("[]")
    with pytest.raises(UserError, match="spec"):
        create_model(str(file), 10)
