"""Images without labels beside labelled ones: which are left out, how they are drawn, and what is learnt from them."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from data.augment import Augmentation, Normalise
from data.batch import UNLABELED, Batch
from data.datasets import load_images
from data.loader import DeviceLoader, LoaderWithUnlabeled
from data.pipeline import Pipeline
from data.splits import Split, Unlabeled
from data.unlabeled import with_unlabeled
from distill import DistillConfig
from engine.loop import Loop
from losses.logits import KD, with_labels
from losses.method import MethodContext, Outputs
from models import ModelInfo, create_model, save_pretrained
from objectives.distillation import Distillation
from tests.runs import here, succeeded

SIDE = 40


def patches() -> list[Image.Image]:
    """Of two photographs, next to each other; of clear sky there would be nothing but a codec's noise to compare."""
    found = []
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels)
        boxes = [(x, y, x + SIDE, y + SIDE) for y in range(0, 400, SIDE) for x in range(0, 640, SIDE)]
        found += [photograph.crop(box) for box in boxes]
    return [image for image in found if np.asarray(image.convert("L")).std() > 25]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Labelled photographs, and unlabelled ones: 30 new, and copies of all 20 test images, which cannot be taken."""
    root, images = tmp_path_factory.mktemp("photographs"), patches()
    for number, image in enumerate(images[:60]):
        split = "test" if number % 3 == 0 else "train"
        place = root / "labelled" / split / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
    mixed = {f"new{number}": image for number, image in enumerate(images[60:90])}
    (root / "new" / "deep").mkdir(parents=True)
    for name, image in mixed.items():
        image.save(root / "new" / "deep" / f"{name}.png")
    tests = images[:60:3]
    copies = {f"large{n}": image.resize((150, 100), Image.Resampling.BICUBIC) for n, image in enumerate(tests[:10])}
    copies |= {f"small{n}": image.resize((30, 30), Image.Resampling.LANCZOS) for n, image in enumerate(tests[10:])}
    (root / "copies").mkdir()
    for number, (name, image) in enumerate(copies.items()):
        image.save(root / "copies" / f"{name}.jpg", quality=70 + number)
    cells = []
    for image in [*mixed.values(), *copies.values()]:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=70)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), root / "both")
    return {name: root / name for name in ("labelled", "new", "copies", "both")}


@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_copies_of_test_images_are_left_out_and_no_others(places, pipeline, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache"), "pipeline": pipeline}
    config = DistillConfig(unlabeled=f"parquet:{places['both']}", unlabeled_ratio=2, **options)
    data = load_images(f"folder:{places['labelled']}", 32, options=config)
    found = with_unlabeled(data, config).unlabeled
    assert len(data.test) == 20 and found.split.indices.tolist() == list(range(30))
    assert (found.split.labels == UNLABELED).all()
    assert "30 images, 2 with each labelled one; left out: 20 near-duplicates" in found.described


def test_batches_are_the_same_wherever_their_images_are(places):
    """Each labelled image is followed by its unlabelled ones, normalised and varied as it is."""
    batches = []
    for pipeline in ("device", "workers"):
        options = {"pipeline": pipeline, "data_workers": 0, "batch_size": 12, "image_size": 32}
        config = DistillConfig(unlabeled=f"folder:{places['new']}", unlabeled_ratio=2, **options)
        data = with_unlabeled(load_images(f"folder:{places['labelled']}", 32, options=config), config)
        train = Pipeline(data, config, torch.device("cpu")).training(data.train, 12, unlabeled=data.unlabeled)
        batches.append(list(train.epoch(1)))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.images.is_contiguous(memory_format=torch.channels_last) and one.indices is None
    assert [batch.labeled for batch in batches[0]] == [12, 12, 12, 4]


def identified(count: int, first: int) -> Split:
    """Images whose pixels say which they are."""
    pixels = torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 4, 4)
    labels = torch.arange(count) if first == 0 else torch.full((count,), UNLABELED)
    return Split(pixels.contiguous(memory_format=torch.channels_last), labels)


def drawn(rank: int, world: int, unlabelled: int, seed: int = 0) -> LoaderWithUnlabeled:
    """47 labelled images in batches of 12, the last of eleven, three more without a label behind each."""
    rest = (12, Normalise([0.0] * 3, [1 / 255] * 3, torch.device("cpu")), Augmentation(4, flip=False))
    others = Unlabeled(identified(unlabelled, 50), 3, "", "").repeated(47 * 3)
    labeled, more = (
        DeviceLoader(identified(47, 0), *rest, seed, rank, world),
        DeviceLoader(others, *rest, 7, rank, world),
    )
    return LoaderWithUnlabeled(labeled, more, 3)


def shown(batch: Batch) -> list[list[int]]:
    """The images of a batch, each labelled one with those behind it."""
    return batch.images[:, 0, 0, 0].round().long().view(-1, 4).tolist()


@pytest.mark.parametrize("unlabelled", [200, 60])
def test_every_labelled_image_brings_its_unlabelled_ones_whatever_the_number_of_processes(unlabelled):
    seen = set()
    for epoch in (0, 1):
        whole, halves = (
            list(drawn(0, 1, unlabelled).epoch(epoch)),
            [drawn(r, 2, unlabelled).epoch(epoch) for r in (0, 1)],
        )
        for batch, *parts in zip(whole, *halves, strict=True):
            rows = shown(batch)
            assert batch.labels.view(-1, 4).tolist() == [[row[0], *[UNLABELED] * 3] for row in rows]
            assert [shown(part) for part in parts] == [rows[0::2], rows[1::2]]
            for part in parts:  # of the mean over processes every image is an equal share
                assert part.loss_scale / part.labeled / 2 == pytest.approx(1 / batch.labeled)
        others = [image for batch in whole for row in shown(batch) for image in row[1:]]
        seen |= {*others}
        assert min(others) >= 50 and max(map(others.count, others)) == (1 if unlabelled == 200 else 3)
    assert len(seen) > min(unlabelled - 1, 47 * 3)  # another epoch brings others
    assert shown(next(drawn(0, 1, unlabelled).epoch(0))) != shown(next(drawn(0, 1, unlabelled).epoch(1)))
    tail = list(drawn(0, 1, unlabelled).epoch(1, 2))
    assert [shown(batch) for batch in tail] == [shown(batch) for batch in whole[2:]]


def test_the_loss_counts_labels_where_they_are_and_the_teacher_everywhere():
    """Of a batch, and of parts of unlike sizes that it is taken in: (1 - a) CE of the labelled + a T^2 KL of all."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double() for _ in range(2))
    config = DistillConfig(alpha=0.7, temperature=3.0)
    context = MethodContext(student, teacher, Outputs(torch.empty(0)), Outputs(torch.empty(0)), 5, None, config)
    objective = Distillation(student, [teacher], with_labels([KD(context)], context, 0.3, 0.7), [1.0])
    labels = torch.full((7, 3), UNLABELED)
    labels[:, 0] = torch.arange(7) % 5
    batch = Batch(torch.randn(21, 3, 2, 2, dtype=torch.float64), labels.flatten(), unlabeled=2)
    logits, taught = student(batch.images), teacher(batch.images).detach()
    p, q = ((each / 3).log_softmax(1) for each in (taught, logits))
    known = labels.flatten() >= 0
    nats = -logits.log_softmax(1)[known, labels.flatten()[known]]
    expected = 0.3 * nats.mean() + 0.7 * 9 * (p.exp() * (p - q)).sum(1).mean()
    gradient = torch.autograd.grad(expected, student[1].weight)[0]
    for count in (1, 3):
        total, parts = 0.0, batch.parts(count)
        for part in parts:
            assert part.images.untyped_storage().data_ptr() == batch.images.untyped_storage().data_ptr()
            terms = objective(part, 0)
            total = total + part.loss_scale * sum(objective.term_weights[name] * terms[name] for name in terms)
        assert len(parts) == count
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(total, student[1].weight)[0], gradient, rtol=1e-10, atol=1e-14)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    save_pretrained(create_model("resnet8", 2), ModelInfo("resnet8", "own", 2, 16, [0.5] * 3, [0.25] * 3), folder)
    return folder


def command(places, teacher, *more) -> list:
    words = ["distill.py", "--teacher", teacher, "--dataset", f"folder:{places['labelled']}", "--student", "resnet8"]
    words += ["--image_size", 16, "--batch_size", 8, "--epochs", 2, "--pipeline", "device"]
    return [*words, "--unlabeled", f"folder:{places['new']}", *more]


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(places, teacher, tmp_path, monkeypatch):
    words = command(places, teacher, "--method", "at", "--kd_weight", 1, "--unlabeled_ratio", 3)
    words += ["--gradient_accumulation_steps", 2]
    done = succeeded(here(*words, "--output_dir", tmp_path / "whole"))
    assert "unlabelled: 30 images, 3 with each labelled one; left out: 0 near-duplicates" in done.stdout
    step = Loop.step

    def signalled(loop, batch, totals):
        if loop.progress.iteration == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        step(loop, batch, totals)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "step", signalled)
        assert here(*words, "--output_dir", tmp_path / "parts").returncode == 128 + signal.SIGTERM
    succeeded(here(*words, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"))
    networks = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert networks[0] == networks[1]
    assert '"images": 40,' in (tmp_path / "whole" / "metrics.jsonl").read_text()  # the labelled ones


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mixup", 0.2], "cannot be combined with --mixup or --cutmix"),
        (["--streaming"], "cannot be combined with --streaming"),
        (["--method", "dkd"], "--method dkd needs the label of every image"),
        (["--method", "crd+kd"], "--method crd+kd needs the label of every image"),
        (["--method", "sskd"], "--method sskd needs the label of every image"),
        (["--method", "none"], "not read by --method none"),
        (["--method", "dml"], "not read by --method dml"),
        (["--methods", "kd", "none"], "--methods none: has no teacher, and --unlabeled decides on its images too"),
        (["--cache_teacher", "memory"], "--cache_teacher memory: images without a label are drawn anew"),
        (["--cache_teacher", "disk"], "--cache_teacher disk: images without a label are drawn anew"),
        (["--unlabeled_ratio", 0], "--unlabeled_ratio 0: must be from 1 to 1024"),
        (["--unlabeled", "folder:{copies}"], "has no images but 20 near-duplicates of test images"),
        (["--unlabeled", "folder:{labelled}/nowhere"], "there are no images"),
        (["--unlabeled", "parquet:{copies}/*.parquet"], "there are no images"),
        (["--unlabeled", "parquet:{copies}/*.jpg"], "--unlabeled parquet:"),
        (["--unlabeled", "{new}"], "--unlabeled"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, said, places, teacher, tmp_path):
    words = [str(word).format(**places) for word in words]
    own = ["--teacher", teacher] if words[-1] in ("none", "dml") and "--methods" not in words else []
    typed = [word for word in command(places, teacher) if not own or word not in own]
    done = here(*typed, *words, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_ratio_alone_is_refused(teacher, tmp_path):
    done = here("distill.py", "--teacher", teacher, "--unlabeled_ratio", 3, "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "--unlabeled_ratio 3: goes with --unlabeled" in done.stderr


def test_another_set_of_unlabelled_images_is_another_run(places, tmp_path):
    """A checkpoint is refused for other images in the same place."""
    prints = []
    for name in ("new", "copies"):
        config = DistillConfig(unlabeled=f"folder:{places[name]}")
        data = load_images("digits", 16)
        prints.append(with_unlabeled(data, config).fingerprint())
    assert prints[0].split("(hashes")[1] != prints[1].split("(hashes")[1] and "30 without labels" in prints[0]
