"""The benchmarks measure what they say: the plain step is the even step, and tables hold the runs' figures."""

import json
import subprocess
import sys
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import baselines, recipe_cost
from benchmarks import cost as cost_benchmark
from benchmarks import data as data_benchmark
from benchmarks import methods as methods_benchmark
from benchmarks import parts as parts_benchmark
from benchmarks import training as training_benchmark
from benchmarks.steps import Options, PlainJoint, Setting, measure
from common import derive_seed
from data.batch import Batch
from data.datasets import load_images
from engine.objective import weighted_sum
from losses.registry import METHODS
from models import ModelInfo, create_model, save_pretrained
from models.network import macs
from models.pool import Pool
from objectives.gtn import GTN
from tests.runs import forked, succeeded


@pytest.fixture(autouse=True)
def scripts_are_forked(monkeypatch):
    """What benchmarks start as processes of their own."""

    start = subprocess.run

    def run(command: list, **options) -> CompletedProcess:
        return succeeded(forked(*command[1:])) if command[0] == sys.executable else start(command, **options)

    monkeypatch.setattr(subprocess, "run", run)


POOL = Pool(stem=4, widths=[4, 4, 8, 8, 8, 8], strides=[1, 1, 2, 1, 2, 1], head=8, candidates=["res3x2", "identity"])


def test_plain_joint_step_computes_the_even_step_of_the_same_path():
    torch.manual_seed(0)
    objective = GTN(create_model("resnet8", 5), Options(pool=POOL), 16).double()
    batch = Batch(torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 5, (6,)))
    even = weighted_sum(objective, objective(batch, 4))
    draws = objective.gates.draw(torch.Generator().manual_seed(derive_seed(0, "paths", 4)))
    assert torch.allclose(PlainJoint(objective, draws)(*batch[:2]), even, rtol=1e-12)


def test_macs_of_the_papers_pool_and_of_resnet32():
    objective = GTN(create_model("resnet32", 100), Options(), 32)
    torch.nn.init.zeros_(objective.gates.phi)  # every candidate alike
    assert round(macs(objective.teacher, torch.zeros(1, 3, 32, 32))[0] / 1e6, 1) == 69.1  # the zoo's published count
    assert objective.branch_macs(32) == pytest.approx(expected_branch_macs(), rel=1e-9)


def expected_branch_macs() -> float:
    """The mean over paths from the pool's table alone: (in, out, stride, side of the output) of layers 2 to 6."""
    layers = {2: (64, 64, 1, 32), 3: (64, 64, 1, 32), 4: (64, 128, 2, 16), 5: (128, 256, 2, 8), 6: (256, 512, 2, 4)}

    def mean_candidate(layer: int) -> float:
        channels_in, channels_out, stride, side = layers[layer]
        changes = stride == 2
        projection = side**2 * channels_in * channels_out if changes else 0
        chains = [
            side**2 * k * k * channels_out * (channels_in + (depth - 1) * channels_out) + projection
            for k in (3, 5)
            for depth in (2, 4, 6)
        ]
        # Identity is a 1x1 convolution where the shape changes; identity and zero cost nothing elsewhere.
        return (sum(chains) + projection) / (7 if changes else 8)

    head = 4**2 * 512 * 1280 + 1280 * 100
    transforms = 32**2 * 16 * 64 + 32**2 * 16 * 64 + 8**2 * 9 * 32 * 256
    return transforms + sum(mean_candidate(i) for first in (2, 4, 6) for i in range(first, 7)) + 3 * head


def test_measure_reports_all_three_steps():
    row = measure(Setting("tiny", "resnet8", POOL, 16, 4, 5), paths=3)
    assert min(row["plain_ms"], row["even_ms"], row["gate_ms"]) > 0
    assert row["teacher_macs"] > row["branch_macs"] > 0
    json.dumps(row)


def test_a_set_takes_hardly_more_memory_than_its_pixels():
    """Loading it and an epoch of it, in a process of its own: neither files nor batches stay."""
    used = data_benchmark.memory(30_000)
    assert used["raw_bytes"] == 36_000 * 3 * 32 * 32
    assert 0.9 < used["ratio"] <= 1.3


def test_both_pipelines_of_the_data_benchmark_give_every_image_and_alike():
    row = data_benchmark.speed(2000, 1, torch.device("cpu"))
    assert row["device_images_per_second"] > 0 and row["workers_images_per_second"] > 0
    data = data_benchmark.random_set(4000)
    data.train.pixels[:] = data.train.pixels // 4 + 150  # far from the padding's zeros
    options = data_benchmark.Options(crop_padding=data_benchmark.PADDING)
    ours = data_benchmark.Pipeline(data, options, torch.device("cpu")).training(data.train, 4000).one(0)
    pillow = data_benchmark.PillowDataset(data.train.pixels.permute(0, 2, 3, 1).numpy(), data.train.labels.tolist())
    theirs = torch.stack([pillow[index][0] for index in range(4000)])
    assert ours.images.shape == theirs.shape and ours.images.dtype == theirs.dtype
    for values in (ours.images, theirs):  # how much of each place is padding, the crop's distribution
        values.copy_(values < -1)
    deviation = (theirs.mean(0) * (1 - theirs.mean(0)) / 2000).sqrt()
    assert ((ours.images.mean(0) - theirs.mean(0)).abs() <= 5 * deviation + 1e-9).all()
    assert ours.images.mean() > 0.1


def test_the_methods_benchmark_times_every_method():
    rows = methods_benchmark.measure("resnet8", "resnet8", 4, 1, torch.device("cpu"))
    assert {row["method"] for row in rows} == {name for name, method in METHODS.items() if method.needs_teacher}
    assert all(row["milliseconds"] > 0 for row in rows)
    assert next(row["over_kd"] for row in rows if row["method"] == "kd") == 1


def test_the_recipe_benchmark_times_every_recipe_and_a_generic_epoch(monkeypatch):
    seen = []
    monkeypatch.setattr(recipe_cost, "clocks", lambda run, device: seen.append(run()) or (float(len(seen)), 1.0))
    rows = {row["recipe"]: row for row in recipe_cost.measure("resnet8", "resnet8", 4, 2)}
    assert rows.keys() == recipe_cost.RECIPES.keys() and rows["plain"]["overhead"] == 0
    count = len(rows)  # the first round warms up; then every step takes a second more than the one before
    assert rows["ema"]["overhead"] == pytest.approx(((-2 / (2 * count)) + 2 / (2 * count + 1)) / 2, abs=1e-9)
    pytest.importorskip("timm")
    epoch = recipe_cost.vit_epoch("timm:test_vit", 32, 80)
    assert epoch["images"] == 80 and epoch["training_seconds"] > 0


def test_the_cost_benchmark_sums_over_students(tmp_path):
    row = cost_benchmark.measure(Setting("tiny", "resnet8", POOL, 16, 4, 5), students=3, paths=2, images=400)
    assert len(row["sftn_seconds_each"]) == 3 and row["sftn_seconds"] == pytest.approx(
        sum(row["sftn_seconds_each"]) / 3
    )
    assert row["gtn_over_sftn"] == pytest.approx(row["gtn_seconds"] / row["sftn_seconds"])
    assert min(row["vanilla_seconds"], row["gtn_seconds"]) > 0
    assert row["parameters"]["gtn"] > row["parameters"]["sftn0"] > row["parameters"]["vanilla"]
    cost_benchmark.plot([row], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_peak_memory_is_that_of_the_process_that_trains():
    """The demo's GTN teacher holds supernet branches beside what a vanilla teacher holds."""
    vanilla, gtn = (cost_benchmark.peak("digits", kind) for kind in ("vanilla", "gtn"))
    assert 10**8 < vanilla < gtn < 10**10


def test_the_training_benchmark_trains_with_every_script(tmp_path):
    data = load_images("digits", 32)
    networks = [create_model("resnet8", 10), create_model("resnet8", 10)]
    info = ModelInfo("resnet8", "digits", 10, 32, data.mean, data.std)
    save_pretrained(networks[0], info, tmp_path / "teacher")
    flags = ["--mixed_precision", "bf16", "--train_fraction", "0.2"]
    assert training_benchmark.our_script(tmp_path, "resnet8", 128, "bf16", flags, 0) > 0
    before = networks[1].fc.weight.detach().clone()
    pillow = training_benchmark.PillowDataset(data.train.pixels[:64].permute(0, 2, 3, 1).numpy(), [1, 2] * 32)
    assert baselines.plain_script(*networks, pillow, 16, torch.device("cpu")) > 0
    assert not torch.equal(networks[1].fc.weight, before)


@pytest.mark.parametrize("name", ["gtn", "crd"])
def test_the_parts_of_a_step_are_its_time(name, tmp_path):
    config = parts_benchmark.make_config(name, "resnet8", 16, "bf16", str(tmp_path), pool=POOL)
    loop = parts_benchmark.make_loop(name, "resnet8", config, data_benchmark.random_set(400))
    row = parts_benchmark.measure(loop, 3)
    assert set(row["phases"]) == ({"weights", "gates"} if name == "gtn" else {"weights"})
    for phase, of in row["phases"].items():
        spent = {part for part, ms in of["parts_ms"].items() if ms > 0}
        assert spent == set(parts_benchmark.PARTS) - (set() if name == "gtn" else {"gates"}), phase
        assert 0 < of["share_of_matrix_rate"] < 2
    json.dumps(row)


def test_a_stopwatch_charges_what_runs_within_a_part_to_itself(monkeypatch):
    clock = [0.0]

    def work(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(parts_benchmark.time, "perf_counter", lambda: clock[0])
    watch = parts_benchmark.PartTimer(torch.device("cpu"))
    inner = watch.watched("teacher", lambda: work(5))
    watch.start()
    watch.watched("loss", lambda: [inner(), work(2)])()
    work(1)
    seconds = watch.read()
    assert (seconds["teacher"], seconds["loss"], seconds["rest"]) == (5, 2, 1)
