"""What teachers cost: an epoch of a vanilla, an SFTN and a GTN teacher, for 1 to 10 students of a pool.

python -m benchmarks.cost --output benchmarks/results/cost.json

One SFTN teacher serves one student, one GTN teacher all of them: SFTN's cost is the sum over students, GTN's does not
depend on them. Steps are timed on one batch, taking turns: GTN's are the mean over drawn paths, weight and gate steps
in the proportion of --gate_every; SFTN's branches are those of pool:0, pool:1, ... An epoch is as many batches for all.
Peak memory is that of a process that trains this teacher alone (SFTN: for pool:0), on a GPU of its allocations.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from benchmarks.steps import SETTINGS, Options, Setting, clock, objective_step
from common import write_atomically
from engine.distributed import keep_freed_memory
from engine.objective import Objective
from engine.run_folder import machine, peak_memory_bytes
from models import create_model
from models.network import count_parameters
from objectives.gtn import GTN
from objectives.sftn import SFTN
from objectives.vanilla import Vanilla, VanillaOptions


@dataclass
class SFTNOptions(Options):
    """Also those of SFTN's branches."""

    student: str = "pool:0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--students", type=int, default=10)
    parser.add_argument("--paths", type=int, default=24, help="paths of GTN that are timed")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch")
    parser.add_argument("--peak", help="only print this teacher's peak memory in bytes: vanilla, sftn0, gtn")
    parser.add_argument("--output", default="benchmarks/results/cost.json")
    options = parser.parse_args()
    if options.peak:
        train_a_little(SETTINGS[options.settings[0]], options.peak)
        print(peak_memory_bytes())
        return
    results = []
    for name in options.settings:
        peaks = {kind: peak(name, kind) for kind in ("vanilla", "sftn0", "gtn")}
        results.append(measure(SETTINGS[name], options.students, options.paths, options.images) | {"peak_bytes": peaks})
    report = {"command": "python -m benchmarks.cost", **machine(), "results": results}
    output = Path(options.output)
    write_atomically(output, json.dumps(report, indent=1) + "\n")
    plot(results, output.with_suffix(".png"))
    print(f"an epoch of {options.images:,} images on {report['device']}")
    for row in results:
        print(f"{row['setting']}: {row['model']}, batch {row['batch']}; seconds (images/s), peak memory")
        for name, largest in zip(("vanilla", "sftn", "gtn"), row["peak_bytes"].values(), strict=True):
            seconds = row[f"{name}_seconds"]
            print(f"  {name:<8} {seconds:>9.1f}  ({options.images / seconds:,.0f})  {largest / 1e9:.2f} GB")
        ratio = row["gtn_over_sftn"]
        print(f"  one GTN teacher costs {ratio:.2f} SFTN teachers (target: at most 2), however many students")
    print(f"written: {output}, {output.with_suffix('.png')}")


def peak(setting: str, kind: str) -> int:
    """Peak memory in bytes of a process that trains one teacher."""
    command = [sys.executable, "-m", "benchmarks.cost", "--settings", setting, "--peak", kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def train_a_little(setting: Setting, kind: str) -> None:
    """Ten steps: GTN's largest paths are among the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)  # as the loop does
    step = objective_step(
        make(setting, kind).to(device, memory_format=torch.channels_last), *random_batch(setting, device)
    )
    for iteration in range(10):
        step(iteration)


def make(setting: Setting, kind: str) -> Objective:
    """vanilla, gtn, or sftnSEED: for the pool's member SEED."""
    teacher = create_model(setting.model, setting.classes)
    if kind == "vanilla":
        return Vanilla(teacher, VanillaOptions(), setting.size)
    if kind == "gtn":
        return GTN(teacher, Options(pool=setting.pool), setting.size)
    student = f"pool:{kind.removeprefix('sftn')}"
    return SFTN(teacher, SFTNOptions(pool=setting.pool, student=student), setting.size)


def random_batch(setting: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a setting's shapes."""
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)
    labels = torch.randint(0, setting.classes, (setting.batch,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def measure(setting: Setting, students: int, paths: int, images: int) -> dict:
    """A row of the report: seconds of an epoch of each teacher, and their parameters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)  # as the loop does
    torch.manual_seed(0)
    kinds = ["vanilla", *(f"sftn{seed}" for seed in range(students)), "gtn"]
    made = {kind: make(setting, kind).to(device, memory_format=torch.channels_last) for kind in kinds}
    batch = random_batch(setting, device)
    steps = {name: objective_step(each, *batch) for name, each in made.items()}
    weights, gates = [], []
    others: dict[str, list[float]] = {name: [] for name in made if name != "gtn"}
    for number in tqdm(range(-1, paths), desc=setting.name, leave=False, disable=None):  # the first warms up
        iteration = 2 * (number + 1)
        for times, place in ((weights, iteration), (gates, iteration + 1)):
            steps["gtn"](place)  # memory of this path's shapes is allocated, its kernels chosen
            seconds = clock(lambda place=place: steps["gtn"](place), device)
            if number >= 0:
                times.append(seconds)
        if number < max(3, paths // 4):
            for name, times in others.items():
                seconds = clock(lambda name=name: steps[name](0), device)
                if number >= 0:
                    times.append(seconds)
    batches = images / setting.batch
    every = made["gtn"].options.gate_every
    sftn = [batches * statistics.median(others[f"sftn{seed}"]) for seed in range(students)]
    gtn = batches * (statistics.mean(weights) * (every - 1) + statistics.mean(gates)) / every
    return {
        "setting": setting.name,
        "model": setting.model,
        "image_size": setting.size,
        "batch": setting.batch,
        "images": images,
        "vanilla_seconds": batches * statistics.median(others["vanilla"]),
        "sftn_seconds": statistics.mean(sftn),
        "sftn_seconds_each": sftn,
        "gtn_seconds": gtn,
        "gtn_over_sftn": gtn / statistics.mean(sftn),
        "parameters": {name: count_parameters(each) for name, each in made.items()},
    }


def plot(results: list[dict], path: Path) -> None:
    """Seconds of an epoch by the number of students."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False)
    for axis, row in zip(axes[0], results, strict=True):
        students = range(1, len(row["sftn_seconds_each"]) + 1)
        sums = [sum(row["sftn_seconds_each"][:count]) for count in students]
        axis.plot(students, sums, marker="o", label="SFTN, a teacher each")
        axis.plot(students, [row["gtn_seconds"]] * len(students), label="GTN, one for all")
        axis.plot(students, [row["vanilla_seconds"]] * len(students), label="vanilla, one for all", linestyle=":")
        axis.set(xlabel="students", ylabel=f"seconds an epoch of {row['images']:,} images", ylim=(0, None))
        axis.set_title(f"{row['model']} at {row['image_size']}x{row['image_size']}, {row['setting']}'s pool")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
