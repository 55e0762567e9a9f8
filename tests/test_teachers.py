"""Teachers besides GTN: SFTN's loss, cut and gradients; the posterior that MSE approaches; schedules."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from data.batch import Batch
from engine.command_line import parse
from engine.objective import weighted_sum
from engine.schedule import learning_rate
from models import create_model
from models.network import run_blocks
from models.pool import Pool
from objectives.grafted import BranchOptions
from objectives.gtn import GTN, GTNOptions
from objectives.mse import squared_error
from objectives.registry import TEACHERS
from objectives.sftn import SFTN
from train_teacher import TeacherConfig


@dataclass
class Options(BranchOptions):
    student: str | None = "resnet8"
    pool: Pool = field(
        default_factory=lambda: Pool(stem=4, widths=[4, 4, 8, 8, 8, 8], strides=[1, 1, 2, 1, 2, 1], head=8)
    )


def options(**changes) -> Options:
    return Options(**changes)


def sftn(teacher: str = "resnet14", size: int = 16, **changes) -> SFTN:
    torch.manual_seed(0)
    return SFTN(create_model(teacher, 5, image_size=size), options(**changes), size)


def batch(size: int = 16) -> Batch:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_vanilla_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    torch.manual_seed(0)
    options = TeacherConfig(method="vanilla", smoothing=smoothing)
    objective = TEACHERS["vanilla"].build(create_model("resnet8", 5, image_size=16), options, 16).double()
    images, labels = batch().images.double(), batch().labels
    log_p = objective.teacher(images).log_softmax(1)
    expected = -((1 - smoothing) * log_p[range(4), labels] + smoothing / 5 * log_p.sum(1)).mean()
    assert weighted_sum(objective, objective(Batch(images, labels), 0)).item() == pytest.approx(expected.item(), 1e-9)
    assert objective.phase(1) is None and objective.trained_model() is objective.teacher


def test_some_branches_are_those_of_all():
    whole, some = sftn(), sftn(branches=[3, 2])
    assert len(whole.branches) == 3 and len(some.branches) == 2
    for branch, weights in zip(some.branches, list(whole.branches)[1:], strict=True):
        branch.load_state_dict(weights.state_dict())
    some.teacher.load_state_dict(whole.teacher.state_dict())
    images = batch().images
    every, found = (each.predict(images, 0) for each in (whole, some))
    assert list(found) == ["teacher", "branch2", "branch3"]
    assert all(torch.equal(every[name], logits) for name, logits in found.items())


@pytest.mark.parametrize("places", [[0], [4], [2, 2]])
def test_branches_that_there_are_not_are_refused(places):
    with pytest.raises(UserError, match=r"--branches .*: must be some of 1 2 3, each once"):
        sftn(branches=places)


@pytest.mark.parametrize(("direction", "temperature"), [("reverse", 1.0), ("forward", 1.0), ("reverse", 4.0)])
def test_the_loss_is_equation_3(direction, temperature):
    objective = sftn(kl_direction=direction, temperature=temperature).double()
    images, labels = batch().images.double(), batch().labels
    terms = objective(Batch(images, labels), 0)
    features, logits = run_blocks(objective.teacher, images)
    expected = F.cross_entropy(logits, labels)
    p = (logits / temperature).softmax(1)
    for branch, feature in zip(objective.branches, features, strict=True):
        out = branch(feature)
        q = (out / temperature).softmax(1)
        first, second = (q, p) if direction == "reverse" else (p, q)
        kl = (first * (first.log() - second.log())).sum(1).mean()
        expected = expected + (F.cross_entropy(out, labels) + 3.0 * kl) / 3
    assert len(features) == 3 and weighted_sum(objective, terms).item() == pytest.approx(expected.item(), rel=1e-9)


def test_branches_of_vgg8_on_vgg13_are_those_of_table_12():
    objective = sftn("vgg13", 32, student="vgg8")
    rows = [(128, 8, 256), (256, 4, 512), (512, 4, 512)]  # what the convolutions behind the transform take and give
    features, _ = run_blocks(objective.teacher, batch(32).images)
    assert [tuple(each.shape[1:]) for each in features] == [(128, 16, 16), (256, 8, 8), (512, 4, 4)]
    for index, (branch, feature) in enumerate(zip(objective.branches, features, strict=True)):
        seen = []
        for module in branch.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda m, x, y, seen=seen: seen.append((x[0].shape[1], x[0].shape[2], y.shape[1], m.kernel_size[0]))
                )
        assert branch(feature).shape == (4, 5)
        channels, side = feature.shape[1], feature.shape[2]
        assert seen == [(channels, side, channels, 1), *((*row, 3) for row in rows[index:])]


@pytest.mark.parametrize("alone", ["teacher_ce", "branch_ce", "branch_kl"])
def test_every_term_reaches_the_teacher(alone):
    objective = sftn()
    terms = objective(batch(), 0)
    terms[alone].backward()
    last = objective.teacher.fc.weight.grad
    first = objective.teacher.conv1.weight.grad
    assert first is not None and first.abs().max() > 0
    # The branches' own loss comes through the features alone.
    assert (last is not None and last.abs().max() > 0) == (alone != "branch_ce")
    branches = [parameter.grad is not None for parameter in objective.branches.parameters()]
    assert not any(branches) if alone == "teacher_ce" else all(branches)


def test_branches_have_weights_of_their_own():
    one, two, _ = sftn().branches
    assert not torch.equal(one[-1][-1].weight, two[-1][-1].weight)
    objective = sftn()
    owned = [id(parameter) for parameter in objective.parameters()]
    assert len(owned) == len(set(owned)) and objective.trained_model() is objective.teacher
    assert list(objective.predict(batch().images, 0)) == ["teacher", "branch1", "branch2", "branch3"]


@dataclass
class GTNWithSeed(GTNOptions):
    seed: int = 0


@pytest.mark.parametrize("method", ["sftn", "gtn"])
def test_a_frozen_teacher_stays_as_it_is_while_branches_warm_up(method):
    torch.manual_seed(0)
    pool = options().pool
    made = {
        "sftn": lambda teacher: SFTN(teacher, options(freeze_teacher_epochs=2), 16),
        "gtn": lambda teacher: GTN(teacher, GTNWithSeed(pool=pool, freeze_teacher_epochs=2), 16),
    }[method](create_model("resnet14", 5))
    optimizer = torch.optim.SGD(made.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in (0, 1, 2):
        made.begin_epoch(epoch)
        made.train()
        before = {key: value.clone() for key, value in made.state_dict().items()}
        weighted_sum(made, made(batch(), 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {key for key, value in made.state_dict().items() if not torch.equal(value, before[key])}
        assert any(key.startswith("branches.") for key in changed)
        teacher = {key for key in changed if key.startswith("teacher.")}
        assert bool(teacher) is (epoch == 2)
        assert epoch < 2 or {"teacher.bn1.running_mean", "teacher.conv1.weight"} <= teacher


@pytest.mark.parametrize("student", ["wrn10_1", "resnet8x2", "vgg8", "mobilenetv2", "pool:3", "nas_s", "shufflenetv1"])
def test_any_student_can_be_grafted(student):
    objective = sftn(size=32, student=student)
    terms = objective(batch(32), 0)
    weighted_sum(objective, terms).backward()
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())


def test_mistakes_are_named():
    with pytest.raises(UserError, match="--student: --method sftn needs"):
        sftn(student=None)
    with pytest.raises(UserError, match="--student: unknown name 'resnet9'"):
        sftn(student="resnet9")
    for arguments, message in {
        ("--method", "vanilla", "--student", "resnet8"): "not read by --method vanilla",
        ("--schedule", "15"): "write STEP/TOTAL",
        ("--freeze_teacher_epochs", "3"): "not read by --method vanilla",
        ("--method", "mse", "--branches", "3"): "not read by --method mse",
        ("--method", "sftn", "--student", "resnet8", "--pool_students", "pool:1"): "not read by --method sftn",
        ("--anchors", "31"): "must be between 0 and the 30 epochs",
        ("--stop_after", "40", "--epochs", "30"): "between 1 and --epochs 30",
        ("--teacher_weight", "-1", "--method", "sftn"): "must be at least 0",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(TeacherConfig, "", {}, list(arguments))


def test_squared_error_is_equation_1():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 0])
    p = logits.softmax(1)
    expected = sum(((float(c == y) - p[i, c]) ** 2).item() for i, y in enumerate(labels) for c in range(4)) / 6
    assert squared_error(logits, labels).item() == pytest.approx(expected)
    assert squared_error(logits.half(), labels).dtype == torch.float32


def test_an_mse_teacher_approaches_the_bayes_posterior():
    """Six pictures, whose labels are drawn with known chances: each teacher's posterior, against those chances."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(6, 3, 8, 8, generator=generator)
    posterior = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9], [0.5, 0.5, 0.0],
                              [0.2, 0.2, 0.6]])  # fmt: skip
    which = torch.arange(6).repeat(500)
    labels = torch.multinomial(posterior[which], 1, generator=generator)[:, 0]
    distances = {}
    for method in ("mse", "vanilla"):
        torch.manual_seed(0)
        objective = TEACHERS[method].objective(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)), TeacherConfig(), 8)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.002, momentum=0.9)

        def distance(objective=objective) -> float:
            return (objective.teacher(pictures).softmax(1) - posterior).square().sum(1).mean().item()

        start = distance()
        for step in range(200):
            chosen = torch.randperm(3000, generator=generator)[:300]
            (term,) = objective(Batch(pictures[which[chosen]], labels[chosen]), step).values()
            optimizer.zero_grad()
            term.backward()
            optimizer.step()
        distances[method] = distance()
        assert distances[method] < 0.005 < start
    # Both losses are proper: with labels drawn afresh for each picture neither is far from the posterior.
    assert distances["mse"] < 2 * distances["vanilla"] + 0.005


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        (("--schedule", "2/5", "--lr", "0.1", "--lr_gamma", "0.2"), [0.1, 0.1, 0.02, 0.02, 0.004]),
        (("--schedule", "15/50", "--lr", "1", "--lr_gamma", "0.5"), [1] * 15 + [0.5] * 15 + [0.25] * 15 + [0.125] * 5),
        (("--epochs", "4", "--stop_after", "2", "--lr", "1"), [1.0, (1 + 2**-0.5) / 2]),
    ],
)
def test_schedules_as_lists_of_learning_rates(arguments, rates):
    config = parse(TeacherConfig, "", {}, list(arguments))
    assert [learning_rate(config, epoch) for epoch in range(config.last_epoch)] == pytest.approx(rates)
