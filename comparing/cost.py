"""What runs will cost: images, floating-point operations, seconds by a measured step, disk."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from comparing.planned import PlannedRun
from data.datasets import load_images
from engine.distributed import keep_freed_memory
from losses.registry import find_methods
from models import create_model, is_model, load_pretrained
from models.network import cost as network_cost
from models.pool import Pool
from objectives.registry import TEACHERS

SECONDS_A_RUN = 2.0  # for data, plots and measures, besides steps
STEPS, TIMED_SECONDS = 8, 5.0  # that are timed at the most; the fastest counts
STEP_FLOPS = 2e11  # of a timed step: a larger batch is cut, so that a CPU takes seconds


@dataclass(frozen=True)
class Size:
    """Of a data set: images of the training and the test split, classes, side."""

    train: int
    test: int
    classes: int
    side: int


KNOWN = {
    "digits": Size(1_437, 360, 10, 16),
    "cifar10": Size(50_000, 10_000, 10, 32),
    "cifar100": Size(50_000, 10_000, 100, 32),
    "stl10": Size(5_000, 8_000, 10, 96),
    "tiny_imagenet": Size(100_000, 10_000, 200, 64),
    "imagenet": Size(1_281_167, 50_000, 1_000, 224),
    "imagenet200": Size(258_601, 10_000, 200, 224),
}


@dataclass(frozen=True)
class Cost:
    """Of one run or of several: images trained on, operations, bytes that stay on disk."""

    runs: int = 0
    images: int = 0
    flops: float = 0.0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.runs + other.runs, self.images + other.images, self.flops + other.flops, self.bytes + other.bytes
        )

    def seconds(self, rate: float) -> float:
        """At `rate` operations a second."""
        return SECONDS_A_RUN * self.runs + self.flops / rate


def of_run(run: PlannedRun) -> Cost:
    """Of training on every image of every epoch, three times a forward pass, and of the test images after each."""
    config = run.config
    size = size_of(run)
    train = size.train * config.train_fraction * (1 - config.val_fraction)
    train *= 1 - len(set(config.exclude_classes)) / size.classes
    images = round(train * config.last_epoch)
    side = config.image_size or size.side
    if run.script == "train_teacher.py":
        parameters, evaluated = _teacher(run, size.classes, side)
        trained, frozen = evaluated, 0.0
    else:
        parameters, trained = _network(config.student, size.classes, side, _pool(run))
        evaluated, frozen = trained, _frozen(run, size.classes, side)
        for name in getattr(config, "peers", []) if find_methods(config.method)[0].peers else []:
            trained += _network(name, size.classes, side, _pool(run))[1]
            evaluated = trained
    flops = images * (3 * trained + frozen) + size.test * config.last_epoch * evaluated
    return Cost(1, images, flops, 4 * parameters)


def estimate(runs: Sequence[PlannedRun], slots: int = 1) -> dict:
    """What runs will cost, each key once, `slots` of them going on at a time.

    Returns `images`, `flops`, `bytes` (that stay on disk), `seconds`, `rate` (operations a second), `measured` (how the
    rate was found, in words) and `by_run`, seconds by name. To be called in a fork: it computes.

    Raises:
        UserError: a data set that is not known and cannot be read.
    """
    once = {run.key: run for run in runs}
    costs = {key: of_run(run) for key, run in once.items()}
    every = sum(costs.values(), Cost())
    rate, measured = measured_rate(once[max(costs, key=lambda key: costs[key].flops)], slots)
    return {
        "runs": every.runs,
        "images": every.images,
        "flops": every.flops,
        "bytes": every.bytes,
        "seconds": every.seconds(rate) / slots,
        "measured": measured,
        "by_run": {run.name: costs[run.key].seconds(rate) for run in runs},
    }


def measured_rate(run: PlannedRun, slots: int = 1) -> tuple[float, str]:
    """(operations a second, in words how it was measured): steps of a run's network on its batch, with labels alone."""
    size, config = size_of(run), run.config
    name = _model(run) if run.script == "train_teacher.py" else config.student
    side, pool = config.image_size or size.side, _pool(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // slots))
    keep_freed_memory(device)  # as the loop does
    network = create_model(name, size.classes, pool, image_size=side)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    flops = 3 * _network(name, size.classes, side, pool)[1]
    batch = max(2, min(config.batch_size, round(STEP_FLOPS / flops)))
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    seconds = []
    while len(seconds) < 2 or (len(seconds) < STEPS and sum(seconds) < TIMED_SECONDS):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            loss = cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    step = min(seconds)
    return flops * batch / step, f"a step of {batch} images of {name} at {side}x{side} took {step:.3f} s"


def size_of(run: PlannedRun) -> Size:
    """Of the run's data set: known by name, else read, in a fork."""
    config = run.config
    source = run.teacher or run.weights
    name = run.dataset or config.dataset or (None if source else "digits")
    if name is None:
        return size_of(source)
    if name in KNOWN:
        return KNOWN[name]
    return _read_size(name, config.image_size)


@cache
def _read_size(name: str, image_size: int | None) -> Size:
    found = load_images(name, image_size)
    return Size(len(found.train), len(found.test), found.num_classes, found.image_size)


def _model(run: PlannedRun) -> str:
    """The name of a teacher's network, which may be that of the run it starts from."""
    if run.config.model is None and run.weights:
        return _model(run.weights)
    return run.config.model or "resnet20"


def _pool(run: PlannedRun) -> Pool | None:
    """The pool of a run's pool:SEED: its own, else its teacher's."""
    own = getattr(run.config, "pool", None)
    return _pool(run.teacher) if own is None and run.teacher else own


def _teacher(run: PlannedRun, classes: int, side: int) -> tuple[int, float]:
    """(parameters, operations an image in a forward pass) of a teacher, the latter with its branches'."""
    config, model = run.config, _model(run)
    parameters, own = _network(model, classes, side, config.pool)
    if config.method not in ("sftn", "gtn"):
        return parameters, own
    shape = (config.method, model, config.student, repr(config.pool), config.branches, config.teacher_cut)
    shape += (config.teacher_stages,)
    key = json.dumps([*shape, classes, side])
    if key not in _branches:
        with torch.device("meta"):
            teacher = create_model(model, classes, config.pool, image_size=side, stages=config.teacher_stages)
            objective = TEACHERS[config.method].build(teacher, config, side).eval()
            if config.method == "gtn":
                _branches[key] = own + 2 * objective.branch_macs(side, uniform=True)
            else:
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    objective.predict(torch.zeros(1, 3, side, side), 0)
                _branches[key] = counter.get_total_flops()
    return parameters, _branches[key]


_branches: dict[str, float] = {}


def _frozen(run: PlannedRun, classes: int, side: int) -> float:
    """Operations an image of a student's teachers."""
    if run.teacher:
        return _network(_model(run.teacher), classes, side, None)[1]
    found = 0.0
    for place in getattr(run.config, "teacher", []) if find_methods(run.config.method)[0].needs_teacher else []:
        name = place if is_model(place) else load_pretrained(place).info.name
        found += _network(name, classes, side, _pool(run))[1]
    return found


def _network(name: str, classes: int, side: int, pool: Pool | None) -> tuple[int, float]:
    """(parameters, operations an image in a forward pass); nothing is computed."""
    key = json.dumps([name, classes, side, repr(pool) if name.startswith("pool:") else ""])
    if key not in _networks:
        with torch.device("meta"):
            model = create_model(name, classes, pool, "network of a run", image_size=side).eval()
            _networks[key] = network_cost(model, side)[:2]
    return _networks[key]


_networks: dict[str, tuple[int, float]] = {}
