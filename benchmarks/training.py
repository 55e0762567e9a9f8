"""How fast a student is distilled: distill.py against scripts of others; and where the time of a step goes.

python -m benchmarks.training --output benchmarks/results/training.json

First the same pair, batch and images for all, in turns: the baselines (benchmarks/baselines.py: DataLoader workers, PIL
transforms, float32), then distill.py, started as anybody starts it. Images a second are those of its metrics.jsonl,
without the first epoch. Then the parts of a step (benchmarks/parts.py) of three teachers and three students, and how
the time grows with the images and with the pool. A plot beside the JSON shows the first two.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from benchmarks import parts
from benchmarks.baselines import LR, plain_script, torchdistill_script
from benchmarks.data import PillowDataset, random_set
from benchmarks.steps import clock
from common import write_atomically
from data.datasets import load_images
from engine.run_folder import machine
from engine.totals import Totals
from models import ModelInfo, create_model, save_pretrained

ROOT, SIDE = Path(__file__).parents[1], 32
BASELINES = {"plain": plain_script, "torchdistill": torchdistill_script}
ONE_VIEW = ["--crop_padding", "0", "--flip", "false", "--cache_teacher", "memory"]
OURS = {  # flags, and the target in times the plain script, on a CPU and on a GPU
    "float32": (["--mixed_precision", "no"], 1.8, None),
    "bf16": (["--mixed_precision", "bf16"], 3.5, 5.0),
    "bf16, compiled": (["--mixed_precision", "bf16", "--compile"], None, None),
    "bf16, one CUDA graph": (["--mixed_precision", "bf16", "--cuda_graph"], None, 5.0),
    "bf16, compiled, one CUDA graph": (["--mixed_precision", "bf16", "--compile", "--cuda_graph"], None, 5.0),
    "float32, no crops, teacher logits cached": (["--mixed_precision", "no", *ONE_VIEW], None, None),
    "bf16, no crops, teacher logits cached": (["--mixed_precision", "bf16", *ONE_VIEW], None, None),
}
# Candidates of one mean length, so that a path costs the same however many there are.
POOLS = {count: [f"res3x{length}" for length in lengths] for count, lengths in
         ((2, (2, 10)), (3, (2, 6, 10)), (5, (2, 4, 6, 8, 10)))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each script")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each phase of each objective")
    parser.add_argument("--output", default="benchmarks/results/training.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = (options.teacher, options.student, options.batch_size)
    setting = {"teacher": options.teacher, "student": options.student, "batch_size": options.batch_size}
    report = {"command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]), **machine(), **setting}
    report["scripts"] = compare(*pair, options.rounds, device)
    report["steps"] = {
        f"{name}, {'float32' if precision == 'no' else precision}": step_parts(*pair, name, precision, options.steps)
        for name in tqdm(parts.OBJECTIVES, desc="steps", leave=False, disable=None)
        for precision in ("no", "bf16")
    }
    report["seconds_an_epoch_by_images"] = by_images()
    report["seconds_a_pair_of_gtn_steps_by_students_of_the_pool"] = by_pool()
    output = Path(options.output)
    write_atomically(output, json.dumps(report, indent=1) + "\n")
    plot(report, output.with_suffix(".png"))
    describe(report)
    print(f"written: {output}, {output.with_suffix('.png')}")


def compare(teacher: str, student: str, batch_size: int, rounds: int, device: torch.device) -> dict[str, dict]:
    """Every script's images a second, and over the plain script's in the same round."""
    data = load_images("digits", SIDE)
    dataset = PillowDataset(data.train.pixels.permute(0, 2, 3, 1).contiguous().numpy(), data.train.labels.tolist())
    networks = [create_model(name, data.num_classes, image_size=SIDE) for name in (teacher, student)]
    runs: dict[str, Callable[[int], float]] = {}
    for name, script in BASELINES.items():
        if name == "plain" or find_spec(name):
            runs[name] = lambda number, script=script: script(*networks, dataset, batch_size, device)
        else:
            print(f"{name} is not installed (requirements-{name}.txt): left out", file=sys.stderr)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        info = ModelInfo(teacher, "digits", data.num_classes, SIDE, data.mean, data.std)
        save_pretrained(networks[0], info, Path(folder) / "teacher")
        for name, (flags, *_) in OURS.items():
            if device.type == "cpu" and "--cuda_graph" in flags:
                continue
            runs[name] = partial(our_script, Path(folder), student, batch_size, name, flags)
        for number in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            for name, run in runs.items():
                speeds.setdefault(name, []).append(run(number))
    rows = {name: {"images_per_second": statistics.median(each), "rounds": each} for name, each in speeds.items()}
    for name, row in rows.items():
        row["over_plain"] = statistics.median(a / b for a, b in zip(row["rounds"], speeds["plain"], strict=True))
        row["target"] = OURS[name][1 if device.type == "cpu" else 2] if name in OURS else None
    return rows


def our_script(folder: Path, student: str, batch_size: int, name: str, flags: list[str], number: int) -> float:
    """Images a second of distill.py, without its first epoch."""
    run = folder / f"{list(OURS).index(name)}-{number}"
    command = [sys.executable, "distill.py", "--teacher", folder / "teacher", "--student", student]
    command += ["--image_size", SIDE, "--batch_size", batch_size, "--epochs", 3, "--lr", LR]
    command += ["--crop_padding", 4, "--flip", "true", *flags, "--output_dir", run]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(row["images_per_second"] for row in rows[1:])


def step_parts(teacher: str, student: str, batch_size: int, name: str, precision: str, steps: int) -> dict:
    """What benchmarks/parts.py finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.parts", "--objective", name, "--precision", precision]
    command += ["--teacher", teacher, "--student", student, "--batch_size", batch_size, "--steps", steps]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout)


def by_images() -> dict[int, float]:
    """Seconds of an epoch of KD, resnet14 to resnet8, without its evaluation, by the number of images."""
    found = {}
    for images in (2_000, 4_000, 8_000):
        with tempfile.TemporaryDirectory() as folder:
            config = parts.make_config("kd", "resnet8", 64, "no", folder, epochs=2)
            data = random_set(images)
            loop = parts.make_loop("kd", "resnet14", config, replace(data, test=data.test.take(torch.arange(100))))
            found[images] = loop.run().history[-1]["seconds"]
    return found


def by_pool(steps: int = 40) -> dict[int, float]:
    """Mean seconds of a weight step and a gate step of GTN with a teacher resnet14, by the number of pool members."""
    found = {}
    for count, candidates in POOLS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = parts.make_config("gtn", "", 64, "no", folder, pool=replace(parts.POOL, candidates=candidates))
            loop = parts.make_loop("gtn", "resnet14", config, random_set(64 * (steps + 10)))
            loop.objective.begin_epoch(0)
            loop.objective.train()
            batches, totals = loop.train.epoch(0), Totals({})
            step = lambda: loop.step(next(batches), totals)  # noqa: B023, E731 - used in this turn alone
            for _ in range(10):
                step()
            seconds = [clock(step, loop.accelerator.device) for _ in range(steps)]
            found[count ** len(parts.POOL.widths)] = 2 * statistics.mean(seconds)
    return found


def describe(report: dict) -> None:
    """Print a report."""
    pair = f"{report['teacher']} -> {report['student']}, batch {report['batch_size']}, {SIDE}x{SIDE}"
    print(f"{pair}, on {report['device']}")
    for name, row in report["scripts"].items():
        aim = "" if row["target"] is None else f" (target: at least {row['target']})"
        print(f"  {name:<45} {row['images_per_second']:>9,.0f} images/s, {row['over_plain']:.2f} times the plain{aim}")
    for name, row in report["steps"].items():
        for phase, of in row["phases"].items():
            times = ", ".join(f"{part} {ms:.1f}" for part, ms in of["parts_ms"].items() if ms >= 0.05)
            print(f"  {name}, {phase}: {of['step_ms']:.1f} ms ({times})")
            rate = f"{of['gflops_per_second']:,.0f} GFLOP/s, {of['share_of_matrix_rate']:.0%} of torch.mm's"
            print(f"      {rate}; {row['peak_memory_bytes'] / 1e9:.2f} GB")
    for key in ("seconds_an_epoch_by_images", "seconds_a_pair_of_gtn_steps_by_students_of_the_pool"):
        print(f"  {key.replace('_', ' ')}: " + ", ".join(f"{n:,}: {s:.3f}" for n, s in report[key].items()))


def plot(report: dict, path: Path) -> None:
    """The scripts' speeds, and where the time of a step goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(2, 3))
    scripts = report["scripts"]
    names = [name.replace(", teacher logits cached", ",\nteacher logits cached") for name in scripts]
    bars = left.barh(names, [row["images_per_second"] for row in scripts.values()])
    left.bar_label(bars, [f"{row['over_plain']:.2f}x" for row in scripts.values()], padding=3)
    left.set(
        xlabel="images a second", title=f"{report['teacher']} -> {report['student']}, batch {report['batch_size']}"
    )
    left.margins(x=0.15)
    rows = {
        f"{name}{'' if len(row['phases']) == 1 else f' ({phase})'}": of["parts_ms"]
        for name, row in report["steps"].items()
        for phase, of in row["phases"].items()
    }
    start = dict.fromkeys(rows, 0.0)
    for part in parts.PARTS:
        widths = [row[part] for row in rows.values()]
        right.barh(list(rows), widths, left=list(start.values()), label=part)
        start = {name: start[name] + row[part] for name, row in rows.items()}
    right.set(xlabel="milliseconds a step", title="where a step's time goes")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
