"""GTN's steps from graphs of their pieces: on a GPU real ones, elsewhere a stand-in that reuses memory as they do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from common import UserError
from data.datasets import load_images
from engine.console import Console
from engine.loop import Loop
from engine.piece_graphs import CudaPieces, PieceGraphs, advice, recorded_steps
from engine.run_folder import RunFolder
from engine.totals import Totals
from models import create_model
from models.pool import Pool
from models.supernet import Draw
from objectives.registry import TEACHERS
from train_teacher import TeacherConfig

GPU = torch.cuda.is_available()
POOL = {"stem": 4, "widths": [4, 4, 8, 8], "strides": [1, 2, 2, 1], "head": 8}
POOL["candidates"] = ["res3x2", "res5x2", "identity", "zero"]


class Reused:
    """Runs a function again where a graph would be replayed, its results in the same tensors each time.

    A graph may use what is free in its pool when it is captured, be it the results of those that are captured later:
    they are NaN once it has run.
    """

    def __init__(self):
        self.results: dict[object, list[list]] = {}  # of the graphs of a pool, in the order of their capture
        self.captured = self.replays = 0

    def pool(self) -> object:
        return object()

    def warm_up(self, function) -> None:
        function()

    def capture(self, function, pool):
        results = self.results.setdefault(pool, [])
        number, mine = len(results), []
        results.append(mine)
        self.captured += 1

        def replay():
            self.replays += 1
            for later in results[number + 1 :]:
                for each in later:
                    each is None or each.fill_(torch.nan)
            new = function()
            mine[:] = mine or [None if each is None else each.detach().clone() for each in new]
            for static, each in zip(mine, new, strict=True):
                static is None or static.copy_(each)
            return mine

        return replay


class Counted(CudaPieces):
    """What a GPU does, counted."""

    def __init__(self):
        self.captured = self.replays = 0

    def capture(self, function, pool):
        self.captured += 1
        replay = super().capture(function, pool)

        def counted():
            self.replays += 1
            return replay()

        return counted


def loop_of(folder, dtype=torch.float64, **options) -> Loop:
    fixed = {"method": "gtn", "model": "resnet8", "pool": Pool(**POOL), "image_size": 8, "batch_size": 8}
    config = TeacherConfig(**fixed | {"lr": 0.01, "epochs": 2, "gate_lr": 0.05, "kernels": "reference"} | options)
    data = load_images("digits", 8)
    data = replace(data, train=data.train.take(torch.arange(160)))
    torch.manual_seed(0)
    objective = TEACHERS["gtn"].build(create_model("resnet8", 10), config, 8).to(dtype)
    return Loop(objective, data, config, Accelerator(), RunFolder(folder), Console(False))


def loops(tmp_path, **options) -> tuple[Loop, Loop, Reused | Counted]:
    """An eager one and one of pieces, alike, and what captures these."""
    eager, pieces = (loop_of(tmp_path / name, **options) for name in ("eager", "pieces"))
    device = Counted() if GPU else Reused()
    pieces.graph = PieceGraphs(pieces._gradients, pieces._apply, pieces.objective.pieces(), device)
    return eager, pieces, device


def observed(loop: Loop, batch, gradients: dict) -> dict[str, torch.Tensor | None]:
    """A step's losses and gradients by name, and now and then all that it leaves."""
    totals, whole = Totals({}), loop.progress.iteration % 10 == 9
    gradients.clear()
    loop.step(batch, totals)
    found = {f"loss {name}": torch.tensor(value) for _, name, value in totals.read()}
    found |= {f"gradient {name}": each for name, each in gradients.items()}
    found |= loop.objective.state_dict() if whole else {}  # weights, statistics, gates
    for name, optimizer in loop.optimizers.items() if whole else ():
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"{name} {number} {key}": each for key, each in state.items()}
    return found


def assert_alike(found: dict, expected: dict, limit: float) -> None:
    """The same names, the same ones absent, and numbers that differ by `limit` of their size in all."""
    assert {name for name, each in found.items() if each is None} == {n for n, x in expected.items() if x is None}
    assert list(found) == list(expected)
    flat = ([x.detach().double().cpu().flatten() for x in f.values() if x is not None] for f in (found, expected))
    one, other = map(torch.cat, flat)
    assert (one - other).norm() <= limit * other.norm()


def watch(loop: Loop) -> dict:
    """Gradients by name, filled in at every step of an optimiser; None for what has none."""
    seen: dict = {}
    named = {**dict(loop.objective.named_parameters()), "phi": loop.objective.gates.phi}

    def record(*_):
        seen.update({name: None if each.grad is None else each.grad.clone() for name, each in named.items()})

    for optimizer in loop.optimizers.values():
        optimizer.register_step_pre_hook(record)
    return seen


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (200, {"branches": [1, 3]}),
        (20, {"full_gates": True, "paths": "one"}),
        (20, {"freeze_teacher_epochs": 1, "teacher_cut": "depth", "branches": [2]}),
        (20, {"gate_steps": "add", "clip_grad": 0.5, "branches": [2]}),
        (60, {"share_branches": True}),
        (20, {"opt": "adamw", "branches": [2]}),
    ],
    ids=["paper", "full", "frozen", "added", "shared", "adamw"],
)
def test_steps_of_pieces_are_the_eager_steps(tmp_path, steps, options):
    """Losses, gradients and their absence, weights, BatchNorm statistics, momenta and gates, on random paths."""
    eager, pieces, device = loops(tmp_path, **options)
    seen, paths = [watch(loop) for loop in (eager, pieces)], set()
    for step in range(steps):
        for loop in (eager, pieces):
            loop.progress.epoch = step * 2 // steps
            loop.objective.begin_epoch(loop.progress.epoch)
            loop.objective.train()
        batch = eager.train.one(step)
        if step % 7 == 6:  # a smaller one, which is not captured
            batch = batch._replace(images=batch.images[:5], labels=batch.labels[:5], indices=batch.indices[:5])
        batch = batch._replace(images=batch.images.double())
        found = [observed(loop, batch, each) for loop, each in zip((eager, pieces), seen, strict=True)]
        assert_alike(*reversed(found), limit=1e-6 if GPU else 1e-10)
        paths.add(tuple(name for name, each in seen[0].items() if each is not None))
    assert len(paths) > steps // 5 and device.replays > 5 * steps
    assert not any("forward" in vars(module) for module in pieces.objective.modules())


def test_pieces_are_captured_as_autocast_has_them(tmp_path):
    eager, pieces, _ = loops(tmp_path, dtype=torch.float32, branches=[2], lr=1e-4)
    seen = [watch(loop) for loop in (eager, pieces)]
    for step in range(2):  # of the weights and of the gates; bf16 itself is 17% from float32 in the first
        batch = eager.train.one(step)
        with torch.autocast(eager.accelerator.device.type, torch.bfloat16):
            found = [observed(loop, batch, each) for loop, each in zip((eager, pieces), seen, strict=True)]
        assert_alike(*reversed(found), limit=0.01)  # a map's gradient is a sum of three terms, in another order


def test_what_would_write_over_memory_in_use_raises(tmp_path):
    """Another step before a backward pass, and a second backward pass before an update."""
    _, pieces, _ = loops(tmp_path, branches=[2])
    layer = pieces.objective.branches[0].supernet.layers[0]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, device=pieces.accelerator.device)
    for graph in pieces.graph.pieces:
        vars(graph.module)["forward"] = graph
    place = vars(layer.candidates["res3x2"])["forward"].place
    one, other = layer(x, Draw(0)), layer(x, Draw(1))
    other.sum().backward()  # a place's modules may run several times in a step
    place.turn = 0  # as a step begins
    again = layer(x, Draw(0))
    with pytest.raises(RuntimeError, match="another step began"):
        one.sum().backward()
    again.sum().backward()
    place.turn = 0
    with pytest.raises(RuntimeError, match="left gradients"):
        layer(x, Draw(0)).sum().backward()


GPU_ALONE = SimpleNamespace(device=torch.device("cuda"), num_processes=1, scaler=None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compile": True}, "--compile"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps"),
        ({"freeze": ["conv1"]}, "--freeze"),
    ],
)
def test_what_pieces_cannot_do_is_refused(tmp_path, options, named):
    loop = loop_of(tmp_path, **options)
    with pytest.raises(UserError, match=f"--cuda_graph: cannot be combined with {named}"):
        recorded_steps(loop._gradients, loop._apply, loop.objective, loop.config, GPU_ALONE)
    assert advice(loop.objective, loop.config, GPU_ALONE) is None


@pytest.mark.parametrize("options", [{}, {"opt": "adamw"}, {"mixup": 0.2}, {"cuda_graph": True}])
def test_where_captured_steps_are_known_to_be_faster_the_user_is_told(tmp_path, options):
    loop = loop_of(tmp_path)
    said = advice(loop.objective, replace(loop.config, **options), GPU_ALONE)
    assert said is None if options else "--cuda_graph" in said
    cpu = SimpleNamespace(**vars(GPU_ALONE) | {"device": torch.device("cpu")})
    assert advice(loop.objective, loop.config, cpu) is None
