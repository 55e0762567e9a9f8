"""Optimisers, warm-up, clipping, mixed images and averaged weights: the loop against plain PyTorch."""

import math
import signal
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from common import UserError
from data.batch import Batch
from data.mixing import mix
from engine.averaging import WeightAverage
from engine.checkpoint import Progress, load_checkpoint, save_checkpoint
from engine.config import TrainingOptions
from engine.optimiser import make_optimizer
from engine.schedule import learning_rate
from engine.totals import Totals
from tests.runs import TINY, TINY_GTN, forked, forked_signalled, forked_two, here, read_json, succeeded
from tests.test_loop import Linear, loop_of, make
from train_teacher import TeacherConfig


@pytest.mark.parametrize("opt", ["adamw", "lamb", "lion", "nadamw", "muon"])
def test_other_optimisers_leave_biases_and_normalisations_without_decay(opt):
    """With gradients of zero nothing moves but what is decayed: w (1 - lr decay) a step."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    optimizer = make_optimizer(TeacherConfig(opt=opt, lr=0.1, weight_decay=0.2), network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, *others = network.parameters()
    assert all((parameter == 0.5).all() for parameter in others)
    # LAMB's decay is part of a step whose length is that of the weights: lr |w| along w / |w|.
    expected = 0.5 * (1 - 0.1) if opt == "lamb" else 0.5 * (1 - 0.1 * 0.2)
    assert weight.flatten()[0].item() == pytest.approx(expected, rel=1e-5)


class Sometimes(nn.Module):
    """A convolution, a normalisation, and a layer that takes part in every other step, as a path of a supernet does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.branch, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, step: int):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(8, 3, 3, 3, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        x = self.first(images)
        return nn.functional.cross_entropy(self.last(self.branch(x) if step % 2 else x), labels)


@pytest.mark.parametrize("opt", get_args(get_type_hints(TrainingOptions)["opt"]))
def test_every_optimiser_is_saved_and_goes_on_to_the_same_bits(opt, tmp_path):
    config, networks = TeacherConfig(opt=opt, lr=0.01, weight_decay=0.05, clip_grad=1.0), []
    for stop in (None, 5):
        network = Sometimes()
        optimizer = make_optimizer(config, network.parameters())
        for step in range(9):
            if step == stop:
                save_checkpoint(tmp_path / "c", network, {"weights": optimizer}, {}, Progress(), {})
                network = Sometimes()
                optimizer = make_optimizer(config, network.parameters())
                load_checkpoint(tmp_path / "c", network, {"weights": optimizer}, {}, {}, set())
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 - step / 9)
            network(step).backward()
            optimizer.step()
            optimizer.zero_grad()
        networks.append(network.state_dict())
    start = Sometimes().state_dict()
    for name, tensor in networks[0].items():
        assert torch.equal(tensor, networks[1][name]) and not torch.equal(tensor, start[name]), name


def test_schedules_are_their_formulas():
    def rates(schedule, **options):
        config = TeacherConfig(lr=0.2, epochs=6, lr_schedule=schedule, **options)
        return [learning_rate(config, epoch) for epoch in range(6)]

    assert rates("constant") == [0.2] * 6
    assert rates("linear") == pytest.approx([0.2 * (6 - epoch) / 6 for epoch in range(6)])
    assert rates("linear", lr_restarts=2) == pytest.approx([0.2, 0.4 / 3, 0.2 / 3] * 2)
    assert rates("multistep", lr_milestones=[2, 5], lr_gamma=0.5) == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.1, 0.05])


def test_the_learning_rate_rises_to_where_the_schedule_is():
    config = TeacherConfig(lr=0.2, epochs=10, lr_warmup_epochs=3, lr_schedule="cosine")
    cosine = [0.1 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)]
    expected = [rate * min((epoch + 1) / 4, 1) for epoch, rate in enumerate(cosine)]
    assert [learning_rate(config, epoch) for epoch in range(10)] == pytest.approx(expected)


def test_gradients_are_scaled_to_the_norm_of_all_weights_together(tmp_path):
    objective = Linear()
    loop = loop_of(objective, tmp_path, clip_grad=0.01, lr=1.0, momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    batch = loop.train.one(0)
    gradients = torch.autograd.grad(objective(batch, 0)["ce"], list(objective.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 0.02
    loop.step(batch, Totals({}))
    for parameter, old, gradient in zip(objective.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - parameter, gradient * 0.01 / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_every_pixel_and_label_is_shared_as_said(mixup, cutmix):
    """Image i is all i + 1: what a pixel shows of its image and of the one before is then read off it."""
    values, kinds = torch.arange(1.0, 9.0), set()
    images = values[:, None, None, None].expand(8, 3, 16, 12).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(8))
    config = TeacherConfig(mixup=mixup, cutmix=cutmix)
    shares = []
    for iteration in range(40):
        mixed = mix(batch, config, iteration, 0)
        assert torch.equal(mixed.partners, torch.arange(8).roll(1)) and torch.equal(mixed.labels, batch.labels)
        expected = mixed.share * values + (1 - mixed.share) * values.roll(1)
        torch.testing.assert_close(mixed.images.mean((1, 2, 3)), expected)
        cut = torch.isin(mixed.images[0], torch.tensor([1.0, 8.0])).all()
        kinds.add("cut" if cut else "blend")
        assert cut or (mixed.images[0] == mixed.images[0, 0, 0, 0]).all()
        shares.append(mixed.share)
    assert kinds == ({"blend"} if not cutmix else {"cut"} if not mixup else {"cut", "blend"})
    assert len(set(shares)) > 20 and min(shares) >= 0 and max(shares) <= 1 and torch.equal(batch.images, images)
    assert torch.equal(mix(batch, config, 5, 0).images, mix(batch, config, 5, 0).images)
    assert not torch.equal(mix(batch, config, 5, 0).images, mix(batch, config, 5, 1).images)


def test_cutmix_boxes_have_the_area_that_is_drawn_away_from_the_border():
    images = torch.zeros(2, 3, 400, 400)
    images[1] = 1
    areas = []
    for iteration in range(300):
        mixed = mix(Batch(images, torch.arange(2)), TeacherConfig(cutmix=1.0), iteration, 0)
        rows, columns = mixed.images[0, 0].any(1).nonzero().flatten(), mixed.images[0, 0].any(0).nonzero().flatten()
        if len(rows) and min(rows[0], columns[0]) > 0 and max(rows[-1], columns[-1]) < 399:
            areas.append(len(rows) / len(columns))
            assert 1 - mixed.share.item() == pytest.approx(len(rows) * len(columns) / 400**2, abs=1e-6)
    assert len(areas) > 30 and min(areas) == max(areas) == 1  # squares, as the images are


@pytest.mark.parametrize("name", ["vanilla", "sftn", "gtn", "none", "kd"])
def test_the_cross_entropy_of_mixed_images_is_that_of_both_labels(name, tmp_path):
    objective = make(name)
    loop = loop_of(objective, tmp_path)
    batch = loop.train.one(0)
    partners = batch.labels.roll(3)

    def ce(labels, **mixed):
        objective.load_state_dict(state)  # statistics, and what methods count
        terms = objective(batch._replace(labels=labels, **mixed), 0)
        return {term: value.item() for term, value in terms.items() if term.endswith("ce") or term == "kl"}

    state = {key: value.clone() for key, value in objective.state_dict().items()}
    own, theirs, both = ce(batch.labels), ce(partners), ce(batch.labels, partners=partners, share=torch.tensor(0.3))
    assert own != theirs
    for term, value in both.items():
        assert value == pytest.approx(0.3 * own[term] + 0.7 * theirs[term], rel=1e-5)


@pytest.mark.parametrize("name", ["mse", "dkd", "crd", "sskd", "sckd", "hsakd"])
def test_what_needs_one_label_an_image_refuses_mixed_ones(name, tmp_path):
    with pytest.raises(UserError, match="--mixup, --cutmix: "):
        loop_of(make(name), tmp_path, mixup=0.2)


def test_the_average_follows_the_weights(tmp_path):
    """a <- d a + (1 - d) w, d = min(decay, (1 + n) / (10 + n)), and what is evaluated and kept is a."""
    objective = Linear()
    loop = loop_of(objective, tmp_path, model_ema_decay=0.4)
    expected, n = objective.network.weight.detach().double().clone(), 0
    step, evaluated = loop.step, []

    def observed(batch, totals):
        nonlocal expected, n
        step(batch, totals)
        d = min(0.4, (1 + n) / (10 + n))
        expected, n = d * expected + (1 - d) * objective.network.weight.detach().double(), n + 1

    predict = objective.predict
    objective.predict = lambda *arguments: evaluated.append(objective.network.weight.clone()) or predict(*arguments)
    loop.step = observed
    loop.run()
    torch.testing.assert_close(objective.network.weight.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(evaluated[-1], objective.network.weight) and n == 8


def test_statistics_are_averaged_and_counts_copied():
    norm = nn.BatchNorm1d(2)
    average = WeightAverage(norm, 0.9)
    norm.running_mean.fill_(1.0)
    norm.num_batches_tracked.fill_(7)
    average.update(1000)
    assert average.running_mean.tolist() == pytest.approx([0.1, 0.1]) and average.num_batches_tracked == 7
    with average.applied():
        assert norm.running_mean.tolist() == pytest.approx([0.1, 0.1])
    assert norm.running_mean.tolist() == [1.0, 1.0]


MODERN = ["--epochs", "2", "--opt", "adamw", "--lr", "0.002", "--lr_warmup_epochs", "1", "--clip_grad", "1"]
MODERN += ["--mixup", "0.2", "--cutmix", "1", "--model_ema_decay", "0.9"]


def test_a_modern_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    command = ["train_teacher.py", *TINY_GTN, *MODERN]
    succeeded(forked(*command, "--output_dir", tmp_path / "whole"))
    stopped = forked_signalled(signal.SIGTERM, 17, *command, "--output_dir", tmp_path / "parts")
    assert stopped.returncode == 143
    succeeded(forked(*command, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"))
    networks = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert networks[0] == networks[1]


def test_a_modern_student_in_two_processes_is_what_it_was_judged_as(tmp_path):
    """That the processes stay equal the loop sees to; the saved network is the averaged one, which was evaluated."""
    succeeded(here("train_teacher.py", *TINY, "--output_dir", tmp_path / "teacher"))
    student = ["--student", "resnet8", "--batch_size", "128", "--teacher", tmp_path / "teacher", *MODERN]
    succeeded(forked_two("distill.py", *student, "--output_dir", tmp_path / "student"))
    found = read_json(tmp_path / "student" / "summary.json")["top1"]
    succeeded(here("evaluate.py", tmp_path / "student", "--latency", "false"))
    assert read_json(tmp_path / "student" / "evaluation.json")["top1"] == pytest.approx(found)
