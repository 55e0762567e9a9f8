"""Where a training step's time goes: one objective under the real loop, in a process of its own.

python -m benchmarks.parts --objective gtn --precision bf16

Prints JSON: for each of the objective's phases the milliseconds of a step, run as it is, and of its parts, each
waited for; its floating-point operations a second, and their share of what a large matrix product reaches; and the peak
memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import random_set
from benchmarks.methods import make_objective
from benchmarks.steps import clock, matrix_rate
from data.splits import ImageSet
from engine.config import RunConfig
from engine.console import Console
from engine.distributed import keep_freed_memory, start_accelerator
from engine.loop import Loop
from engine.objective import Objective
from engine.run_folder import RunFolder, peak_memory_bytes
from engine.totals import Totals
from losses.registry import METHODS
from models import create_model
from models.pool import Pool
from objectives.distillation import Distillation
from objectives.gtn import GTNOptions
from objectives.registry import TEACHERS
from objectives.vanilla import VanillaOptions

OBJECTIVES = ("vanilla", "sftn", "gtn", "kd", "at", "crd")
PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser", "gates", "rest")
SIDE, IMAGES = 32, 10_000
POOL = Pool(**yaml.safe_load(Path("recipes/digits_gtn.yaml").read_text())["pool"])


@dataclass
class Config(GTNOptions, VanillaOptions, RunConfig):
    """The options of both scripts that the measured objectives read."""

    student: str | None = None
    gate_every: int = 2
    ce_weight: float | None = None
    kd_weight: float | None = None
    method_weights: tuple[float, ...] = ()
    dkd_alpha: float = 1.0
    dkd_beta: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="kd")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4", help="also of SFTN's branches; GTN's are of the demo's pool")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each phase")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(options.objective, options.student, options.batch_size, options.precision, folder)
        loop = make_loop(options.objective, options.teacher, config, random_set(IMAGES))
        print(json.dumps(measure(loop, options.steps)))


def make_config(name: str, student: str, batch_size: int, precision: str, folder: str, **changes) -> Config:
    """The options of an objective's run, at the benchmark's size."""
    usual = {} if name in TEACHERS else {"alpha": 0.9, "temperature": 4.0}
    student = student if name in METHODS or name == "sftn" else None
    sizes = {"image_size": SIDE, "batch_size": batch_size, "crop_padding": 4, "flip": True, "pool": POOL}
    return Config(**usual | sizes | changes, student=student, mixed_precision=precision, output_dir=folder)


def make_loop(name: str, teacher_name: str, config: Config, data: ImageSet) -> Loop:
    """The real loop of an objective by its name."""
    torch.manual_seed(0)
    teacher = create_model(teacher_name, data.num_classes, image_size=SIDE)
    if name in TEACHERS:
        objective = TEACHERS[name].objective(teacher, config, SIDE)
    else:
        objective = make_objective(name, teacher, (config.student, teacher_name), data.train.labels, config)
    return loop_of(objective, data, config)


def loop_of(objective: Objective, data: ImageSet, config: Config) -> Loop:
    """The real loop, ready to take steps."""
    accelerator = start_accelerator(config.mixed_precision, None, config.output_dir)
    keep_freed_memory(accelerator.device)  # as a run does
    return Loop(objective, data, config, accelerator, RunFolder(config.output_dir), Console(False))


def phase_name(objective: Objective, iteration: int) -> str:
    """The name of an iteration's phase."""
    phase = objective.phase(iteration)
    return phase.name if phase else "weights"


def measure(loop: Loop, steps: int) -> dict:
    """Milliseconds, operations and parts of `steps` steps of each phase."""
    device, objective = loop.accelerator.device, loop.objective
    objective.begin_epoch(0)
    objective.train()
    totals, phases = Totals({}), dict.fromkeys(phase_name(objective, iteration) for iteration in range(2))

    def runs(batches: Iterator) -> Iterator[tuple[str, Callable[[], None]]]:
        """The phase and the step of every iteration from 0 on, after the first of each phase."""
        loop.progress.iteration = 0
        for number in range((1 + steps) * len(phases)):
            phase = phase_name(objective, loop.progress.iteration)
            step = lambda: loop.step(next(batches), totals)  # noqa: E731
            if number < len(phases):
                step()  # memory is allocated, kernels are chosen
            else:
                yield phase, step

    times: dict[str, list[float]] = {phase: [] for phase in phases}
    for phase, step in runs(loop.train.epoch(0)):
        times[phase].append(clock(step, device))
    peak_memory = peak_memory_bytes()
    operations: dict[str, list[float]] = {phase: [] for phase in phases}
    for phase, step in runs(loop.train.epoch(0)):
        with FlopCounterMode(display=False) as counter:
            step()
        operations[phase].append(counter.get_total_flops())
    watch = PartTimer(device)
    batches = watch_loop(watch, loop)
    parts: dict[str, list[dict[str, float]]] = {phase: [] for phase in phases}
    for phase, step in runs(batches):
        watch.start()
        step()
        parts[phase].append(watch.read())
    fastest = matrix_rate(torch.bfloat16 if loop.accelerator.mixed_precision == "bf16" else torch.float32, device)
    rows = {}
    for phase in phases:
        seconds = statistics.median(times[phase])
        rate = sum(operations[phase]) / sum(times[phase])
        medians = {part: 1000 * statistics.median(each[part] for each in parts[phase]) for part in PARTS}
        rows[phase] = {"step_ms": 1000 * seconds, "parts_ms": medians, "gflops_per_second": rate / 1e9}
        rows[phase]["share_of_matrix_rate"] = rate / fastest
    return {"phases": rows, "matrix_gflops_per_second": fastest / 1e9, "peak_memory_bytes": peak_memory}


class PartTimer:
    """Seconds by part. What runs within a part and is a part itself counts for itself alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        self.seconds, self.running = dict.fromkeys(PARTS, 0.0), ["rest"]
        self.last = self._now()

    def read(self) -> dict[str, float]:
        self._charge()
        return self.seconds

    def watched(self, part: str, function: Callable) -> Callable:
        def timed(*arguments, **options):
            self._charge()
            self.running.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._charge()
                self.running.pop()

        return timed

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self.running[-1]] += now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def watch_loop(watch: PartTimer, loop: Loop) -> Iterator:
    """Time the parts of the loop's steps from now on; returns its watched batches."""

    def put(owner: object, name: str, part: str) -> None:
        setattr(owner, name, watch.watched(part, getattr(owner, name)))

    objective = loop.objective
    put(objective, "forward", "loss")
    for part, networks in networks_of(objective).items():
        for network in networks:
            put(network, "forward", part)
            for block in getattr(network, "blocks", ()):  # they are also run one by one
                put(block, "forward", part)
    if hasattr(objective, "gates"):
        for name in ("draw", "draw_gate_step", "set_gradient", "finish_update"):
            put(objective.gates, name, "gates")
    put(loop.accelerator, "backward", "backward")
    for stepper in loop.steppers.values():
        put(stepper, "step", "optimiser")
        put(stepper, "zero_grad", "optimiser")
    batches = loop.train.epoch(0)
    following = watch.watched("data", partial(next, batches))
    return (following() for _ in range(len(loop.train)))


def networks_of(objective: Objective) -> dict[str, list[torch.nn.Module]]:
    """Branches stand for students."""
    if isinstance(objective, Distillation):
        return {"teacher": list(objective.frozen), "student": [objective.student]}
    return {"teacher": [objective.teacher], "student": list(getattr(objective, "branches", []))}


if __name__ == "__main__":
    main()
