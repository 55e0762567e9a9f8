"""Teachers' logits on disk: those of a run that asks the teacher, whoever computes them, and nothing else."""

import fcntl
import hashlib
import os
import shutil

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from common import UserError, lock
from data.augment import Augmentation, Normalise
from data.datasets import load_images
from data.loader import DeviceLoader
from data.options import DataOptions
from data.workers import WorkerLoader
from engine.console import Console
from objectives import stored_logits
from objectives.stored_logits import StoredLogits, View, reduced
from tests.runs import TINY, forked, forked_two, here, succeeded
from tests.test_loader import MEAN, STD, split
from tests.test_pipelines import noise
from tests.test_together import outcome

STUDENT = ["--student", "resnet8", "--image_size", "8", "--batch_size", "128", "--flip", "true", "--cutout", "2"]
STUDENT += ["--train_fraction", "0.3"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "t"
    succeeded(forked("train_teacher.py", *TINY, "--output_dir", folder))
    return folder


def files(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("[!.]*.*")}


def test_with_a_view_an_epoch_runs_are_those_that_ask_the_teacher(teacher, tmp_path):
    """To the bit, also for another loss that finds the logits there, and two processes leave the same files."""
    words = ["--teacher", teacher, *STUDENT, "--epochs", "2", "--gradient_accumulation_steps", "2"]
    disk = [*words, "--cache_teacher", "disk", "--cache_folder", tmp_path / "logits"]
    for method in ("kd", "dkd"):
        succeeded(forked("distill.py", *words, "--method", method, "--output_dir", tmp_path / f"{method}-joint"))
        done = succeeded(forked("distill.py", *disk, "--method", method, "--output_dir", tmp_path / method))
        assert f"teacher logits: {0 if method == 'kd' else 2} of 2 files are in" in done.stdout
        assert outcome(tmp_path / method) == outcome(tmp_path / f"{method}-joint")
    before = files(tmp_path / "logits")
    shutil.rmtree(tmp_path / "logits")
    succeeded(forked_two("distill.py", *disk, "--output_dir", tmp_path / "two"))
    assert files(tmp_path / "logits") == before and len(before) == 3


def loader(rank=0, world=1, cycle=None, **options) -> DeviceLoader:
    augmentation = Augmentation(8, **{"padding": 2} | options)
    normalise = Normalise(MEAN, STD, torch.device("cpu"))
    return DeviceLoader(split(50), 12, normalise, augmentation, 3, rank, world, cycle=cycle)


def by_image(batches) -> tuple[list[int], dict[int, torch.Tensor]]:
    batches = list(batches)
    order = torch.cat([batch.indices for batch in batches]).tolist()
    return order, dict(zip(order, torch.cat([batch.images for batch in batches]), strict=True))


@pytest.mark.parametrize("kind", ["device", "resized crops by workers"])
def test_images_are_varied_as_so_many_epochs_before_in_an_order_of_their_own(kind, tmp_path):
    if kind == "device":
        free, cycling = loader(cutout=3), loader(cutout=3, cycle=2)
    else:
        normalise, vary = Normalise(MEAN, STD, torch.device("cpu")), Augmentation(8, "resized_crop", 1)
        for number in range(40):
            (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
            (tmp_path / f"class{number % 2}/{number}.png").write_bytes(noise(number))
        images = load_images(f"folder:{tmp_path}", 8, options=DataOptions(augment="resized_crop")).train
        parts = (images, 6, normalise, vary, 3)
        where = {"workers": 0, "device": torch.device("cpu")}
        free, cycling = WorkerLoader(*parts, **where), WorkerLoader(*parts, cycle=2, **where)
    epochs = [by_image(free.epoch(epoch)) for epoch in range(4)]
    for epoch in range(4):
        order, images = by_image(cycling.epoch(epoch))
        assert order == epochs[epoch][0]
        assert all(torch.equal(images[index], epochs[epoch % 2][1][index]) for index in images)
    assert not all(torch.equal(epochs[3][1][index], epochs[1][1][index]) for index in epochs[1][1])


def predict(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, ::8] * torch.arange(24)


def filled(folder, views=2, top_k=None, compute=predict, key=None, **kind) -> StoredLogits:
    stored = StoredLogits(folder, {"teachers": ["a"]} | (key or {}), 24, views, 1, top_k)
    stored.fill(compute, loader(**kind), Accelerator(), Console(False))
    return stored


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stored_logits, "SHARD_BYTES", 4 * 24 * 12 * 2)  # two of the five batches


def test_what_a_killed_process_has_half_written_is_removed_when_nobody_writes(tmp_path):
    folder = filled(tmp_path, views=1).folder
    for name in (".view00001-batches0000000-0000005.safetensors.1.tmp", ".notes.tmp"):
        (folder / name).write_bytes(b"half")

    half = [name for name in os.listdir(folder) if name.endswith(".tmp")]
    with lock(folder / ".lock", fcntl.LOCK_SH):  # as a process that writes
        filled(tmp_path, views=1)
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == half and len(half) == 2
    filled(tmp_path, views=1)
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == [".notes.tmp"]

    def computed(images):
        with pytest.raises(BlockingIOError):
            lock(folder / ".lock")
        return predict(images)

    filled(tmp_path, views=2, compute=computed)


@pytest.mark.usefixtures("small_shards")
def test_logits_are_found_by_image_and_view(tmp_path):
    stored = filled(tmp_path)
    assert len(files(tmp_path)) == 2 * 3 + 1
    for epoch in range(4):
        for batch in loader(1, 2, cycle=2).epoch(epoch):  # a process of two
            assert torch.equal(stored.view(epoch).logits(batch.indices), predict(batch.images))


@pytest.mark.usefixtures("small_shards")
def test_what_was_killed_goes_on_where_it_was(tmp_path):
    asked = []

    def killed(images):
        asked.append(len(images))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return predict(images)

    filled(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cut", compute=killed)
    assert len(files(tmp_path / "cut")) == 3 + 1  # the first view's
    assert len(filled(tmp_path / "cut", views=1, compute=None).shards(0)) == 3  # asks nobody
    filled(tmp_path / "cut", compute=lambda images: asked.append(0) or predict(images))
    assert len(asked) == 6 + 5 and files(tmp_path / "cut") == files(tmp_path / "whole")


def test_of_many_classes_the_largest_are_kept_and_the_others_share_what_is_left():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 3
    found = View(reduced(logits, 4), 9).logits(torch.arange(6)).double().softmax(1)
    expected = logits.double().softmax(1)
    for row, wanted in zip(found.tolist(), expected.tolist(), strict=True):
        largest = sorted(range(9), key=lambda c: -wanted[c])[:4]
        others = [wanted[c] for c in range(9) if c not in largest]
        for c in range(9):
            assert row[c] == pytest.approx(wanted[c] if c in largest else sum(others) / 5, rel=1e-5)
    assert torch.equal(View(reduced(logits, None), 9).logits(torch.tensor([3])), logits[[3]])


@pytest.mark.parametrize(
    "change", [{"key": {"teachers": ["b"]}}, {"flip": False}, {"cutout": 1}, {"padding": 1}, {"top_k": 3}]
)
def test_another_key_has_another_place(change, tmp_path):
    filled(tmp_path)
    before = files(tmp_path)
    filled(tmp_path, **change)
    assert len(files(tmp_path)) == 2 * len(before) and files(tmp_path).items() > before.items()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("key", "made for another key"),
        ("rows", "its tensors are"),
        ("name", "its tensors are"),
        ("truncated", "is none of its files"),
        ("classes", "classes that are none of 24"),
        ("gone", "is none of its files"),
    ],
)
def test_a_file_that_is_something_else_is_refused(broken, message, tmp_path):
    stored = filled(tmp_path, top_k=3)
    path = stored.folder / stored.shards(1)[0].name
    tensors, digest = safetensors.torch.load_file(path), stored.digest
    if broken == "key":
        digest = "f" * 64
    elif broken == "rows":
        tensors = {name: each[:-1].contiguous() for name, each in tensors.items()}
    elif broken == "name":
        tensors["values"] = tensors.pop("logits")
    elif broken == "classes":
        tensors["classes"][5, 1] = 24
    safetensors.torch.save_file(tensors, path, {"key": digest})
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif broken == "gone":
        path.unlink()
    with pytest.raises(UserError, match=message) as error:
        if broken not in ("classes", "gone"):  # these are looked for when they are needed
            filled(tmp_path, top_k=3)
        stored.view(1)
    assert "delete it" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "at"], "the method needs more of its teacher"),
        (["--method", "rco"], "the teacher changes during training"),
        (["--methods", "kd", "none"], "--methods none: has no teacher"),
        (["--cache_top_k", "10"], "--cache_top_k 10: must be below the 10 classes"),
        (["--cache_views", "0"], "--cache_views 0: must be at least 1"),
        (["--cache_teacher", "memory", "--cache_views", "2"], "--cache_views 2: goes with --cache_teacher disk"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, message, teacher, tmp_path, monkeypatch):
    if "rco" in words:
        monkeypatch.setattr("distill.read_anchors", lambda sources, network: [network.state_dict()])
    done = here(
        *("distill.py", "--teacher", teacher, *STUDENT, "--epochs", "1", "--output_dir", tmp_path / "run"),
        *("--cache_teacher", "disk", *words),
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()
