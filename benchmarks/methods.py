"""What each distillation method costs: its training step over that of plain KD.

python -m benchmarks.methods --output benchmarks/results/methods.json

A step is the student's and the teacher's forward pass, the losses, the backward pass and the update, on the same
batch for all methods, which take turns: medians of ratios within a round. Methods with a warm-up are timed after it.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.steps import clock
from common import write_atomically
from data.batch import Batch
from engine.distributed import keep_freed_memory
from engine.objective import weighted_sum
from engine.run_folder import machine
from losses.registry import METHODS
from models import create_model
from models.fused import fuse
from models.network import Network
from objectives.distillation import Distillation, build_methods

SIDE, CLASSES, IMAGES = 32, 100, 50_000
TARGETS = {"sskd": None, "hsakd": None, "crd": 1.8}  # of all others 1.5; four rotations cost what they cost


@dataclass
class Options:
    """What the methods read of a run's options."""

    alpha: float = 0.9
    temperature: float = 4.0
    ce_weight: float | None = None
    kd_weight: float | None = None
    method_weights: tuple[float, ...] = ()
    dkd_alpha: float = 1.0
    dkd_beta: float | None = None
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="wrn40_2")
    parser.add_argument("--student", default="wrn16_2")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each method")
    parser.add_argument("--output", default="benchmarks/results/methods.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)  # as the loop does
    rows = measure(options.teacher, options.student, options.batch_size, options.rounds, device)
    context = {"teacher": options.teacher, "student": options.student, "batch_size": options.batch_size}
    report = {"command": "python -m benchmarks.methods", **machine(), **context, "rounds": options.rounds, "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.teacher} -> {options.student}, batch {options.batch_size}, on {report['device']}")
    for row in rows:
        target = "" if row["target"] is None else f"(target: at most {row['target']})"
        print(f"  {row['method']:<10} {row['milliseconds']:>9.1f} ms  {row['over_kd']:.2f} x kd  {target}")
    print(f"written: {options.output}")


def measure(teacher_name: str, student_name: str, batch_size: int, rounds: int, device: torch.device) -> list[dict]:
    """A row for each method: milliseconds of a step, and over those of KD."""
    torch.manual_seed(0)
    teacher = create_model(teacher_name, CLASSES)
    images = torch.randn(batch_size, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch_size,), device=device)
    batch = Batch(images, labels, indices=torch.randperm(IMAGES)[:batch_size].to(device))
    names = [name for name, method in METHODS.items() if method.needs_teacher]
    steps = {name: make_step(name, teacher, student_name, teacher_name, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(-1, rounds), desc="rounds", leave=False, disable=None):  # the first warms up
        for name in names if number % 2 else reversed(names):
            took = clock(lambda name=name: steps[name](batch), device)
            if number >= 0:
                seconds[name].append(took)
    return [
        {
            "method": name,
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "over_kd": statistics.median(a / b for a, b in zip(seconds[name], seconds["kd"], strict=True)),
            "target": TARGETS.get(name, 1.5),
        }
        for name in names
    ]


def make_objective(
    name: str, teacher: Network, names: tuple[str, str], labels: torch.Tensor, options: object
) -> Distillation:
    """One method's, as distill.py makes it; `names` are the student's and the teacher's, `labels` the split's."""
    classes = teacher.fc.out_features
    student = create_model(names[0], classes, image_size=SIDE)
    methods, weights = build_methods([METHODS[name]], student, [teacher], SIDE, classes, labels, options, names)
    fuse(teacher)
    return Distillation(student, [teacher], methods, weights, options=options)


def make_step(name: str, teacher, student_name: str, teacher_name: str, device: torch.device):
    """A training step of one method, as engine.loop takes it, without the loop around it."""
    options, labels = Options(), torch.arange(IMAGES) % CLASSES
    objective = make_objective(name, teacher, (student_name, teacher_name), labels, options)
    objective = objective.to(device, memory_format=torch.channels_last)
    trained = objective.weight_parameters()
    sgd = torch.optim.SGD(trained, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    objective.begin_epoch(0)
    objective.train()

    def step(batch: Batch) -> None:
        weighted_sum(objective, objective(batch, 0)).backward()
        sgd.step()
        sgd.zero_grad()
        objective.after_step()

    return step


if __name__ == "__main__":
    main()
