"""What GTN's machinery costs: an even step against a plain joint step, and a gate step against an even one.

python -m benchmarks.steps --output benchmarks/results/steps.json

The plain joint step is what one would write for fixed branches: the same teacher, the same candidates wired
as ordinary modules, the same losses and optimiser, no gates and no sampling. It is timed on the same path as
the even step, one right after the other, in changing order. Gate steps run on the same pool, drawn as in
training. Times are medians of whole steps: forward, backward, optimiser.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import derive_seed, write_atomically
from data.batch import Batch
from engine.distributed import keep_freed_memory
from engine.objective import Objective, weighted_sum
from engine.run_folder import machine
from kernels import cross_entropy, kd_loss
from models import create_model
from models.network import macs, run_blocks
from models.pool import Pool
from objectives.gtn import GTN, GTNOptions


@dataclass
class Options(GTNOptions):
    """With a seed, which runs have."""

    seed: int = 0


@dataclass
class Setting:
    """What is measured: a teacher, a pool, and a batch of images [batch, 3, size, size]."""

    name: str
    model: str
    pool: Pool
    size: int
    batch: int
    classes: int


class FixedLayer(nn.Module):
    """One candidate as an ordinary layer."""

    def __init__(self, layer: nn.Module, active: int):
        super().__init__()
        self.operation = layer.candidates[layer.names[active]]
        self.shortcut = layer.shortcut

    def forward(self, x):
        out = self.operation(x)
        if out is None:
            return x
        return x + out if self.shortcut else out


class PlainJoint(nn.Module):
    """A teacher with fixed branches, written without GTN's machinery but with the objective's own weights."""

    def __init__(self, objective: GTN, draws: list):
        super().__init__()
        self.teacher, self.alpha = objective.teacher, objective.options.alpha
        rest, branches = list(draws), []
        for branch in objective.branches:
            layers = [FixedLayer(layer, rest.pop(0).active) for layer in branch.supernet.layers]
            branches.append(nn.Sequential(branch.transform, *layers, branch.supernet.head, branch.supernet.fc))
        self.branches = nn.ModuleList(branches)

    def forward(self, images, labels):
        features, logits = run_blocks(self.teacher, images)
        students = torch.stack([branch(x) for branch, x in zip(self.branches, features, strict=True)])
        ce, kl = kd_loss(students, logits, labels, direction="reverse")
        return cross_entropy(logits, labels) + ce.mean() + self.alpha * kl.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, help="paths timed for each setting; default: the setting's own")
    parser.add_argument("--output", default="benchmarks/results/steps.json")
    options = parser.parse_args()
    results = [measure(SETTINGS[name], options.steps or STEPS[name]) for name in options.settings]
    report = {"command": "python -m benchmarks.steps", **machine(), "results": results}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    for row in results:
        size = row["image_size"]
        macs = [f"{row[part] / 1e6:,.1f}M" for part in ("teacher_macs", "branch_macs")]
        times = ", ".join(f"{name} {row[f'{name}_ms']:.1f} ms" for name in ("plain", "even", "gate"))
        print(f"{row['setting']}: {row['model']} at {size}x{size}, batch {row['batch']}, {row['paths']} paths")
        print(f"  multiply-accumulates an image: teacher {macs[0]}, branches together {macs[1]} (mean over paths)")
        print(f"  mean step: {times}")
        share = row["even_share_of_matrix_rate"]
        print(f"  even steps at {row['even_gflops_per_second']:,.0f} GFLOP/s, {share:.0%} of torch.mm's")
        print(f"  even / plain {row['even_over_plain']:.3f} (median over paths; target: at most 1.15)")
        print(f"  gate / even  {row['gate_over_even']:.3f} (of means; target: at most 1.5)")
    print(f"written: {options.output}")


def measure(setting: Setting, paths: int) -> dict:
    """A row of the report: milliseconds of the three steps on `paths` paths."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)  # as the loop does
    torch.manual_seed(0)
    teacher = create_model(setting.model, setting.classes)
    objective = GTN(teacher, Options(pool=setting.pool), setting.size).to(device, memory_format=torch.channels_last)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, setting.classes, (setting.batch,), device=device)
    step = objective_step(objective, images, labels)
    times: dict[str, list[float]] = {"plain": [], "even": [], "gate": []}
    operations = 0
    for number in range(-1, paths):  # the first pass warms up
        iteration = 2 * (number + 1)
        generator = torch.Generator().manual_seed(derive_seed(0, "paths", iteration))
        plain = plain_step(PlainJoint(objective, objective.gates.draw(generator)), images, labels)
        steps = [("plain", plain), ("even", lambda i=iteration: step(i)), ("gate", lambda i=iteration: step(i + 1))]
        if number >= 0:
            with FlopCounterMode(display=False) as counter:
                step(iteration)
            operations += counter.get_total_flops()
        for name, run in steps if number % 2 else [steps[1], steps[0], steps[2]]:
            run()  # memory of this path's shapes is allocated, its kernels chosen
            seconds = clock(run, device)
            if number >= 0:
                times[name].append(seconds)
    ratios = [e / p for e, p in zip(times["even"], times["plain"], strict=True)]
    rate = operations / sum(times["even"])
    teacher_macs, branch_macs = macs(teacher, images[:1])[0], objective.branch_macs(setting.size)
    return {
        "setting": setting.name,
        "model": setting.model,
        "image_size": setting.size,
        "batch": setting.batch,
        "paths": paths,
        "teacher_macs": teacher_macs,
        "branch_macs": branch_macs,
        **{f"{name}_ms": 1000 * statistics.mean(values) for name, values in times.items()},
        "even_gflops_per_second": rate / 1e9,
        "even_share_of_matrix_rate": rate / matrix_rate(images.dtype, device),
        "even_over_plain": statistics.median(ratios),
        "even_over_plain_quartiles": statistics.quantiles(ratios, n=4)[::2],
        # Paths differ in cost and a gate step draws its own: only the means over many paths compare.
        "gate_over_even": statistics.mean(times["gate"]) / statistics.mean(times["even"]),
    }


def objective_step(objective: Objective, images, labels):
    """A training step as a function of its iteration: GTN's even ones update weights, odd ones gates."""
    sgd = torch.optim.SGD(objective.weight_parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    batch = Batch(images, labels)

    def step(iteration: int) -> None:
        phase = objective.phase(iteration)
        optimizer = phase.optimizer if phase else sgd
        loss = weighted_sum(objective, objective(batch, iteration))
        loss.backward(inputs=phase.grad_inputs() if phase else None)
        if phase:
            phase.before_update(lambda gradient: gradient)
        optimizer.step()
        optimizer.zero_grad()
        phase.after_update() if phase else objective.after_step()

    return step


def plain_step(network: nn.Module, images, labels):
    """A training step without GTN's machinery."""
    sgd = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        network(images, labels).backward()
        sgd.step()
        sgd.zero_grad()

    return step


def clock(step, device: torch.device) -> float:
    """Seconds that a step takes, its kernels waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a product of two square matrices; the best of ten."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(clock(lambda: torch.mm(a, b), device) for _ in range(10))


def recipe_setting(name: str, path: str, size: int, batch: int, classes: int) -> Setting:
    """The setting of a recipe's teacher and pool."""
    recipe = yaml.safe_load(Path(path).read_text())
    return Setting(name, recipe["model"], Pool(**recipe.get("pool", {})), size, batch, classes)


SETTINGS = {
    "digits": recipe_setting("digits", "recipes/digits_gtn.yaml", 16, 64, 10),
    "cifar100": recipe_setting("cifar100", "recipes/cifar100_resnet32_gtn.yaml", 32, 8, 100),
}
STEPS = {"digits": 60, "cifar100": 24}


if __name__ == "__main__":
    main()
