"""The training loop against plain PyTorch, and against accuracies that are known beforehand."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from data.datasets import load_images
from data.splits import ImageSet, Split
from engine import replicas
from engine.console import Console
from engine.distributed import start_accelerator
from engine.loop import Loop
from engine.objective import Objective
from engine.run_folder import RunFolder
from engine.totals import Totals
from models import create_model
from objectives.vanilla import Vanilla, VanillaOptions
from tests.runs import forked_two, succeeded
from train_teacher import TeacherConfig

EPOCHS, IMAGES, SIZE, PADDING, HOLE = 3, 460, 8, 2, 3
OPTIONS = {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "epochs": EPOCHS, "batch_size": 64,
           "lr_schedule": "multistep", "lr_milestones": [1, 2], "lr_gamma": 0.3, "image_size": SIZE,
           "crop_padding": PADDING, "flip": True, "cutout": HOLE, "seed": 5}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 10).to(memory_format=torch.channels_last)


def plain_image(data: ImageSet, plan, place: int) -> torch.Tensor:
    """Image number `place` of an epoch, by hand: padded, cut, mirrored, normalised, with a hole of the mean colour."""
    (top, left), (row, column) = plan.offsets[place].tolist(), plan.holes[place].tolist()
    image = F.pad(data.train.images[plan.order[place]], [PADDING] * 4)[:, top : top + SIZE, left : left + SIZE]
    image = image.flip(2) if plan.flips[place] else image
    image = (image / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    image[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0.0
    return image


def plain_training(data: ImageSet, plans: list) -> tuple[nn.Module, list[float], list[float]]:
    """(network, mean loss of each epoch, accuracy after it): what a reader of the options would write."""
    model, losses, accuracies = network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, weight_decay=0.01, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.3)
    for plan in plans:
        images, total = torch.stack([plain_image(data, plan, place) for place in range(IMAGES)]), 0.0
        for places in torch.arange(IMAGES).split(64):
            batch = images[places].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model.train()(batch), data.train.labels[plan.order[places]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(places)
        schedule.step()
        losses.append(total / IMAGES)
        with torch.no_grad():
            test = (data.test.images / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[
                :, None, None
            ]
            right = model.eval()(test.contiguous(memory_format=torch.channels_last)).argmax(1) == data.test.labels
        accuracies.append(100 * right.double().mean().item())
    return model, losses, accuracies


def test_three_epochs_are_those_of_plain_pytorch(tmp_path):
    data = load_images("digits", SIZE)
    data = replace(data, train=data.train.take(torch.arange(IMAGES)), mean=[0.3, 0.2, 0.4], std=[0.4, 0.3, 0.2])
    config = TeacherConfig(**OPTIONS)
    objective = Vanilla(network(), VanillaOptions(), SIZE)
    loop = Loop(objective, data, config, Accelerator(), RunFolder(tmp_path / "run"), Console(False))
    plans = [loop.train.plan(epoch) for epoch in range(EPOCHS)]
    for one, other in pairwise(plans):  # another order, other crops, mirrors and holes
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    rows = loop.run().history
    model, losses, accuracies = plain_training(data, plans)
    assert [row["losses"]["ce"] for row in rows] == pytest.approx(losses, rel=1e-3)
    assert [row["accuracy"]["teacher"] for row in rows] == pytest.approx(accuracies, abs=0.6)
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.006, 0.0018])
    assert [row["images"] for row in rows] == [IMAGES] * EPOCHS
    for (name, found), expected in zip(
        objective.teacher.state_dict().items(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# --- best and last ---------------------------------------------------------------------------------------------------

TEST, VALIDATION = (40, 90, 20, 60, 90), (20, 30, 80, 40, 80)  # percent after each epoch


class Scripted(Objective):
    """Right about as many images as a script says; images of the validation split are white."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("trained", torch.zeros(()))  # epochs
        self.term_weights, self.observed = {"ce": 1.0}, []

    def begin_epoch(self, epoch):
        self.epoch = epoch
        self.trained.fill_(epoch + 1)

    def forward(self, batch, iteration):
        return {"ce": 0.0 * self.weight.sum() + 2.0}

    def predict(self, images, seed):
        right = (VALIDATION if images.mean() > 0 else TEST)[self.epoch]
        said = (torch.arange(len(images)) >= right).long()  # the label of all is 0
        return {"first": F.one_hot(said, 6).float(), "second": F.one_hot(1 - said, 6).float()}

    def observe_validation(self, logits, labels):
        self.observed.append((self.epoch, len(labels)))

    def trained_model(self):
        return self


def split(value: int, labels: torch.Tensor) -> Split:
    pixels = torch.full((len(labels), 3, 8, 8), value, dtype=torch.uint8)
    return Split(pixels.contiguous(memory_format=torch.channels_last), labels)


def scripted_loop(folder, validated: bool, **options) -> Loop:
    zeros = torch.zeros(100, dtype=torch.int64)
    data = ImageSet("scripted", 6, 8, split(9, torch.arange(24) % 6), split(0, zeros), [0.5] * 3, [0.5] * 3, False)
    data = replace(data, val=split(255, zeros) if validated else None)
    config = TeacherConfig(epochs=5, batch_size=12, crop_padding=0, **options)
    return Loop(Scripted(), data, config, Accelerator(), RunFolder(folder / "run"), Console(False))


@pytest.mark.parametrize(("validated", "best"), [(True, (80, 3, "val")), (False, (90, 2, "test"))])
def test_the_best_epoch_is_chosen_on_validation_and_the_last_is_kept_beside_it(tmp_path, validated, best):
    """Of equals the first; the first network's accuracy counts, on the validation split if there is one."""
    loop = scripted_loop(tmp_path, validated)
    progress = loop.run()
    assert tuple(progress.best.values()) == best
    assert [row["accuracy"]["first"] for row in progress.history] == list(TEST)
    assert [row["accuracy"]["second"] for row in progress.history] == [100 - each for each in TEST]
    shown = [row.get("val_accuracy", {}).get("first") for row in progress.history]
    assert shown == (list(VALIDATION) if validated else [None] * 5)
    assert loop.objective.observed == ([(epoch, 100) for epoch in range(5)] if validated else [])
    assert {row["losses"]["ce"] for row in progress.history} == {2.0}
    epochs = [load_file(path)["objective/trained"].item() for path in (loop.folder.best, loop.folder.last)]
    assert epochs == [best[1], 5]
    with safe_open(loop.folder.last, "pt") as file:
        assert f'"chosen_on": "{best[2]}"' in file.metadata()["state"]


def test_checkpoints_hold_the_best_the_last_and_every_second_epoch(tmp_path):
    loop, held = scripted_loop(tmp_path, False, checkpointing_epochs=2), []
    loop.after_epoch = lambda epoch, row: held.append(load_file(loop.folder.last)["objective/trained"].item())
    loop.run()
    assert held == [1, 2, 2, 4, 5]  # the third epoch is none of these


@pytest.mark.parametrize(("every", "seen"), [(2, [2, 4, 5]), (5, [5]), (7, [5])])
def test_only_every_so_many_epochs_and_the_last_are_evaluated(tmp_path, every, seen):
    """The best is the best of those; what was not evaluated has no accuracy, and the history still loads."""
    loop = scripted_loop(tmp_path, True, evaluation_epochs=every)
    progress = loop.run()
    assert [row["epoch"] for row in progress.history if row["accuracy"]] == seen
    assert [epoch + 1 for epoch, _ in loop.objective.observed] == seen
    assert all(set(row["accuracy"]) == {"first", "second"} for row in progress.history if row["epoch"] in seen)
    assert progress.best == {"top1": 80, "epoch": 5, "chosen_on": "val"}  # and not the third, as good
    assert load_file(loop.folder.best)["objective/trained"].item() == 5
    progress.check()


# --- two processes ---------------------------------------------------------------------------------------------------


class Normed(Scripted):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)


def statistics_of_two(folder: str) -> None:
    """In one of two processes: statistics that differ by process, their mean, and sums of losses."""
    accelerator = start_accelerator(None, None, folder)
    rank, objective = accelerator.process_index, Normed()
    objective.norm.running_mean.copy_(torch.tensor([1.0, 2.0]) + 10 * rank)
    gathered = replicas.gather_statistics(objective, accelerator)
    replicas.average_statistics(objective, accelerator)
    averaged = objective.norm.running_mean.clone()
    replicas.scatter_statistics(objective, accelerator, gathered)
    own, equal = objective.norm.running_mean.clone(), replicas.are_equal(objective, accelerator)
    objective.weight.data += rank
    parted = replicas.are_equal(objective, accelerator)
    totals = Totals({"sums": {"ce": [6.0, 3]}, "images": 3, "seconds": 1.0} if rank == 0 else {})
    totals.add(0, {"ce": torch.tensor(1.0 + rank)}, 4)
    totals.read()
    found = totals.over_processes(accelerator)
    assert found.images == 11 and found.means() == {"ce": (6 + 4 * 1 + 4 * 2) / 11}
    assert own.tolist() == [1 + 10 * rank, 2 + 10 * rank] and averaged.tolist() == [6, 7] and equal and not parted
    torch.distributed.destroy_process_group()


def test_two_processes_statistics_are_averaged_and_their_losses_counted_once(tmp_path):
    succeeded(forked_two("-c", f"from {__name__} import statistics_of_two as f; f({str(tmp_path)!r})"))
