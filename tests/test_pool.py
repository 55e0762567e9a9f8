"""The pool of students: its choices, its specs, and the paper's three students."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from itertools import product
from subprocess import CompletedProcess

import pytest
import torch

from common import UserError
from models import create_model
from models.branches import graft
from models.network import block_shapes, cost, macs
from models.pool import (
    NAS_STUDENTS,
    Pool,
    PoolLayer,
    PoolNet,
    _candidate,
    check_spec,
    even_blocks,
    pool_of,
)
from models.supernet import input_shape
from tests.runs import forked
from train_teacher import TeacherConfig, spec_of

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
    1: ["res3x2", "res3x6", "identity", "res3x6", "res5x6", "res5x6"],
    2: ["res3x4", "res3x6", "res5x2", "res5x2", "res5x6", "res5x6"],
    7: ["res3x6", "res5x2", "res3x6", "res3x4", "res3x2", "res3x6"],
    42: ["res3x4", "res5x6", "zero", "res3x6", "res5x6", "res3x6"],
    2**40: ["res3x4", "res3x4", "res5x4", "res3x6", "identity", "res5x2"],
}


@pytest.mark.parametrize(("seed", "pinned"), PINNED.items())
def test_a_seed_names_the_same_student_on_every_machine(seed, pinned):
    torch.manual_seed(seed + 1)  # the global generator has no say
    assert choice(Pool().sample(seed)) == pinned


def test_a_choice_is_a_hash_of_seed_and_layer():
    names = ["res3x2", "res3x4", "res3x6", "res5x2", "res5x4", "res5x6", "identity", "zero"]
    for seed in range(50):
        digests = [hashlib.sha256(f"pool/{seed}/{layer}".encode()).digest() for layer in range(6)]
        numbers = [int.from_bytes(digest[:8], "big") // 2 for digest in digests]
        offered = [7, 8, 8, 7, 7, 7]  # all but zero, which layers 2 and 3 offer as well
        expected = [names[number % count] for number, count in zip(numbers, offered, strict=True)]
        assert choice(Pool().sample(seed)) == expected


def test_sampling_is_uniform_over_choices():
    draws = 4000
    counts = [Counter(choices) for choices in zip(*(choice(Pool().sample(i)) for i in range(draws)), strict=True)]
    for layer, counter in enumerate(counts):
        options = len(Pool().choices(layer))
        assert len(counter) == options
        deviation = (draws * (1 / options) * (1 - 1 / options)) ** 0.5
        assert all(abs(times - draws / options) < 5 * deviation for times in counter.values())


def test_a_pool_of_given_students_offers_what_they_take():
    wide = Pool(stem=8, widths=[8, 8, 8, 16, 16, 32], strides=[1, 1, 1, 2, 1, 2], head=16)
    specs = {f"pool:{seed}": wide.sample(seed) for seed in (1, 5, 9)}
    pool = pool_of(specs)
    taken = [{_candidate(spec["layers"][layer + 1]) for spec in specs.values()} for layer in range(6)]
    assert [set(pool.choices(layer)) for layer in range(6)] == taken
    drawn = [Pool(**asdict(pool)).sample(seed) for seed in range(50)]  # as a teacher's model.json gives it back
    for spec in specs.values():
        assert pool.spec([_candidate(layer) for layer in spec["layers"][1:-2]]) == spec
    for spec in drawn:
        assert all(_candidate(layer) in names for layer, names in zip(spec["layers"][1:-2], taken, strict=True))
    assert pool_of({"alone": specs["pool:1"]}).sample(3) == specs["pool:1"]
    assert pool_of({"nas_m": NAS_STUDENTS["nas_m"]}).sample(0) == NAS_STUDENTS["nas_m"]


def test_students_of_different_pools_are_in_no_pool():
    other = Pool(widths=[64, 64, 64, 128, 256, 256])
    with pytest.raises(UserError, match=r"--pool_students b: is in no pool with a"):
        pool_of({"a": Pool().sample(0), "b": other.sample(0)})
    with pytest.raises(UserError, match=r"--pool_students nas_l: is in no pool with nas_s"):
        pool_of({name: NAS_STUDENTS[name] for name in ("nas_s", "nas_l")})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"strides": [1, 1]}, "pool.widths"),
        ({"strides": [1, 1, 1, 2, 2, 3]}, "pool.strides"),
        ({"stem": 0}, "pool.stem"),
        *(
            ({"stem_stride": stride}, f"pool.stem_stride {stride!r}: must be a power of 2")
            for stride in (0, 3, True, "4")
        ),
        ({"partition": [3, 2]}, "pool.partition"),
        ({"candidates": ["res3x3"]}, "even depth"),
        ({"candidates": ["res4x2"]}, "odd kernel"),
        ({"candidates": ["identty"]}, "identity"),
        ({"candidates": ["zero"]}, "besides 'zero'"),
        ({"candidates": ["identity", "identity"]}, "nothing twice"),
        ({"layers": [["identity"]]}, "pool.layers: 1 for the 6"),
        ({"layers": [["zero"]] + [["identity"]] * 5}, "layer 1: nothing of"),
        ({"layers": [["res3x3"]] + [["identity"]] * 5}, "pool.layers, layer 1: .* even depth"),
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
        (lambda spec: spec["layers"][2].update(kernel=-1), "layer 2 has kernel -1"),
        (lambda spec: spec["layers"][2].update(kernel=3.0), "layer 2 has kernel 3.0"),
        (lambda spec: spec["layers"][2].update(stride=True), "layer 2 has stride True"),
        (lambda spec: spec["layers"][2].update(shortcut=1), "layer 2 has shortcut 1"),
        (lambda spec: spec["layers"][0].update(kernel=7), "first conv"),
        (lambda spec: spec["layers"][0].update(stride=3), "first conv .* stride of 1, 2, 4"),
        (lambda spec: spec["layers"][-2].update(stride=2), "the last conv has kernel 1 and stride 1"),
        (lambda spec: spec["layers"][-2].update(kernel=3), "the last conv has kernel 1"),
        (lambda spec: spec.update(blocks=[2, 2.0]), "blocks"),
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


@pytest.mark.parametrize("name", TABLES)
def test_nas_students_follow_their_tables_at_64_pixels_too(name):
    model, sides = create_model(name, 10).eval(), []
    hooks = [layer.register_forward_hook(lambda _, __, out: sides.append(out.shape[1:])) for layer in model.layers]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    side, expected = 64, []
    for _, _, channels, _, stride, _ in TABLES[name]:
        side //= stride
        expected.append((channels, side, side))
    assert sides == expected and len(hooks) == len(expected)
    assert [m.kernel_size for m in (model.stem[0], model.head[0])] == [(3, 3), (1, 1)]
    assert (model.stem[0].stride, model.head[0].in_channels) == ((1, 1), expected[-1][0])


@pytest.mark.parametrize("name", TABLES)
def test_the_specs_of_nas_students_rebuild_them(name):
    again = PoolNet(json.loads(json.dumps(NAS_STUDENTS[name])), 10)
    shapes, wanted = ({n: t.shape for n, t in m.state_dict().items()} for m in (again, create_model(name, 10)))
    assert shapes == wanted


@pytest.mark.parametrize("shortcut", [True, False])
def test_zero_and_shortcuts_are_only_where_the_shape_is_kept(shortcut):
    pool = Pool(widths=[16, 16, 8, 8, 8], strides=[1, 2, 1, 1, 2], shortcut=shortcut)
    kept = [shortcut and same for same in (True, False, False, True, False)]
    assert ["zero" in pool.choices(layer) for layer in range(5)] == kept
    for seed in range(20):
        layers = pool.sample(seed)["layers"][1:-2]
        assert [layer["shortcut"] for layer in layers] == kept
        assert all(layer["type"] != "zero" or keeps for layer, keeps in zip(layers, kept, strict=True))


def test_a_partition_decides_where_a_student_is_cut():
    spec = Pool(widths=[4] * 6, stem=4, head=4, partition=[3, 1, 0, 2]).sample(0)
    assert spec["blocks"] == [3, 1, 0, 2]
    assert [len(stage) for stage in PoolNet(spec, 2).stages] == [4, 1, 0, 2]  # the stem goes with the first


def test_a_layer_with_a_shortcut_adds_its_input():
    kept = {"type": "identity", "in": 3, "out": 3, "stride": 1}
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(PoolLayer(kept | {"shortcut": True})(x), 2 * x)
    assert torch.equal(PoolLayer(kept | {"shortcut": False})(x), x)
    assert torch.equal(PoolLayer(kept | {"type": "zero", "shortcut": True})(x), x)


@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("change", [{"in": 7}, {"stride": 3}, {"out": 0}, {"type": "conv"}, {"shortcut": 1, "out": 9}])
def test_a_broken_layer_is_named(place, change):
    with pytest.raises(UserError, match=f"spec: layer {place} "):
        check_spec(broken(lambda spec: spec["layers"][place].update(change)))


@pytest.mark.parametrize("change", [{"out": 10**9}, {"kernel": 10**9 + 1}, {"depth": 10**9}])
def test_sizes_that_nobody_means_are_refused_before_anything_is_made(change):
    with pytest.raises(UserError, match=r"spec: layer 2 has .* from 1 to "):
        check_spec(broken(lambda spec: spec["layers"][2].update(change)))
    wide = {"candidates": ["res3x1000000000"]} if "depth" in change else {"candidates": ["res9999x2"]}
    for pool in ({"widths": [10**9, 1, 1], "strides": [1, 1, 1]}, {"stem": 10**9}, {"stem_stride": 2**30}, wide):
        with pytest.raises(UserError, match=f"pool.*{next(iter(pool))}"):
            Pool(**pool).check()


@pytest.mark.parametrize(("place", "change"), [(-2, {"in": 7}), (-1, {"in": 7}), (-2, {"out": 7})])
def test_a_head_that_does_not_fit_is_refused(place, change):
    with pytest.raises(UserError, match="last conv and the linear"):
        check_spec(broken(lambda spec: spec["layers"][place].update(change)))


@pytest.mark.parametrize("blocks", [[4], [5, -1], [1, 1, 1], [], "4", None])
def test_blocks_that_do_not_fit_are_refused(blocks):
    with pytest.raises(UserError, match="spec: "):
        check_spec(broken(lambda spec: spec.update(blocks=blocks)))


@pytest.mark.parametrize("content", ["", "{", "null", "3", '"layers"', "{}", '{"spec": null}'])
def test_files_that_hold_no_spec_are_refused(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError):
        create_model(str(tmp_path / "mine.json"), 10, argument="--student")


def test_a_spec_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--student .*nowhere\.json: cannot read"):
        create_model(str(tmp_path / "nowhere.json"), 10, argument="--student")


TINY = {"stem": 4, "widths": [4, 4, 8], "strides": [1, 1, 2], "head": 8, "partition": [1, 0, 1, 1]}


@pytest.mark.parametrize(
    ("size", "stride"), [(8, 1), (32, 1), (64, 1), (65, 2), (128, 2), (160, 4), (224, 4), (299, 8)]
)
def test_the_stem_leaves_maps_of_64_at_most(size, stride):
    pool = Pool(**TINY)
    assert pool.for_images(size).stem_stride == stride and pool.stem_stride is None
    assert Pool(**TINY, stem_stride=2).for_images(size).stem_stride == 2
    model, side = create_model("pool:3", 5, pool, image_size=size).eval(), -(-size // stride)
    assert model.stem(torch.randn(1, 3, size, size)).shape == (1, 4, side, side) and side <= 64
    assert input_shape(pool, 1, size) == (4, side)
    assert [module.kernel_size for module in model.stem if hasattr(module, "kernel_size")] == [
        (3, 3), *[3] * (stride // 4 if stride < 8 else 2)]  # fmt: skip
    assert block_shapes(model, size) == [input_shape(pool, block, size) for block in (1, 2, 3)]


def test_stems_differ_in_no_parameter():
    names, drawn = set(), []
    for size in (32, 64, 128, 224):
        torch.manual_seed(5)
        model = create_model("pool:3", 5, Pool(**TINY), image_size=size)
        names.add(tuple(model.state_dict()))
        drawn.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert len(names) == 1 and all(torch.equal(drawn[0], other) for other in drawn)
    assert create_model("pool:3", 5, Pool(**TINY), image_size=64).stem[0].stride == (1, 1)


def test_multiply_accumulates_at_224_pixels_are_those_counted_by_hand():
    spec = Pool(**TINY).for_images(224).spec(["res3x2", "zero", "identity"])
    model = PoolNet(json.loads(json.dumps(spec)), 10).eval()
    stem = 112**2 * 27 * 4  # its convolution has stride 2
    layers = 2 * 56**2 * 9 * 4 * 4 + 28**2 * 4 * 8  # two 3x3 convolutions, and a strided 1x1 convolution
    assert cost(model, 224)[1] == 2 * (stem + layers + 28**2 * 8 * 8 + 8 * 10)
    assert pool_of({"it": spec}).stem_stride == 4 and pool_of({"it": spec}).sample(0) == spec


def test_branches_of_efficientnet_at_224_pixels_take_its_maps():
    with torch.device("meta"):
        teacher = create_model("efficientnet_b0", 200, image_size=224)
        shapes, pool = block_shapes(teacher, 224), Pool()
        assert shapes == [(24, 56), (40, 28), (112, 14)]
        assert [input_shape(pool, block, 224) for block in (1, 2, 3)] == [(64, 56), (64, 56), (256, 14)]
        means = {}
        for stride in (1, None):
            branches = graft(shapes, Pool(stem_stride=stride), 200, 224)
            even = [[[1 / len(layer.names)] * len(layer.names) for layer in each.supernet.layers] for each in branches]
            means[stride] = sum(b.macs(at, row) for b, at, row in zip(branches, shapes, even, strict=True))
        assert [part.kernel_size for each in branches for part in each.transform[::3]] == [(1, 1), (4, 4), (1, 1)]
    assert means[None] * 15 < means[1] and means[None] < 7e9
    assert 0.38e9 < macs(teacher, torch.zeros(1, 3, 224, 224, device="meta"))[0] < 0.39e9


def test_a_layer_in_which_all_students_have_zero_costs_nothing():
    pool = Pool(stem=4, head=8, widths=[4, 4, 8], strides=[1, 1, 2], candidates=["identity", "zero"], partition=[1, 2])
    pool.layers = [["identity"], ["zero"], ["identity"]]
    (branch,) = graft([(4, 8)], pool, 10, 8)
    transform = branch.macs((4, 8), [[1.0], [1.0]]) - (4**2 * (4 * 8 + 8 * 8) + 8 * 10)
    assert transform == macs(branch.transform, torch.zeros(1, 4, 8, 8))[0]


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        ({"image_size": 224}, 4),
        ({"image_size": 32}, 1),
        ({"image_size": 96}, 2),
        ({"image_size": 224, "pool": Pool(stem_stride=2)}, 2),
    ],
)
def test_students_that_a_pool_is_made_of_have_the_stem_of_the_data_set(options, stride):
    assert spec_of("pool:1", TeacherConfig(**options), options["image_size"])["layers"][0]["stride"] == stride


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def test_members_by_size_are_uniform_over_sizes_and_then_over_members():
    """Against all members of a small pool, enumerated, counted and binned by hand."""
    pool = Pool(stem=4, widths=[4, 4, 8], strides=[1, 1, 2], head=4, sampling="sizes",
                candidates=["res3x2", "res3x4", "res5x2", "identity", "zero"])  # fmt: skip
    members = list(product(*(pool.choices(layer) for layer in range(3))))
    sizes = {member: parameters(PoolNet(pool.spec(list(member)), 2)) for member in members}
    low, span = min(sizes.values()), max(sizes.values()) - min(sizes.values())
    # Sizes are counted in 1024 steps, rounded layer by layer: each member's bin is that of its rounded size.
    unit, costs = max(1, span / 1024), pool.candidate_parameters()
    rounded = {
        member: sum(
            round((row[pool.choices(layer).index(name)] - min(row)) / unit)
            for layer, (row, name) in enumerate(zip(costs, member, strict=True))
        )
        for member in members
    }
    assert all(abs(rounded[member] * unit - (sizes[member] - low)) <= 1.5 * unit for member in members)
    bins = {member: rounded[member] * 32 // (max(rounded.values()) + 1) for member in members}
    full = Counter(bins.values())
    draws = 4000
    seen = Counter(tuple(choice(pool.sample(seed))) for seed in range(draws))
    expected = [draws / len(full) / full[bins[member]] for member in members]
    assert len(members) == 100  # 99 degrees of freedom: chance exceeds 160 once in 10,000 times
    assert chi_square([seen[member] for member in members], expected) < 160


@pytest.mark.parametrize("sampling", ["choices", "sizes"])
def test_sizes_of_the_papers_pool_are_even_only_when_asked_for(sampling):
    pool, draws, bins = Pool(sampling=sampling), 800, 8
    costs = pool.candidate_parameters()
    low, high = (sum(pick(row) for row in costs) for pick in (min, max))
    counts = [0] * bins
    for seed in range(draws):
        numbers = [pool.choices(layer).index(name) for layer, name in enumerate(choice(pool.sample(seed)))]
        size = sum(row[number] for row, number in zip(costs, numbers, strict=True))
        counts[min(bins - 1, (size - low) * bins // (high - low))] += 1
    far = chi_square(counts, [draws / bins] * bins)
    # 7 degrees of freedom: chance exceeds 30 once in 10,000 times. (Bins at the ends hold empty 32nds or not.)
    assert far < 30 if sampling == "sizes" else far > 300


PINNED_BY_SIZE = [
    ["res3x6", "res5x4", "identity", "identity", "res5x2", "res5x4"],
    ["res3x6", "res5x2", "res3x6", "res5x2", "res3x2", "identity"],
]


def test_a_member_by_size_is_the_same_on_every_machine():
    pool = Pool(sampling="sizes")
    assert [choice(pool.sample(seed)) for seed in (0, 7)] == PINNED_BY_SIZE
    with pytest.raises(UserError, match="unknown name 'size'"):
        Pool(sampling="size").check()


def test_nas_students_are_no_members_of_the_pool():
    layers = {name: len(spec["layers"]) - 3 for name, spec in NAS_STUDENTS.items()}
    assert layers == {"nas_s": 4, "nas_m": 7, "nas_l": 10} and len(Pool().widths) == 6
    assert max(layer["out"] for layer in NAS_STUDENTS["nas_s"]["layers"][:-2]) < 512
    sizes = [parameters(create_model(name, 100)) for name in NAS_STUDENTS]
    assert sizes == [1_655_476, 7_017_140, 19_322_292] and parameters(create_model("resnet32", 100)) == 472_756


def list_members(*arguments: str) -> CompletedProcess:
    return forked("-m", "models.pool", *arguments)


def test_the_listing_of_members(tmp_path):
    pool = {"stem": 4, "head": 8, "widths": [4, 4, 8], "strides": [1, 1, 2], "candidates": ["res3x2", "res3x4", "zero"]}
    (tmp_path / "model.json").write_text(json.dumps({"name": "resnet8", "pool": pool}))
    limit = 2000
    options = ("--image_size", "8", "--num_classes", "5", "--max_params", limit)
    done = list_members("--pool", tmp_path / "model.json", "--count", "4", *options)
    header, *rows, footer = done.stdout.splitlines()
    assert "stems of stride 1;" in footer
    assert header.split() == ["student", "parameters", "MFLOPs", "latency", "layers"] and "images of 8x8" in footer
    sizes = {seed: parameters(create_model(f"pool:{seed}", 5, Pool(**pool))) for seed in range(30)}
    fits = [seed for seed in sizes if sizes[seed] <= limit][:4]
    assert 0 < fits[-1] - fits[0] != 3  # some were left out
    assert [(row.split()[0], int(row.split()[1].replace(",", ""))) for row in rows] == [
        (f"pool:{seed}", sizes[seed]) for seed in fits
    ]
    assert all(row.split()[4] == "ms" and float(row.split()[3]) > 0 for row in rows)
    assert [row.split()[5:] for row in rows] == [choice(Pool(**pool).sample(seed)) for seed in fits]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_params", "1000"), "error: --max_params 1,000: the smallest member has 961,460 parameters"),
        (("--count", "0"), "count 0: must be a whole number of at least 1"),
        (("--pool", "README.md"), "error: --pool README.md: holds no pool"),
    ],
)
def test_mistakes_in_listing_members(arguments, message):
    done = list_members(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_spec_that_leads_to_itself_is_named_in_words(tmp_path):
    (tmp_path / "spec.json").symlink_to(tmp_path / "spec.json")
    with pytest.raises(UserError) as caught:
        create_model(str(tmp_path / "spec.json"), 10, argument="--student")
    assert str(caught.value).endswith("spec.json: cannot read the spec file (Too many levels of symbolic links)")
