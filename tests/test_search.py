"""search.py: sums are members' true costs, a profile predicts latencies it has not seen, scores need their statistics,
and what is chosen keeps to its budget."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import yaml
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from benchmarks import chosen as chosen_benchmark
from benchmarks import ranking as ranking_benchmark
from common import UserError
from data.datasets import load_images
from data.pipeline import Pipeline
from exporters.onnx import OPSET, load_onnx
from kernels import cross_entropy
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from models.network import cost
from models.pool import Pool, PoolLayer, PoolNet
from models.pool.specs import read_spec
from models.supernet import Draw, Supernet
from reports.subject import ImageOptions
from searching import device
from searching.blocks import write_folder, write_whole
from searching.budget import check_possible, parse_budget, parse_budgets
from searching.choice import Field, choose
from searching.members import Members, block_name, blocks
from searching.pareto import front
from searching.pareto import rows as pareto_rows
from searching.paths import complete, estimate_statistics, judge, load_supernet
from searching.profile import Profile, read_profile
from searching.ranking import Ranking, by_chance, draw_paths, predict, rank_correlation
from searching.scoring import batches, score_pool
from tests.runs import ROOT, TINY_GTN, Fork, forked, here, read_json, succeeded

NARROW = {"stem": 8, "widths": [16, 16, 16, 32, 64, 64], "head": 128}
FOUR = ["res3x2", "res3x4", "identity", "zero"]
POOL = Pool(**NARROW, candidates=FOUR, stem_stride=1)
WORDS = ["--pool.stem", "8", "--pool.widths", *["16", "16", "16", "32", "64", "64"], "--pool.head", "128"]
WORDS += ["--pool.candidates", *FOUR]


def straight(items, total, name):
    return iter(items)


@pytest.fixture(scope="module")
def members() -> Members:
    return Members(POOL)


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """A teacher that is no GTN run; its accuracy does not matter."""
    folder = tmp_path_factory.mktemp("search") / "vanilla"
    torch.manual_seed(0)
    info = ModelInfo("resnet8", "digits", 10, 16, [0.5] * 3, [0.25] * 3)
    save_pretrained(create_model("resnet8", 10), info, folder)
    return folder


@pytest.fixture(scope="module")
def generic(tmp_path_factory):
    """A GTN teacher with its supernet, barely trained."""
    folder = tmp_path_factory.mktemp("search") / "generic"
    words = ["--save_supernet", "--share_branches", "--val_fraction", "0.2", "--output_dir", folder]
    succeeded(forked("train_teacher.py", *TINY_GTN, *words))
    return folder


def digits(size: int):
    """(pipeline, training split, test images, labels)."""
    data = load_images("digits", size)
    pipeline = Pipeline(data, ImageOptions(), torch.device("cpu"))
    images, labels = zip(*pipeline.evaluation(data.test, 500), strict=True)
    return pipeline, data.train, torch.cat(images), torch.cat(labels)


def made_up(members: Members, overhead: tuple[float, float], noise: float = 0.0, size: int = 16) -> dict:
    """A profile whose blocks take what their place in the list says, and members the sum, an overhead and noise."""
    ms = {name: 0.1 + 0.01 * place for place, (name, *_) in enumerate(blocks(members.pool, 10, size))}
    random, whole = np.random.default_rng(0), {}
    for number, member in enumerate(random.choice(len(members), 40, replace=False).tolist()):
        whole[f"member{number}"] = members.choice(member)
        names = ["stem", "head", *(block_name(i, each) for i, each in enumerate(whole[f"member{number}"]))]
        there = [ms[name] for name in names if name in ms]
        exact = sum(there) + overhead[0] + overhead[1] * len(there)
        ms[f"member{number}"] = exact * (1 + noise * random.standard_normal())
    content = {"device": "a device", "onnxruntime": "1.0", "threads": 1, "opset": OPSET, "image_size": size}
    content |= {"num_classes": 10, "pool": json.loads(json.dumps(members.pool.__dict__)), "weights": "random"}
    content |= {"members": whole, "ms": ms}
    return content | {"passes": {name: [time, 1.02 * time] for name, time in ms.items()}}


@pytest.mark.parametrize(
    "pool",
    [
        POOL,
        Pool(**NARROW, shortcut=False, stem_stride=4),
        Pool(**NARROW, identity="plain", candidates=FOUR, stem_stride=2),
    ],
)
def test_sums_are_what_the_built_members_have(pool):
    members = Members(pool)
    sizes = members.sizes(7, 17)
    assert all(len(values) == len(members) for values in sizes.values())
    for member in np.random.default_rng(1).choice(len(members), 12, replace=False).tolist():
        choice = members.choice(member)
        assert members.number(choice) == member
        with torch.device("meta"):
            parameters, flops, _ = cost(PoolNet(pool.spec(choice), 7).eval(), 17)
        assert (sizes["params"][member], sizes["macs"][member]) == (parameters, flops / 2)


def test_the_papers_pool_is_enumerated_and_a_vast_one_refused():
    assert len(Members(Pool(stem_stride=1))) == 153_664
    with pytest.raises(UserError, match=r"its pool has 6.9e\+10 members"):
        Members(Pool(widths=[16] * 12, strides=[1] * 12, stem=16, stem_stride=1))


def test_blocks_in_order_are_the_member(members):
    choice = ["res3x4", "zero", "identity", "res3x2", "identity", "res3x4"]
    torch.manual_seed(0)
    network, parts = PoolNet(POOL.spec(choice), 10), {name: module for name, module, _ in blocks(POOL, 10, 16)}
    parts["stem"].load_state_dict(network.stem.state_dict())
    parts["head"][0].load_state_dict(network.head.state_dict())
    parts["head"][1].load_state_dict(network.fc.state_dict())
    x = images = torch.randn(3, 3, 16, 16)
    for i, name in enumerate(choice):
        if (block := parts.get(block_name(i, name))) is not None:
            block.load_state_dict(network.layers[i].state_dict())
    for name in ["stem", *(block_name(i, each) for i, each in enumerate(choice)), "head"]:
        x = parts[name](x) if name in parts else x
    assert torch.equal(x, network(images))


def test_weights_are_as_unlike_as_a_students_and_the_folder_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr("searching.blocks.WHOLE", 1)
    deep = {"stem": 8, "widths": [16, 16, 64], "strides": [1, 1, 2], "head": 32, "candidates": ["res3x16", "res5x2"]}
    members = Members(pool := Pool(**deep, stem_stride=1))
    write_folder(tmp_path, members, 10, 16, 0, straight)
    content = read_json(tmp_path / "blocks.json")
    for name, shape in content["shapes"].items():
        logits = load_onnx(tmp_path / f"{name}.onnx", 1)(torch.randn(2, *shape))
        assert logits.isfinite().all() and logits.abs().mean() > 1e-3, name
        assert (tmp_path / f"{name}.onnx").stat().st_size < 60_000
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        values = [onnx.numpy_helper.to_array(each).ravel() for each in graph.initializer]
        weights = [each for each in values if each.dtype == np.float32 and len(each) > 1]
        assert all(each.std() > 1e-3 for each in weights)
        assert len({each[:2].tobytes() for each in weights}) == len(weights)
        assert not {"BatchNormalization", "ConstantOfShape"} & {node.op_type for node in graph.node}
        if name in content["members"]:
            write_whole(pool.spec(content["members"][name]), 10, 16, tmp_path / "student.onnx")
            student = onnx.load(tmp_path / "student.onnx").graph
            assert [node.op_type for node in student.node] == [node.op_type for node in graph.node]
            assert [each.dims for each in student.initializer] == [each.dims for each in graph.initializer]
    assert (largest := 4 * 64 * 64 * 25) <= (tmp_path / "noise.bin").stat().st_size < largest + 2**20


@pytest.mark.parametrize("words", [["--write_blocks", "blocks"], ["--budgets", "1ms", "--output_dir", "search"]])
def test_a_pool_that_cannot_be_exported_is_one_line_before_anything_is_measured(vanilla, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "measure", None)
    wide = [*WORDS, "--pool.widths", *["4096"] * 6, "--pool.candidates", "res9x2", "zero"]
    before = PoolLayer.forward
    unlike = {"its largest member has 1": wide, "layer1.res3x2: the network cannot be written (Unsupp": WORDS}
    for message, pool in unlike.items():
        done = here("search.py", "--teacher", vanilla, *pool, *words)
        assert done.returncode == 2 and f"--pool: {message}" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.rglob("*.*"))
        monkeypatch.setattr(PoolLayer, "forward", lambda self, x: torch.special.bessel_j0(before(self, x)))


def test_blocks_that_a_kill_left_unfinished_are_no_obstacle(vanilla, tmp_path):
    words = ["search.py", "--teacher", vanilla, *WORDS, "--write_blocks", tmp_path / "blocks"]
    killed = Fork(*words)
    while killed.poll() is None and not list(tmp_path.glob("**/*.onnx")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9 and not (tmp_path / "blocks").exists()
    (tmp_path / "blocks").mkdir()
    succeeded(here(*words))
    described = read_json(tmp_path / "blocks/blocks.json")
    names = {*(f"{name}.onnx" for name in described["shapes"]), "blocks.json", "noise.bin", "profile_device.py"}
    assert {path.name for path in tmp_path.glob("blocks/*")} == names and len(list(tmp_path.iterdir())) == 1
    again = here(*words)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_a_profile_recovers_the_overhead_and_predicts_members_that_it_was_not_fitted_on(members):
    profile = Profile(made_up(members, (0.3, -0.04)), members)
    np.testing.assert_allclose(profile.overhead, [0.3, -0.04], atol=1e-9)
    assert profile.trusted and profile.worst_error < 1e-9 and profile.repeats == pytest.approx((0.02, 0.02))
    noisy = Profile(made_up(members, (0.3, -0.04), noise=0.3), members)
    assert not noisy.trusted and "not to be trusted here" in noisy.lines()[-1]
    assert noisy.median_error > 0.05 and noisy.spearman < 0.95


def test_this_device_is_profiled_without_our_code_and_the_sum_ranks_whole_members(tmp_path, members):
    """The standalone script alone, in a folder of its own; the machine may be busy, so the bound is loose."""
    write_folder(tmp_path / "blocks", members, 10, 16, 0, straight)
    words = [sys.executable, "-I", tmp_path / "blocks/profile_device.py", "--seconds", "0.02"]
    done = subprocess.run(
        [*map(str, words), "--output", str(tmp_path / "p.json")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "written: " in done.stdout, done.stderr
    profile = read_profile(tmp_path / "p.json", members, 10, 16)
    assert (profile.content["device"], profile.content["onnxruntime"]) == device.here()
    assert profile.spearman > 0.9 and profile.median_error < 0.15
    imported = {
        line.split()[1] for line in (ROOT / "searching/device.py").read_text().splitlines() if line[:7] == "import "
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


GRAVITON = """processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd evtstrm
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1
"""


def test_processors_without_a_name_are_told_apart(monkeypatch):
    """Texts of /proc/cpuinfo: of ARM servers, of a board and of a PC."""

    def name(text: str, node: str = "a") -> str:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        monkeypatch.setattr(platform, "node", lambda: node)
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        return device.device_name()

    assert name(GRAVITON).startswith("aarch64, implementer 0x41, part 0xd0c, variant 0x3, computer ")
    cores = GRAVITON + GRAVITON.replace("0xd0c", "0xd05")
    changed = [
        GRAVITON.replace("0xd0c", "0xd40"),
        GRAVITON.replace("0x3", "0x1"),
        GRAVITON.replace("0x41", "0x61"),
        cores,
    ]
    assert len({name(GRAVITON), name(GRAVITON, "b"), *map(name, changed)}) == 6 and "0xd0c/0xd05" in name(cores)
    assert name(GRAVITON) == name(GRAVITON)
    assert name(GRAVITON + "Model\t\t: Raspberry Pi 4 Model B\n") == "Raspberry Pi 4 Model B"
    assert name("model\t: 1\nmodel name\t: AMD EPYC\n" * 2) == name("model name\t: AMD EPYC\n", "b") == "AMD EPYC"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 17}, "is of opset 17, not 18"),
        ({"image_size": 8}, "is of image_size 8, not 16"),
        ({"pool": {}}, "is of another pool, not the teacher's"),
        ({"threads": 2}, "is of threads 2, not 1"),
        ({"ms": {"stem": 1.0}}, "its times are not those"),
        ({"passes": {}}, "its times are not those"),
        ({"members": []}, "its times are not those"),
        ({"weights": "alike"}, "is of files whose weights were all alike, .* measure again"),
        ({"device": None}, "does not name its device"),
        ({"onnxruntime": 1}, "does not name its device"),
        ({"device": "another"}, None),
    ],
)
def test_a_profile_of_something_else_is_one_line(tmp_path, members, change, message):
    (tmp_path / "p.json").write_text(json.dumps(made_up(members, (0, 0)) | change))
    if message is None:
        assert read_profile(tmp_path / "p.json", members, 10, 16)
        return
    with pytest.raises(UserError, match=f"--profile .*p.json: {message}"):
        read_profile(tmp_path / "p.json", members, 10, 16)


def test_a_profile_that_was_edited_is_one_line(tmp_path, members):
    """A block that is missing would cost nothing, and the best members would be made of it."""
    (tmp_path / "p.json").write_text(json.dumps(made_up(members, (0, 0))))
    for edit in (
        lambda content: content["ms"].pop("layer2.res3x2"),
        lambda content: content["ms"].update({"layer2.res3x2": content["ms"]["layer2.res3x2"] / 2}),
        lambda content: content["passes"].update(head=[1e-300, 1e300]),
    ):
        content = made_up(members, (0, 0))
        edit(content)
        (tmp_path / "p.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="its times are not those of this pool's blocks"):
            read_profile(tmp_path / "p.json", members, 10, 16)
    alike = dict.fromkeys(content["ms"], 1.0)
    content |= {"ms": alike, "passes": {name: [1.0, 1.0] for name in alike}}
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert read_profile(tmp_path / "p.json", members, 10, 16).spearman == 0.0  # and no number that JSON has not


def test_a_pool_of_one_member_has_no_profile(tmp_path):
    alone = Members(Pool(candidates=("res3x2",)).for_images(16))
    with pytest.raises(UserError, match="--pool: has a single member"):
        write_folder(tmp_path / "blocks", alone, 10, 16, 0, straight)
    assert not (tmp_path / "blocks").exists()


@pytest.mark.parametrize(
    ("text", "name", "limits"),
    [
        ("0.5ms", "0.5ms", {"ms": 0.5}),
        ("300kparams", "300kparams", {"params": 3e5}),
        ("20 M macs", "20Mmacs", {"macs": 2e7}),
        ("1ms, .5Mparams,2gMACS", "1ms-.5Mparams-2gMACS", {"ms": 1, "params": 5e5, "macs": 2e9}),
        ("1500params", "1500params", {"params": 1500}),
    ],
)
def test_budgets_are_read(text, name, limits):
    budget = parse_budget(text)
    assert (budget.name, budget.limits) == (name, limits)


@pytest.mark.parametrize(
    "text", ["5", "5kg", "1kms", "ms", "-1ms", "0ms", "1ms,2ms", "1ms,", "nanms", "1e3ms", "", "1;2ms", "\uff19ms"]
)
def test_what_is_no_budget_is_one_line(text):
    with pytest.raises(UserError, match="--budgets "):
        parse_budgets([text])


def test_two_budgets_of_a_name_are_a_mistake():
    with pytest.raises(UserError, match="stands twice"):
        parse_budgets(["1ms", "1MS"])


def test_an_impossible_budget_names_the_smallest_member(members):
    costs = members.sizes(10, 16)
    smallest = int(costs["params"].argmin())
    with pytest.raises(UserError) as error:
        check_possible(parse_budget("1kparams"), members, costs)
    assert " ".join(members.choice(smallest)) in str(error.value)
    assert f"takes {costs['params'][smallest]:,.0f} parameters" in str(error.value)
    least = {unit: values.min() for unit, values in costs.items()}
    check_possible(parse_budget(f"{least['params']:.0f}params"), members, costs)
    few, fewer = least["params"] * 1.01, least["macs"] * 0.99
    with pytest.raises(UserError, match="the member that comes nearest"):
        check_possible(parse_budget(f"{few:.0f}params,{fewer:.0f}macs"), members, costs)


def test_a_front_is_what_no_member_beats():
    cost, scores = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0]), np.array([5.0, 1.0, 4.0, 3.0, 5.0, 0.0])
    assert front(cost, scores).tolist() == [1, 2, 0]
    random = np.random.default_rng(0)
    cost, scores = random.integers(0, 9, 200).astype(float), random.integers(0, 9, 200).astype(float)
    beaten = [
        any(
            (cost[j] <= cost[i]) & (scores[j] >= scores[i]) & ((cost[j] < cost[i]) | (scores[j] > scores[i]))
            for j in range(200)
        )
        for i in range(200)
    ]
    found = front(cost, scores)
    assert {(cost[i], scores[i]) for i in found} == {(cost[i], scores[i]) for i in range(200) if not beaten[i]}


def test_a_table_shows_a_front_evenly_with_its_ends():
    member = {"choice": ["zero", "res3x2"], "score": 1.0}
    long = [member | {"costs": {"params": 1000.0 * cost, "macs": 2e6, "ms": 0.5}} for cost in range(1, 101)]
    cells = pareto_rows({"params": long, "ms": long[:3]})
    assert [row["place"] for row in cells if row["front"] == "ms"] == ["1/3", "2/3", "3/3"]
    places = [int(row["place"].split("/")[0]) for row in cells if row["front"] == "k params"]
    assert (places[0], places[-1], len(places)) == (1, 100, 12) and set(np.diff(places)) == {9}
    assert cells[1]["k params"] == f"{places[1]}.0" and cells[1]["M MACs"] == "2.00" and cells[1]["ms"] == "0.500"
    assert all(list(row) == list(cells[0]) for row in cells) and cells[0]["layers"] == "zero res3x2"


def test_paths_are_balanced_different_and_log_odds_that_are_sums_over_layers_are_predicted(members):
    drawn = draw_paths(members, 120, 0)
    assert len(np.unique(drawn, axis=0)) == len(drawn) > 105
    assert not np.array_equal(drawn, draw_paths(members, 120, 1)) and np.array_equal(drawn, draw_paths(members, 120, 0))
    for layer, options in enumerate(members.shape):
        counts = np.bincount(drawn[:, layer], minlength=options)
        assert counts.max() - counts.min() <= 12
    random = np.random.default_rng(0)
    true = 1 / (1 + np.exp(-members.sums([random.standard_normal(count) for count in members.shape], 1.0)))
    right = random.binomial(2000, true[members.numbers(drawn)])
    predicted, spearman = predict(members, drawn, right / 20, 2000)
    assert spearmanr(predicted, true).statistic > 0.98 and 0.9 < spearman < 1
    assert abs(predicted / 100 - true).mean() < 0.02
    right[:2] = 2000, 0  # whose odds have no logarithm
    predicted, _ = predict(members, drawn, right / 20, 2000)
    assert predicted.min() > 0 and predicted.max() < 100
    _, none = predict(members, drawn, random.uniform(20, 30, len(drawn)), 2000)
    assert abs(none) < 0.35


def test_the_choice_keeps_to_the_budget_as_it_is_measured(members):
    costs = members.sizes(10, 16)
    costs["ms"] = costs["macs"] / 1e8
    ranking, looked = Ranking("r", "u", costs["macs"]), []

    def slower(member: int) -> float:
        looked.append(member)
        return 1.1 * costs["ms"][member]

    every = Field(members, costs, ranking, 8, lambda member: -costs["params"][member], slower)
    found = choose(parse_budget("0.05ms"), every)
    chosen = members.number(found["choice"])
    assert 1.1 * costs["ms"][chosen] == found["measured_ms"] <= 0.05 < 1.1 * costs["ms"][looked[0]]
    assert len(looked) > 8 and found["score"] == -costs["params"][chosen]
    last = [member for member in list(looked) if slower(member) <= 0.05]
    assert costs["params"][chosen] == costs["params"][last].min()  # scored for real, not by the ranking
    assert costs["ms"][chosen] > 0.04 and found["within_budget"] == (costs["ms"] <= 0.05).sum()
    with pytest.raises(UserError, match=r"no member keeps to it: the fastest, .* measures 1e"):
        choose(parse_budget("0.05ms"), Field(members, costs, ranking, 8, None, lambda member: 1e3))
    exact = choose(parse_budget("60kparams,4Mmacs"), Field(members, costs, ranking, 8))
    best = costs["macs"][(costs["params"] <= 6e4) & (costs["macs"] <= 4e6)].max()
    assert exact["score"] == best and "measured_ms" not in exact


def test_scores_are_noise_without_the_statistics_of_the_path():
    """Beside accuracies by batch statistics, which need none: those of the running ones that training left."""
    pool = Pool(stem=4, widths=[4, 4, 8, 8], strides=[1, 2, 2, 1], head=16, candidates=["res3x2", "identity", "zero"])
    pipeline, train, images, labels = digits(8)
    torch.manual_seed(0)
    supernet, generator = Supernet(pool, 10), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)

    def path() -> list[Draw]:
        return [Draw(int(torch.randint(len(layer.names), (), generator=generator))) for layer in supernet.layers]

    for _, batch in zip(range(150), batches(pipeline.training(train, 64)), strict=False):
        cross_entropy(supernet(batch.images, path()), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    paths = [path() for _ in range(24)]
    left = [judge(supernet, each, images, labels)[0] for each in paths]
    seen = torch.cat([images for images, _ in pipeline.evaluation(train.take(torch.arange(500)), 500)])
    found, true = [], []
    for each in paths:
        estimate_statistics(supernet, each, seen)
        found.append(judge(supernet, each, images, labels)[0])
        with torch.no_grad():
            true.append(float((supernet.train()(images, each).argmax(1) == labels).double().mean()))
    by_path, by_training = (spearmanr(scores, true).statistic for scores in (found, left))
    assert by_path > 0.9 and by_training < 0.7 and np.mean(found) > np.mean(left) + 5, (by_path, by_training)


def test_only_what_no_branch_has_is_trained_and_learns(generic):
    teacher = load_pretrained(generic)
    pool = Pool(**teacher.info.pool)
    supernet, fresh = load_supernet(generic, pool, 10, 8, 0)
    saved = safetensors.torch.load_file(generic / "supernet.safetensors")
    assert fresh == 1 and torch.equal(supernet.fc.weight, saved["branches.0.supernet.fc.weight"])
    name = "candidates.res3x2.0.conv1.weight"
    assert torch.equal(supernet.layers[1].state_dict()[name], saved[f"branches.0.supernet.layers.0.{name}"])
    pipeline, train, images, labels = digits(8)
    before = {name: value.clone() for name, value in supernet.named_parameters()}
    paths = [[Draw((seed + i) % len(layer.names)) for i, layer in enumerate(supernet.layers)] for seed in range(3)]

    def losses() -> list[float]:
        for each in paths:
            estimate_statistics(supernet, each, images)
            yield judge(supernet, each, images, labels)[1]

    first = list(losses())
    complete(supernet, fresh, teacher, batches(pipeline.training(train, 64)), 40, 0)
    changed = {name for name, value in supernet.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("stem.", "layers.0."))}
    assert np.mean(list(losses())) < np.mean(first)


def test_a_supernet_of_another_pool_is_one_line(generic):
    with pytest.raises(UserError, match=r"--teacher .*generic: its supernet.safetensors cannot be loaded"):
        load_supernet(generic, POOL, 10, 8, 0)


def test_a_gtn_teacher_is_searched_by_its_supernet(generic, tmp_path):
    members = Members(Pool(**load_pretrained(generic).info.pool))
    (tmp_path / "p.json").write_text(json.dumps(made_up(members, (0.1, -0.01), size=8)))
    words = ["--teacher", generic, "--budgets", "0.9ms", "1ms,3kparams", "--profile", tmp_path / "p.json"]
    words += ["--paths", "40", "--images", "100", "--first_steps", "4", "--finalists", "3", "--rank", "supernet"]
    outputs = []
    for name in "ab":
        done = here("search.py", *words, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        outputs.append(read_json(tmp_path / name / "search.json"))
    assert f"latencies: not of this device ({device.here()[0]}, ONNX" in done.stdout
    assert "no branch has the stem and the first 1 layer(s)" in done.stdout and "held none out" not in done.stdout
    (first, second), paths = outputs, {"spec": "", "weights": ""}
    assert first["fronts"] == second["fronts"] and first["ranked_by"] == "the supernet's top-1"
    assert first["scored_paths"] > 30 and first["profile"]["device"] == "a device" and first["members"] == len(members)
    for name, entry in first["students"].items():
        assert read_spec(tmp_path / "a/students" / f"{name}.json") == members.pool.spec(entry["choice"])
        assert all(entry["costs"][unit] <= limit for unit, limit in entry["limits"].items())
        assert entry | paths == second["students"][name] | paths and "measured_ms" not in entry
    student = tmp_path / "a/students/1ms-3kparams.json"
    next_command = f"python distill.py --teacher {generic} --student {tmp_path}/b/students/0.9ms.json"
    assert next_command in done.stdout and student.is_file()
    again = here("search.py", *words, "--output_dir", tmp_path / "a")
    assert again.returncode == 2 and "--overwrite replaces it" in again.stderr
    succeeded(here("search.py", *words, "--rank", "macs", "--output_dir", tmp_path / "a", "--overwrite"))
    assert read_json(tmp_path / "a/search.json")["ranked_by"] == "multiply-accumulates"
    assert not list(tmp_path.glob("a/students/*.safetensors"))  # by now they would be other members'


@pytest.mark.parametrize(
    ("spearman", "chance", "tau", "ranked_by", "said"),
    [
        (
            1.0,
            0.0,
            None,
            "supernet",
            "scores: by the supernet, as they are above chance, and predicted better than by mu",
        ),
        (-1.0, 0.0, None, "macs", "scores: by multiply-accumulates, as the supernet's scores are predicted no better"),
        (None, 0.0, None, "macs", "scores: by multiply-accumulates, as the supernet's scores are predicted no better"),
        (1.0, None, None, "macs", "scores: by multiply-accumulates, as half the paths have no more than "),
        (-1.0, None, (0.5, 0.4), "supernet", "is 0.50 of predicted scores, 0.40 of multiply-accumulates"),
        (1.0, 0.0, (0.4, 0.4), "macs", "is 0.40 of predicted scores, 0.40 of multiply-accumulates"),
    ],
)
def test_members_are_ranked_by_scores_where_trained_members_say_so(
    spearman, chance, tau, ranked_by, said, generic, tmp_path, monkeypatch
):
    """Where none were trained: where scores are above chance, which they are not here, and beat MACs as predictors."""
    monkeypatch.setattr("searching.scoring.predict", lambda members, *_: (np.zeros(len(members)), spearman))
    if chance is not None:
        monkeypatch.setattr("searching.scoring.by_chance", lambda labels: chance)
    teacher, sha256 = shutil.copytree(generic, tmp_path / "t"), read_json(generic / "model.json")["sha256"]
    record = {"teacher": sha256 if tau else "of other weights", "members": 16, "epochs": 3}
    record |= {"tau": dict(zip(("predicted", "macs"), tau or (1.0, 0.0), strict=True))}
    (teacher / "ranking.json").write_text(json.dumps(record))
    words = ["--teacher", teacher, "--budgets", "3kparams", "--paths", "4", "--images", "50", "--first_steps", "1"]
    done = succeeded(here("search.py", *words, "--output_dir", tmp_path / "s"))
    found = read_json(tmp_path / "s/search.json")
    assert found["ranked_by"] == {"supernet": "the supernet's top-1", "macs": "multiply-accumulates"}[ranked_by]
    assert said in done.stdout and ("scores: by the supernet" in done.stdout) == (ranked_by == "supernet")
    command = f"has been trained to check the ranking: python -m benchmarks.ranking --teacher {teacher}\n"
    assert (command in done.stdout) == (tau is None) == (found["trained"] is None)


def test_a_record_of_trained_members_that_is_none_is_one_line(generic, tmp_path):
    teacher = shutil.copytree(generic, tmp_path / "t")
    for text in ("[]", "{", "{}", '{"teacher": "x", "members": 3, "epochs": 1, "tau": {"predicted": 1, "macs": "x"}}'):
        (teacher / "ranking.json").write_text(text)
        done = here("search.py", "--teacher", teacher, "--budgets", "3kparams", "--output_dir", tmp_path / "s")
        assert done.returncode == 2 and f"--teacher {teacher}/ranking.json: " in done.stderr
        assert done.stderr.count("\n") == 1


def test_guessing_seldom_has_more_than_what_is_called_chance():
    random = np.random.default_rng(0)
    for weights in ([0.1] * 10, [0.6, 0.2, 0.2]):
        labels = random.choice(len(weights), 500, p=weights)
        most = np.bincount(labels).argmax()
        guessed = 100 * (random.choice(labels, (20_000, 500)) == most).mean(axis=1)
        assert 0.005 < (guessed > by_chance(labels)).mean() < 0.012


def test_macs_are_held_against_the_scores_of_their_own_paths(members):
    drawn, macs = draw_paths(members, 60, 0), members.sizes(10, 16)["macs"]
    own = macs[members.numbers(drawn)]
    assert rank_correlation(members, macs, drawn, own) == pytest.approx(1)
    assert rank_correlation(members, macs, drawn, -own) == pytest.approx(-1)


def test_any_teacher_is_searched_by_macs_and_measured_here(vanilla, tmp_path, monkeypatch):
    monkeypatch.setattr("searching.blocks.WHOLE", 5)
    monkeypatch.setattr(device, "SECONDS", 0.01)
    words = ["--teacher", vanilla, *WORDS, "--budgets", "10ms", "100kparams", "--finalists", "2"]
    (tmp_path / "s").mkdir()
    noisy = made_up(Members(POOL), (0, 0), noise=0.3) | dict(zip(("device", "onnxruntime"), device.here(), strict=True))
    (tmp_path / "s/profile.json").write_text(json.dumps(noisy))  # it is not to be trusted: this device is measured
    done = succeeded(here("search.py", *words, "--output_dir", tmp_path / "s"))
    assert "scores: by multiply-accumulates, as" in done.stdout and "holds no supernet.safetensors" in done.stdout
    found = read_json(tmp_path / "s/search.json")
    largest = ["res3x4"] * 6
    assert found["students"]["10ms"]["choice"] == largest and found["students"]["10ms"]["measured_ms"] < 10
    assert (found["profile"]["device"], found["profile"]["onnxruntime"]) == device.here()
    assert {"ms", "params", "macs"} == set(found["others"]["nas_m"]) and found["others"]["nas_m"]["params"] > 1e6
    assert len(read_json(tmp_path / "s/profile.json")["members"]) == 10
    trusted = json.dumps(noisy | {name: made_up(Members(POOL), (0, 0))[name] for name in ("ms", "passes", "members")})
    (tmp_path / "s/profile.json").write_text(trusted)
    monkeypatch.setattr("search.write_folder", None)  # what was measured is used again
    done = succeeded(here("search.py", *words, "--output_dir", tmp_path / "s", "--overwrite"))
    assert (tmp_path / "s/profile.json").read_text() == trusted and "not of this device" not in done.stdout


def test_a_search_that_is_killed_while_it_replaces_another_leaves_nothing_untrue(vanilla, tmp_path, monkeypatch):
    """Killed before each file that it removes or writes."""
    target, words = tmp_path / "s", ["--teacher", vanilla, *WORDS, "--output_dir", tmp_path / "s"]
    monkeypatch.setattr("search.other_students", lambda *_: {})
    succeeded(here("search.py", *words, "--budgets", "100kparams", "60kparams", "1Mmacs"))
    (target / "students/100kparams.safetensors").touch()  # as a search by the supernet leaves them
    for own in ("mine.json", "mine.safetensors", "1ms.txt"):
        (target / "students" / own).write_text("not the search's")
    changes, left = [], tmp_path / "left"

    def changing(change):
        def counted(*given, **options):
            if str(target) in str(given[0]) and Path(given[-1]).suffix != ".tmp":
                changes.append(str(given[-1]))
                shutil.copytree(target, left / str(len(changes)))
            return change(*given, **options)

        return counted

    monkeypatch.setattr(Path, "unlink", changing(Path.unlink))
    monkeypatch.setattr(os, "replace", changing(os.replace))
    succeeded(here("search.py", *words, "--budgets", "80kparams", "1Mmacs", "--overwrite"))
    monkeypatch.undo()
    for folder in [*left.iterdir(), target]:
        specs = {path.stem: read_json(path) for path in folder.glob("students/*k*.json")}
        specs |= {path.stem: read_json(path) for path in folder.glob("students/*M*.json")}
        if (folder / "search.json").is_file():
            entries = read_json(folder / "search.json")["students"]
            assert specs == {name: POOL.spec(entry["choice"]) for name, entry in entries.items()}
        assert all((folder / "students" / own).is_file() for own in ("mine.json", "mine.safetensors", "1ms.txt"))
    assert len(changes) == 2 + 4 + 2 + 2
    begun = left / str(len(changes) - 1)  # search.json is not there: it is no search that is to be replaced
    succeeded(here("search.py", *words[:-1], begun, "--budgets", "90kparams"))
    ours = {path.name for path in begun.glob("students/*")} - {"mine.json", "mine.safetensors", "1ms.txt"}
    assert ours == {"90kparams.json"}


def test_students_start_from_the_paths_that_were_scored(generic, tmp_path, monkeypatch):
    """distill.py --weights FOLDER, before the first step, against the supernet itself: logits, not names."""
    kept, begun = [], {}
    monkeypatch.setattr("search.score_pool", lambda *given: kept.append(score_pool(*given)) or kept[0])
    monkeypatch.setattr("distill.run_together", lambda loops, _: begun.update(loops) or loops)
    words = ["--teacher", generic, "--budgets", "700params", "2kparams", "--output_dir", tmp_path / "s"]
    words += ["--paths", "12", "--images", "100", "--first_steps", "4", "--finalists", "2", "--rank", "supernet"]
    succeeded(here("search.py", *words))
    entries, (_, paths) = read_json(tmp_path / "s/search.json")["students"], kept[0]
    assert len({tuple(entry["choice"]) for entry in entries.values()}) == 2
    folder, specs = tmp_path / "s/students", [entry["spec"] for entry in entries.values()]
    assert [entry["weights"] for entry in entries.values()] == [spec[:-4] + "safetensors" for spec in specs]
    words = ["--teacher", generic, "--epochs", "1", "--output_dir", tmp_path / "runs"]
    done = here("distill.py", *words, "--students", *specs, "--weights", folder)
    assert done.returncode == 1 and "of 2 students" in done.stderr, done.stderr
    images = digits(8)[2][:50]
    for entry, loop in zip(entries.values(), begun.values(), strict=True):
        supernet = paths.judge.supernet
        draws = [Draw(layer.names.index(name)) for layer, name in zip(supernet.layers, entry["choice"], strict=True)]
        estimate_statistics(supernet, draws, paths.judge.seen)
        with torch.no_grad():
            expected = supernet.eval()(images, draws)
            torch.testing.assert_close(loop.objective.trained_model().eval()(images), expected, rtol=0, atol=1e-5)
        assert judge(supernet, draws, paths.judge.images, paths.judge.labels)[0] == pytest.approx(entry["score"])

    def refused(spec, weights) -> str:
        done = here("distill.py", *words, "--student", spec, "--weights", weights)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    small, large = entries.values()
    swap = {"zero": "identity", "identity": "zero"}  # has the same parameters where the shape is kept
    place = next(i for i in (0, 1, 2) if small["choice"][i] in swap)
    other = [swap[name] if i == place else name for i, name in enumerate(small["choice"])]
    (folder / "other.json").write_text(json.dumps(paths.members.pool.spec(other)))
    assert "weights of another member of the pool" in refused(folder / "other.json", small["weights"])
    assert f"--weights {large['weights']}: " in refused(small["spec"], large["weights"])
    assert f"--weights {folder}/other.safetensors: there is no such file" in refused(folder / "other.json", folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--teacher: name the run folder"),
        (("--teacher", "/nowhere", "--budgets", "1ms"), "--teacher /nowhere: "),
        (("--teacher", "RUN"), "--budgets: name at least one"),
        (("--teacher", "RUN", "--budgets", "1lightyear"), "'1lightyear' is no budget"),
        (("--teacher", "RUN", "--budgets", "3params"), "the smallest member, "),
        (("--teacher", "RUN", "--budgets", "9Mparams", "--rank", "supernet"), "holds no supernet.safetensors"),
        (("--teacher", "RUN", "--budgets", "1ms", "--profile", "RUN/model.json"), "is no file of profile_device.py"),
        (("--teacher", "RUN", "--budgets", "1ms", "--profile", "/nowhere"), "--profile /nowhere: cannot be read"),
        (("--teacher", "RUN", "--budgets", "1ms", "--output_dir", "RUN"), "holds files that are no search's"),
        (("--teacher", "RUN", "--write_blocks", "RUN"), "--write_blocks"),
        (("--teacher", "RUN", "--budgets", "1ms", "--finalists", "0"), "--finalists 0: "),
        (("--teacher", "RUN", "--budgets", "1ms", "--paths", "1"), "--paths 1: "),
    ],
)
def test_bad_input_is_one_line(words, message, vanilla):
    words = [word.replace("RUN", str(vanilla)) for word in words]
    done = here("search.py", *words, *(WORDS if "RUN" in str(words) else ()))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


class Started:
    """subprocess.run whose Python scripts are forks; `scripts` counts them."""

    def __init__(self):
        self.start, self.scripts = subprocess.run, 0

    def __call__(self, command, **options):
        if command[0] != sys.executable:
            return self.start(command, **options)
        self.scripts += 1
        return succeeded(forked(*command[1:]))


def kendall(ours: list[float], theirs: list[float]) -> float:
    """Tau-b by its definition: pairs in the same order less those in the other, over those that are no ties."""
    pairs = [(a, b) for a in range(len(ours)) for b in range(a)]
    one, other = ([np.sign(values[a] - values[b]) for a, b in pairs] for values in (ours, theirs))
    return np.dot(one, other) / np.sqrt(np.abs(one).sum() * np.abs(other).sum())


def test_the_ranking_benchmark_trains_members_and_gives_tau(generic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", started := Started())
    teacher = shutil.copytree(generic, tmp_path / "t")
    words = ["--teacher", str(teacher), "--members", "4", "--epochs", "1", "--batch_size", "64", "--paths", "12"]
    words += ["--first_steps", "2", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "ranking.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/ranking.py", *words])
    ranking_benchmark.main()
    found = read_json(tmp_path / "ranking.json")
    for name in ("predicted", "path", "params", "macs"):
        assert found["tau"][name] == pytest.approx(kendall(found[name], found["top1"]))
    assert len({*found["top1"]}) > 1 and len({*found["predicted"]}) > 1
    summaries = [read_json(path)["top1"] for path in tmp_path.glob("runs/*/summary.json")]
    assert sorted(summaries) == sorted(found["top1"]) and len(summaries) == 4
    scores = found["tau"]["predicted"] > found["tau"]["macs"]
    ranked = f"ranks this teacher's members by {'the supernet' if scores else 'multiply-acc'}"
    assert ranked in capsys.readouterr().out and read_json(teacher / "ranking.json") == found
    words = ["--teacher", teacher, "--budgets", "3kparams", "--paths", "4", "--images", "50", "--first_steps", "1"]
    succeeded(here("search.py", *words, "--output_dir", tmp_path / "s"))
    taus = {name: found["tau"][name] for name in ("predicted", "macs")}
    assert read_json(tmp_path / "s/search.json")["trained"] == {"members": 4, "epochs": 1} | taus
    ranking_benchmark.main()  # nothing is left to train
    assert started.scripts == 4 and read_json(tmp_path / "ranking.json")["top1"] == found["top1"]


def test_a_benchmarks_run_is_taken_for_no_other(generic, members, tmp_path):
    (recipe := tmp_path / "recipe.yaml").write_text("lr: 0.1\n")
    options = {"epochs": 1, "batch_size": 64, "further": ["--config", str(recipe)], "runs": str(tmp_path)}

    def place(member=5, seed=0, teacher=generic, **changed) -> Path:
        namespace = argparse.Namespace(**options | changed)
        return ranking_benchmark.run_folder(members, member, seed, str(teacher), namespace)

    shutil.copytree(generic, tmp_path / "copy")
    assert place(teacher=tmp_path / "copy") == place() and place().parent == tmp_path
    (tmp_path / "copy/model.json").write_text("{}")
    more = [place(teacher=tmp_path / "copy"), place(6), place(seed=1), place(epochs=2), place(batch_size=32)]
    more += [place(), place(further=[]), place(further=["--lr", "0.1"])]
    recipe.write_text("lr: 0.2\n")
    assert len({*more, place()}) == len(more) + 1


def network(choice: list[str]) -> tuple[list[str], list[str]]:
    """What a member of `generic`'s pool computes: `zero` is nothing in the first three layers, all alike."""
    return [name for name in choice[:3] if name != "zero"], choice[3:]


def test_the_benchmark_of_chosen_members_holds_them_against_others_of_their_cost(
    generic, tmp_path, monkeypatch, capsys
):
    members = Members(Pool(**load_pretrained(generic).info.pool))
    (tmp_path / "p.json").write_text(json.dumps(content := made_up(members, (0.1, -0.01), size=8)))
    words = ["--teacher", generic, "--budgets", "0.9ms", "1ms,60kmacs", "--rank", "macs"]
    succeeded(here("search.py", *words, "--profile", tmp_path / "p.json", "--output_dir", tmp_path / "s"))
    students = read_json(tmp_path / "s/search.json")["students"]
    top1 = np.random.default_rng(0).uniform(50, 60, (len(members), 3))
    options = {"epochs": 1, "batch_size": 128, "further": ["--train_fraction", "0.3"], "runs": str(tmp_path / "runs")}
    place = partial(ranking_benchmark.run_folder, teacher=str(generic), options=argparse.Namespace(**options))
    chosen = [members.number(entry["choice"]) for entry in students.values()]
    for member, seed in np.ndindex(top1.shape):  # all runs are there, but one that is made
        (run := place(members, member, seed + 3)).mkdir(parents=True)
        if (member, seed) != (chosen[0], 2):
            (run / "summary.json").write_text(json.dumps({"top1": top1[member, seed]}))
    words = ["--search", str(tmp_path / "s"), "--profile", str(tmp_path / "p.json"), "--runs", str(tmp_path / "runs")]
    more = ["--random", "3", "--tolerance", "0.1", "--seeds", "3", "4", "5", "--epochs", "1", "--batch_size", "128"]
    more += ["--output", str(tmp_path / "chosen.json"), "--", "--train_fraction", "0.3"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/chosen.py", *words, *more])
    monkeypatch.setattr(subprocess, "run", started := Started())
    chosen_benchmark.main()
    config = yaml.safe_load((run := place(members, chosen[0], 5) / "config.yaml").read_text())
    assert (config["teacher"], config["train_fraction"], config["seed"]) == ([str(generic)], 0.3, 5)
    top1[chosen[0], 2] = read_json(run.with_name("summary.json"))["top1"]
    found, every = read_json(tmp_path / "chosen.json"), []
    costs = members.sizes(10, 8) | {"ms": Profile(content, members).latency()}
    for name, one, units in zip(students, chosen, (["ms"], ["ms", "macs"]), strict=True):
        row = found["budgets"][name]
        others = [members.number(each["choice"]) for each in row["random"]]
        assert members.number(row["chosen"]["choice"]) == one and len({one, *others}) == 4
        assert all(network(members.choice(other)) != network(members.choice(one)) for other in others)
        assert all(costs[unit][others] == pytest.approx(costs[unit][one], rel=0.1) for unit in units)
        assert row["random"][1]["top1"] == top1[others[1]].tolist()
        every.append(top1[one] - top1[others].sum(axis=0) / 3)
        assert row["differences"] == pytest.approx(every[-1]) and row["mean"] == pytest.approx(every[-1].mean())
    means, overall = (every[0] + every[1]) / 2, found["overall"]
    interval = student_t.interval(0.95, 2, means.mean(), means.std(ddof=1) / 3**0.5)
    assert overall["mean"] == pytest.approx(means.mean()) and overall["interval"] == pytest.approx(interval)
    chosen_benchmark.main()  # nothing is left to train
    assert started.scripts == 1 and read_json(tmp_path / "chosen.json") == found
    assert f"over all: {overall['mean']:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks/chosen.py", *words, "--random", "300"])
    with pytest.raises(UserError, match=r"--tolerance 0.05: \d+ other members cost what 0.9ms's chosen one does"):
        chosen_benchmark.main()
