"""What training steps take on a GPU: as they come, compiled, and from CUDA graphs; and what the figures asked for are.

python -m benchmarks.gpu_steps            on an NVIDIA GPU
python -m benchmarks.gpu_steps --only kd  the rows whose name has one of these words

Steps are the real loop's (engine/loop.py) on images of noise, with all that it does: batches, schedules, a look at the
losses every 20 steps. A row's time is the median of windows of 20 steps that are waited for at their end, so that the
host runs ahead of the device as it does in training. "device" is the time in which the device was at work, "matrix"
that in kernels of convolutions and matrix products, by PyTorch's profiler. GTN's steps of the weights and of the gates
are timed apart. The plain script is that of benchmarks/baselines.py.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity

import kernels
from benchmarks.baselines import plain_script
from benchmarks.data import PillowDataset, random_set
from benchmarks.kernels import print_verdicts
from benchmarks.parts import IMAGES, POOL, make_config, make_loop
from common import UserError, write_atomically
from engine.distributed import run_script
from engine.loop import READ_EVERY, Loop
from engine.piece_graphs import PieceGraphs
from engine.run_folder import machine
from engine.totals import Totals
from models import create_model
from models.compiled import compile_regions
from models.pool import Pool

TEACHER, STUDENT = "resnet32x4", "resnet8x4"
POOLS = {"narrow": POOL, "paper's": Pool()}
MATRIX = re.compile("gemm|conv|xmma|cutlass|cudnn|wgrad|dgrad|fprop|sm90", re.IGNORECASE)
MOST_WARM_UPS = 600  # steps until no path has a piece that was never captured
PLAIN, KD, GRAPH, COMPILED = "plain script", "kd", "kd, one CUDA graph", "kd, compiled, one CUDA graph"


@dataclass(frozen=True)
class Case:
    """A row: an objective, or the plain script where it is None."""

    objective: str | None
    batch_size: int = 64
    teacher: str = TEACHER
    student: str = STUDENT
    pool: str = "narrow"
    precision: str = "bf16"
    compile: bool = False
    cuda_graph: bool = False
    share_branches: bool = False


GRAPHED = {"cuda_graph": True}
PAPERS = {"teacher": "resnet32", "pool": "paper's"}
CASES = {PLAIN: Case(None, precision="no"), KD: Case("kd"), GRAPH: Case("kd", **GRAPHED)}
CASES |= {"kd, batch 1024": Case("kd", 1024), "kd, batch 1024, one CUDA graph": Case("kd", 1024, **GRAPHED)}
CASES |= {f"sftn of pool:{i}": Case("sftn", student=f"pool:{i}") for i in range(1, 4)}
CASES |= {"gtn": Case("gtn"), "gtn, graphs of its pieces": Case("gtn", **GRAPHED), "vanilla": Case("vanilla")}
CASES |= {"gtn, shared branches, graphs of its pieces": Case("gtn", share_branches=True, **GRAPHED)}
CASES |= {"vanilla, one CUDA graph": Case("vanilla", **GRAPHED)}
CASES |= {"gtn, paper's pool": Case("gtn", **PAPERS)}
CASES |= {"gtn, paper's pool, graphs of its pieces": Case("gtn", **PAPERS, **GRAPHED)}
CASES |= {"kd, compiled": Case("kd", compile=True), COMPILED: Case("kd", compile=True, **GRAPHED)}
CASES |= {"kd, float32": Case("kd", precision="no")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words of the names of rows; default: all rows")
    parser.add_argument("--windows", type=int, default=8, help="timed windows of 20 steps of each row")
    parser.add_argument("--minutes", type=float, default=8, help="no row is begun after these")
    parser.add_argument("--output", default="benchmarks/results/gpu_steps.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks.gpu_steps: needs an NVIDIA GPU; benchmarks.training measures steps anywhere")
    chosen = [name for name in CASES if not options.only or any(word in name for word in options.only)]
    start, rows = time.perf_counter(), {}
    implementation = kernels.use("auto", "cuda")
    for name in chosen:
        if time.perf_counter() - start > 60 * options.minutes:
            print(f"left out after {options.minutes:g} minutes: {name}")
            continue
        rows[name] = row(CASES[name], options.windows)
        print(line(name, rows[name]), flush=True)
    found = figures(rows)
    print_verdicts(found)
    report = {"command": " ".join(["python -m benchmarks.gpu_steps", *sys.argv[1:]]), **machine()}
    report |= {"kernels": implementation, "image_size": 32, "images": IMAGES, "rows": rows}
    report["figures"] = [dict(zip(("what", "value", "comparison", "target"), each, strict=True)) for each in found]
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"written: {options.output}")


def row(case: Case, windows: int) -> dict:
    """What was measured of a case: `phases` by name, images a second, memory."""
    described = asdict(case)
    if case.objective is None:
        return described | {"images_per_second": plain(case)}
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first row's precision
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        given = {"pool": POOLS[case.pool], "cuda_graph": case.cuda_graph, "lr": 1e-4}
        given |= {"share_branches": case.share_branches}
        config = make_config(case.objective, case.student, case.batch_size, case.precision, folder, **given)
        loop = make_loop(case.objective, case.teacher, config, random_set(IMAGES))
        if case.compile:
            compile_regions(loop.objective)
        phases = measure(loop, windows)
        seconds = sum(phase["step_ms"] for phase in phases.values()) / len(phases) / 1000
        described |= {"images_per_second": case.batch_size / seconds, "phases": phases}
        if isinstance(loop.graph, PieceGraphs):
            described["captured"] = captured(loop)
    return described | {"peak_memory_bytes": torch.cuda.max_memory_reserved()}


def plain(case: Case) -> float:
    """Images a second of the plain script."""
    data = random_set(IMAGES)
    pillow = PillowDataset(data.train.pixels.permute(0, 2, 3, 1).contiguous().numpy(), data.train.labels.tolist())
    networks = [create_model(name, data.num_classes, image_size=32) for name in (case.teacher, case.student)]
    return plain_script(*networks, pillow, case.batch_size, torch.device("cuda"))


def measure(loop: Loop, windows: int) -> dict[str, dict]:
    """Milliseconds of the steps of each phase, and what the device does in them."""
    objective, totals, found = loop.objective, Totals({}), {}
    objective.begin_epoch(0)
    objective.train()
    full = (batch for batch in endless(loop) if len(batch.labels) == loop.config.batch_size)
    alternate = objective.phase(1) is not None
    first_of = {"weights": 0} | ({objective.phase(1).name: 1} if alternate else {})
    numbers = dict(first_of)  # the next iteration of each phase

    def steps(phase: str, number: int) -> None:
        for _ in range(number):
            loop.progress.iteration = numbers[phase]
            loop.step(next(full), totals)
            numbers[phase] += 1 + alternate
        totals.read()

    for phase in first_of:
        warm_up(loop, lambda phase=phase: steps(phase, READ_EVERY))
        seconds = []
        for _ in range(windows):
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps(phase, READ_EVERY)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / READ_EVERY)
        found[phase] = {"step_ms": 1000 * statistics.median(seconds), "steps_ms": [1000 * each for each in seconds]}
        found[phase] |= on_device(lambda phase=phase: steps(phase, READ_EVERY), READ_EVERY)
    return found


def endless(loop: Loop) -> Iterable:
    """Batches of epoch after epoch; the step's epoch stays 0, so that a graph is captured once."""
    for epoch in count():
        yield from loop.train.epoch(epoch)


def warm_up(loop: Loop, window) -> None:
    """Run windows until memory is allocated, kernels are chosen, and the graphs of a window were there before it."""
    window()
    if isinstance(loop.graph, PieceGraphs):
        before = -1
        for _ in range(MOST_WARM_UPS // READ_EVERY):
            if (now := captured(loop)) == before:
                break
            before = now
            window()


def captured(loop: Loop) -> int:
    """Uses of modules that have graphs."""
    return sum(len(piece.recorded) for piece in loop.graph.pieces)


def on_device(run, steps: int) -> dict:
    """Launches, and milliseconds of the device at work and in matrix kernels, of one of `steps` steps."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    work = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    names: dict[str, float] = {}
    for each in work:
        names[each.name] = names.get(each.name, 0.0) + each.device_time / 1000 / steps
    matrix = sum(ms for name, ms in names.items() if MATRIX.search(name))
    longest = sorted(names.items(), key=lambda pair: -pair[1])[:12]
    found = {"kernels": len(work) / steps, "device_ms": sum(names.values()), "matrix_ms": matrix}
    return found | {"longest_ms": {name[:160]: ms for name, ms in longest}}


def figures(rows: dict[str, dict]) -> list[tuple[str, float | None, str, float]]:
    """(what, measured value or None, "at least" or "at most", target)."""

    def speed(name: str) -> float | None:
        return rows[name]["images_per_second"] if name in rows else None

    def step(name: str, phase: str = "weights") -> float | None:
        return rows[name]["phases"][phase]["step_ms"] if name in rows else None

    def over(one: float | None, other: float | None) -> float | None:
        return None if None in (one, other) else one / other

    best = max((each for each in map(speed, (KD, GRAPH, COMPILED)) if each), default=None)
    found = [(f"{name}: images/s, times the plain script's", over(speed(name), speed(PLAIN)), "at least", 5.0)
             for name in (KD, GRAPH, COMPILED)]  # fmt: skip
    found.append(("240 epochs of 50,000 images, minutes", over(240 * 50_000 / 60, best), "at most", 10.0))
    large = rows.get("kd, batch 1024", {}).get("phases", {}).get("weights")
    share = large and large["matrix_ms"] / large["step_ms"]
    found.append(("kd, batch 1024: share of time in matrix kernels", share, "at least", 0.4))
    sftn = [step(name) for name in rows if name.startswith("sftn")]
    sftn = statistics.mean(sftn) if sftn else None
    for name in ("gtn", "gtn, graphs of its pieces"):
        weights, gates = step(name), step(name, "gates")
        found.append((f"{name}: step of the weights over SFTN's", over(weights, sftn), "at most", 1.1))
        found.append((f"{name}: step of the gates over one of the weights", over(gates, weights), "at most", 1.5))
        both = weights and (weights + gates) / 2
        found.append((f"{name}: an epoch over SFTN's", over(both, sftn), "at most", 2.0))
    return found


def line(name: str, row: dict) -> str:
    """A row of the table."""
    start = f"{name:42} {row['images_per_second']:>9,.0f} images/s"
    for phase, of in row.get("phases", {}).items():
        start += f"  {phase}: {of['step_ms']:.2f} ms (device {of['device_ms']:.2f}, matrix {of['matrix_ms']:.2f}, "
        start += f"{of['kernels']:.0f} kernels)"
    return start


if __name__ == "__main__":
    run_script(main)
