"""The training loop's step: in parts, and without waiting for the device."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import UserError
from data.batch import Batch
from data.datasets import load_images
from distill import DistillConfig, distillation
from engine.console import Console
from engine.cuda_graph import CudaGraphCapture, StepGraph
from engine.loop import Loop
from engine.objective import Objective, weighted_sum
from engine.piece_graphs import check_recordable
from engine.run_folder import RunFolder
from engine.schedule import learning_rate
from engine.totals import Totals
from losses.registry import METHODS, find_methods
from models import ModelInfo, create_model
from models.compiled import compile_regions
from models.pool import Pool
from objectives.registry import TEACHERS
from train_teacher import TeacherConfig

POOL = Pool(stem=4, widths=[4, 4, 8, 8], strides=[1, 2, 2, 1], head=8, candidates=["res3x2", "identity"])


class Linear(Objective):
    """The smallest objective without a BatchNorm, whose gradient is a mean over images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(3 * 64, 10)
        self.term_weights = {"ce": 1.0}

    def forward(self, batch, iteration):
        return {"ce": nn.functional.cross_entropy(self.network(batch.images.flatten(1)), batch.labels)}

    def predict(self, images, seed):
        return {"network": self.network(images.flatten(1))}

    def trained_model(self):
        return self.network


def loop_of(objective, tmp_path, **options) -> Loop:
    """On 460 of the digits: seven batches, and one of twelve images."""
    config = TeacherConfig(**{"image_size": 8, "batch_size": 64, "epochs": 1} | options)
    data = load_images("digits", 8)
    data = replace(data, train=data.train.take(torch.arange(460)))
    return Loop(objective, data, config, Accelerator(), RunFolder(tmp_path / "run"), Console(False))


def test_parts_hold_a_batch_once_weigh_as_much_and_are_as_many_in_every_process():
    images, labels = torch.randn(2, 11, 3, 4, 4), torch.arange(11)  # 21 images over two processes, in two copies
    parts = Batch(images.flatten(0, 1), labels, 22 / 21, labels + 100).parts(8, 2)
    other = Batch(torch.randn(10, 3, 4, 4), torch.arange(10), 20 / 21).parts(8, 2)
    assert len(parts) == len(other) == 5 and min(len(part.labels) for part in parts + other) == 2
    assert sum(part.loss_scale for part in parts) == pytest.approx(22 / 21)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    assert torch.equal(torch.cat([part.indices for part in parts]), labels + 100)
    assert torch.equal(torch.cat([part.images.unflatten(0, (2, -1)) for part in parts], dim=1), images)


def test_an_accumulated_step_is_the_whole_one(tmp_path):
    histories, weights = [], []
    for parts in (1, 3):
        objective = Linear()
        loop = loop_of(objective, tmp_path / str(parts), gradient_accumulation_steps=parts)
        histories.append(loop.run().history[0]["losses"]["ce"])
        weights.append(objective.network.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_a_gate_step_in_parts_draws_once_and_averages(tmp_path):
    objective = make("gtn")
    loop = loop_of(objective, tmp_path, gradient_accumulation_steps=2)
    batch, gates = loop.train.one(0), objective.phases[0]
    halves = []
    for part in batch.parts(2):
        weighted_sum(objective, objective(part, 1)).backward(inputs=gates.grad_inputs())
        halves.append(objective.gates.leaf().grad)
        gates.after_update()
    found = []
    gates.before_update = lambda average: found.append(objective.gates.leaf().grad.clone())
    loop.progress.iteration = 1
    loop.step(batch, Totals({}))
    assert torch.equal(*[each != 0 for each in (found[0], sum(halves))])
    torch.testing.assert_close(found[0], sum(halves) / 2)


def test_parts_of_one_image_are_refused(tmp_path):
    with pytest.raises(UserError, match="--gradient_accumulation_steps 40"):
        loop_of(Linear(), tmp_path, gradient_accumulation_steps=40)


def test_the_learning_rate_scales_with_the_batch():
    config = TeacherConfig(lr=0.1, lr_batch_size=64, batch_size=256, lr_schedule="multistep", lr_milestones=[1])
    assert [learning_rate(config, epoch) for epoch in (0, 1)] == pytest.approx([0.4, 0.04])
    assert learning_rate(TeacherConfig(lr=0.1, batch_size=256), 0) == 0.1


def kd_objective(method: str = "kd", cache_logits: bool = False):
    config, data = DistillConfig(method=method, image_size=8), load_images("digits", 8)
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", 10), create_model("resnet14", 10)
    teacher.info = ModelInfo("resnet14", "digits", 10, 8, data.mean, data.std)
    teachers = [] if method == "none" else [teacher]
    with patch("distill.read_anchors", return_value=[]):
        objective = distillation(config, find_methods(method), student, teachers, data)
    objective.cache_logits = cache_logits
    return objective


def make(name: str) -> Objective:
    """A teacher's or a student's objective, small, on 8x8 digits."""
    if name in METHODS:
        return kd_objective(name)
    torch.manual_seed(0)
    config = TeacherConfig(method=name, pool=POOL, image_size=8, student="resnet8" if name == "sftn" else None)
    return TEACHERS[name].objective(create_model("resnet8", 10), config, 8)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (1, True)])
def test_views_are_numbered_as_the_loader_makes_them(tmp_path, padding, flip):
    loader = loop_of(Linear(), tmp_path, crop_padding=padding, flip=flip).train
    assert loader.augmentation.views == (9 if padding else 1) * (2 if flip else 1)
    images, seen = [], set()
    for view in range(loader.augmentation.views):
        indices, shown = zip(*loader.view(view, 500), strict=True)
        images.append(dict(zip(torch.cat(indices).tolist(), torch.cat(shown), strict=True)))
    for batch in loader.epoch(0):
        expected = torch.stack(
            [images[view][index] for index, view in zip(batch.indices.tolist(), batch.views.tolist(), strict=True)]
        )
        assert torch.equal(batch.images, expected)
        seen |= set(batch.views.tolist())
    assert seen == set(range(loader.augmentation.views))


def test_cached_teacher_logits_are_the_teachers_logits(tmp_path):
    losses = []
    for cached in (False, True):
        objective = kd_objective(cache_logits=cached)
        loop = loop_of(objective, tmp_path / str(cached), crop_padding=1, lr=1e-3)
        losses.append(loop.run().history[0]["losses"])
        assert (objective.cached_logits is not None) == cached
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert objective.cached_logits.shape == (len(loop.train.split), 9, 10)
    objective.frozen[0].forward = None  # not needed any more
    loop.step(loop.train.one(0), Totals({}))


def test_logits_that_cannot_be_cached_say_why(tmp_path):
    for method, reason in (("at", "more of its teacher"), ("sskd", "more of its teacher"), ("none", "no teacher")):
        assert reason in kd_objective(method).cannot_cache(2)
    assert "cutouts" in kd_objective().cannot_cache(loop_of(Linear(), tmp_path, cutout=2).train.augmentation.views)
    assert kd_objective().cannot_cache(2) is None


@pytest.fixture
def deterministic(monkeypatch):
    """A GPU sums in the same order each time, which is not its fastest."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


REPLAYED = [(name, {}) for name in ("kd", "crd", "sftn")]
REPLAYED += [("kd", {"opt": "adamw"}), ("kd", {"mixup": 0.4, "cutmix": 1.0}), ("sftn", {"mixup": 0.4, "opt": "adamw"})]
REPLAYED += [("kd", {"opt": "adamw", "clip_grad": 0.5, "gradient_accumulation_steps": 2})]


@pytest.mark.parametrize(("name", "options"), REPLAYED)
def test_a_replayed_step_is_the_step(tmp_path, name, options, deterministic):
    """What is captured reads the static batch, and only the steady batches of an epoch but its first are replayed; an
    optimiser that counts steps takes its own behind them."""
    replayed, losses = [], []
    for replay in (False, True):
        loop = loop_of(make(name), tmp_path / str(replay), epochs=2, **options)
        if replay:
            loop.graph = step_graph(loop, replayed)
        losses.append([row["losses"] for row in loop.run().history])
    assert len(replayed) == 2 * (len(loop.train) - 2)  # the last batch of an epoch is smaller
    for eager, captured in zip(*losses, strict=True):
        assert captured == pytest.approx(eager, rel=1e-3 if torch.cuda.is_available() else 1e-9)


def step_graph(loop: Loop, replayed: list) -> StepGraph:
    """As a run's; `replayed` grows with every replay."""
    whole, parameters = loop.config.opt == "sgd", loop.objective.trained_parameters()
    device_captures = CudaGraphCapture() if torch.cuda.is_available() else CapturedHere(parameters, whole)

    def capture(function):
        replay = device_captures(function)
        return lambda: (replayed.append(1), replay())

    return StepGraph(loop._gradients, loop._apply, whole, parameters, capture)


class CapturedHere:
    """Runs a function again where a graph would be replayed: gradients that it leaves are written into the memory that
    they had when it was captured, and which of them the parameters have is not its concern."""

    def __init__(self, parameters, whole: bool):
        self.parameters, self.whole = parameters, whole

    def __call__(self, function):
        if self.whole:
            return function
        for each in self.parameters:
            assert each.grad is None
            each.grad = torch.full_like(each, torch.nan)
        static = [each.grad for each in self.parameters]

        def replay():
            before = [each.grad for each in self.parameters]
            for each in self.parameters:
                each.grad = None
            function()
            for each, kept, memory in zip(self.parameters, before, static, strict=True):
                memory.copy_(each.grad)
                each.grad = kept

        return replay


def test_what_a_method_does_after_a_step_is_captured_with_the_optimiser_or_refused(tmp_path):
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, scaler=None)
    loop = loop_of(make("crd"), tmp_path)
    check_recordable(loop.objective, loop.config, gpu)
    with pytest.raises(UserError, match=r"--cuda_graph: --method .* only with --opt sgd"):
        check_recordable(loop.objective, replace(loop.config, opt="adamw"), gpu)
    check_recordable(make("kd"), replace(loop.config, opt="adamw"), gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can")
def test_a_cpu_captures_no_graph(tmp_path):
    with pytest.raises(UserError, match="--cuda_graph: needs an NVIDIA GPU"):
        loop_of(Linear(), tmp_path, cuda_graph=True)


@pytest.mark.parametrize("name", ["kd", "at", "reviewkd", "gtn"])
def test_the_memory_format_changes_no_loss(name):
    batch = Batch(torch.randn(16, 3, 8, 8), torch.arange(16) % 10, indices=torch.arange(16))
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        objective = make(name).to(memory_format=layout)
        terms = objective(batch._replace(images=batch.images.to(memory_format=layout)), 0)
        losses.append({term: value.item() for term, value in terms.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class MemoryFormats(TorchDispatchMode):
    """Names of the operations that see or give a map laid out channels first; one that is expanded is in no order."""

    def __init__(self):
        super().__init__()
        self.channels_first: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for each in tree_leaves((arguments, options, result)):
            is_map = isinstance(each, torch.Tensor) and each.ndim == 4 and min(each.shape[1:]) > 3
            if is_map and not operation.is_view and 0 not in each.stride() and each.stride(1) != 1:
                self.channels_first.append(str(operation))
        return result


# In reviewkd and nst there are some left, of gates for small maps and of products of channels.
@pytest.mark.parametrize("name", sorted({*TEACHERS, *METHODS} - {"none", "reviewkd", "nst"}))
def test_no_map_of_a_step_is_laid_out_channels_first(name):
    """Neither forward nor backward: every operation between two formats goes through memory in the wrong order."""
    objective = make(name).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(16) % 10, indices=torch.arange(16))
    with MemoryFormats() as formats:
        weighted_sum(objective, objective(batch, 0)).backward()
    assert formats.channels_first == []


def test_a_run_with_everything_that_makes_it_fast_resumes_with_the_same_bits(tmp_path, deterministic):
    """In parts, compiled, captured, with cached teacher logits; stopped after the first of two epochs."""

    class StopError(Exception):
        pass

    def stop(epoch: int, row: dict) -> None:
        raise StopError

    def fast(folder, **options) -> Loop:
        objective = kd_objective(cache_logits=True)
        for network in (objective.student, *objective.frozen):
            compile_regions(network, backend="eager")
        changes = {"epochs": 2, "crop_padding": 1, "gradient_accumulation_steps": 2, "compile": True}
        loop = loop_of(objective, folder, **changes, **options)
        loop.graph = step_graph(loop, [])
        return loop

    whole = fast(tmp_path / "whole")
    whole.run()
    stopped = fast(tmp_path / "stopped")
    stopped.after_epoch = stop
    with pytest.raises(StopError):
        stopped.run()
    resumed = fast(tmp_path / "resumed", resume_from_checkpoint=str(stopped.folder.last))
    history = resumed.run().history
    assert [row["losses"] for row in history] == [row["losses"] for row in whole.progress.history]
    for one, other in zip(whole.objective.parameters(), resumed.objective.parameters(), strict=True):
        assert torch.equal(one, other)


# What makes the host wait for a value of the device, as the profiler calls it. Gates live on the host
# (objectives/gates.py): drawing and updating them waits for nothing.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
ON_HOST = {"aten::multinomial", "Optimizer.step#Adam.step"}


@pytest.mark.parametrize("name", [*TEACHERS, *(name for name, row in METHODS.items() if not row.peers)])
def test_no_step_waits_for_the_device(name, tmp_path):
    objective = make(name)
    loop = loop_of(objective, tmp_path)
    objective.begin_epoch(0)
    objective.train()
    batches, totals = loop.train.epoch(0), Totals({})
    for _ in range(2):  # the first steps make what the later ones use
        loop.step(next(batches), totals)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):  # of GTN's, one for the weights and one for the gates
            loop.step(next(batches), totals)
    found = [callers(event) for event in profiler.events() if event.name in WAITS]
    assert [chain for chain in found if not ON_HOST & set(chain)] == []
    if torch.cuda.is_available():
        loop.progress.iteration += loop.progress.iteration % 2  # a gate step waits once, for its gradient
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.step(next(batches), totals)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def callers(event) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def test_a_wait_would_be_seen():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(1).item()
        torch.ones(3)[torch.ones(3) > 0]
    assert {event.name for event in profiler.events()} >= {"aten::_local_scalar_dense", "aten::nonzero"}
