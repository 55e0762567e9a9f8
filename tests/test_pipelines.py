"""Three places where images can be, one way to batches: in memory, on disk, in a stream."""

import io
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common import UserError
from data.augment import Augmentation
from data.datasets import load_images
from data.options import DataOptions
from data.pipeline import Pipeline
from data.stream import StreamLoader
from data.workers import WorkerLoader, transform
from engine.config import RunConfig
from tests.runs import forked_processes, succeeded

CPU = torch.device("cpu")


def noise(number: int, size=(12, 12), mode: str = "RGB") -> bytes:
    """A picture with its number in the first pixel, compressed without loss."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = number % 256, number // 256, 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, numbers: range, size=(12, 12)) -> None:
    cells = [{"bytes": noise(number, size), "path": None} for number in numbers]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": [n % 3 for n in numbers]}), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    """90 training images in three files of different length, and 20 test images."""
    folder = tmp_path_factory.mktemp("files")
    for part, numbers in enumerate((range(50), range(50, 60), range(60, 90))):
        write(folder / f"train-{part}.parquet", numbers)
    write(folder / "test.parquet", range(90, 110))
    return f"parquet:{folder}/*.parquet"


def options(tmp_path, **changes) -> RunConfig:
    return RunConfig(cache_dir=str(tmp_path / "cache"), **({"data_workers": 0} | changes))


def pipeline(files: str, config: RunConfig, **where) -> tuple:
    data = load_images(files, config.image_size or 12, False, config)
    return data, Pipeline(data, config, CPU, **where)


@pytest.mark.parametrize(("workers", "varied"), [(0, {"cutout": 4}), (2, {"aa": "randaugment", "reprob": 0.5})])
def test_workers_and_device_make_the_same_images(files, tmp_path, workers, varied):
    found = {}
    for kind in ("device", "workers"):
        config = options(tmp_path, pipeline=kind, data_workers=workers, crop_padding=3, seed=5, **varied)
        data, batches = pipeline(files, config)
        loader = batches.training(data.train, 16)
        found[kind] = list(loader.epoch(1, start=2)), list(batches.evaluation(data.test, 8))
        assert (data.mean, data.std) == (found.setdefault("statistics", (data.mean, data.std)))
    for ours, theirs in zip(found["device"][0], found["workers"][0], strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
        assert ours.loss_scale == theirs.loss_scale
    for ours, theirs in zip(found["device"][1], found["workers"][1], strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_distribution_of_crops_and_mirrors_is_torchvisions(files, tmp_path):
    """Against RandomCrop and RandomHorizontalFlip themselves: every crop and mirror equally often."""
    data, batches = pipeline(files, options(tmp_path, crop_padding=1, pipeline="device"))
    loader, plain = (
        batches.training(data.train, 45),
        v2.Compose([v2.RandomCrop(12, padding=1), v2.RandomHorizontalFlip()]),
    )
    normalise = batches.normalise
    ours, theirs = Counter(), Counter()
    torch.manual_seed(0)
    for epoch in range(200):
        for batch in loader.epoch(epoch):
            for place, label in enumerate(batch.labels.tolist()):
                if label == 0:
                    ours[batch.images[place].contiguous().numpy().tobytes()] += 1
    zeros = [index for index, label in enumerate(data.train.labels.tolist()) if label == 0]
    for _ in range(200):
        for index in zeros:
            image = normalise(plain(data.train.images[index])[None])[0]
            theirs[image.contiguous().numpy().tobytes()] += 1
    assert ours.keys() == theirs.keys() and len(ours) == 18 * len(zeros)  # 3 x 3 crops, mirrored or not
    expected = 200 / 18
    for counts in (ours, theirs):  # chi squared with 17 degrees of freedom an image
        total = sum((count - expected) ** 2 / expected for count in counts.values())
        degrees = 17 * len(zeros)
        assert abs(total - degrees) < 5 * (2 * degrees) ** 0.5


def test_resized_crops_have_torchvisions_distribution_of_sizes_and_shapes():
    """Area uniform in [0.08, 1], log aspect uniform in [log 3/4, log 4/3], read off a picture of coordinates."""
    side, size, count = 256, 32, 600
    ramp = np.stack([*np.meshgrid(np.arange(side), np.arange(side)), np.zeros((side, side))], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")

    class Row:
        open, where = staticmethod(lambda: Image.open(buffer)), "ramp"

    def shape(image):
        wide, tall = (image[axis].float().amax() - image[axis].float().amin() + 1 for axis in (0, 1))
        return float(wide * tall) / side**2, float((wide / tall).log())

    augmentation = Augmentation(size, "resized_crop")
    ours = np.array([shape(transform(Row, augmentation, seed, [0, 0], False)) for seed in range(count)])
    torch.manual_seed(0)
    plain = v2.Compose([v2.RandomResizedCrop(size), v2.PILToTensor()])
    theirs = np.array([shape(plain(Image.open(buffer))) for _ in range(count)])
    for axis in range(2):
        a, b = np.sort(ours[:, axis]), np.sort(theirs[:, axis])
        both = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / count
        assert gap < 1.95 * (2 / count) ** 0.5  # Kolmogorov-Smirnov, one in a thousand
    again = transform(Row, augmentation, 7, [0, 0], False)
    assert torch.equal(again, transform(Row, augmentation, 7, [0, 0], False)) and again.shape == (3, size, size)


def test_photographs_of_any_size_are_evaluated_at_the_centre(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for part, count in (("train", 4), ("val", 2)):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(noise(number, (40 + 7 * label, 30 + number)))
    config = options(tmp_path, augment="resized_crop", image_size=16)
    data, batches = pipeline(f"folder:{tmp_path}/set", config)
    assert "resized crops" in data.described and (data.image_size, data.augment) == (16, "resized_crop")
    loader = batches.training(data.train, 4)
    assert [tuple(batch.images.shape) for batch in loader.epoch(0)] == [(4, 3, 16, 16)] * 2
    first, again = (torch.cat([batch.images for batch in loader.epoch(e)]) for e in (0, 0))
    assert torch.equal(first, again)
    ((images, labels),) = batches.evaluation(data.test, 8)
    plain = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])
    expected = plain(Image.open(tmp_path / "set/val/cat/1.png"))
    assert torch.equal(images[1], batches.normalise(expected[None])[0]) and labels.tolist() == [0, 0, 1, 1]


def test_the_gates_stream_of_a_set_on_disk_is_its_epochs_in_a_row(files, tmp_path):
    data, batches = pipeline(files, options(tmp_path, pipeline="workers"))
    loader = batches.training(data.train, 40)
    assert isinstance(loader, WorkerLoader)
    in_order = [batch.labels.tolist() for epoch in range(2) for batch in loader.epoch(epoch)]
    assert [loader.one(number).labels.tolist() for number in range(2 * len(loader))] == in_order
    assert [loader.one(number).labels.tolist() for number in (3, 1, 2)] == [in_order[n] for n in (3, 1, 2)]


def test_a_corrupt_image_met_while_training_is_named(tmp_path):
    write(tmp_path / "train.parquet", range(8))
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    table[6]["image"]["bytes"] = table[6]["image"]["bytes"][:60]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", range(8, 11))
    for changes in ({"data_workers": 1}, {"data_workers": 0}, {"streaming": True}):
        config = options(tmp_path, **({"pipeline": "workers"} | changes))
        with pytest.raises(
            UserError, match=r"image 6|image \d of process 0"
        ):  # the statistics of the set meet it, or the first epoch
            data, batches = pipeline(f"parquet:{tmp_path}/*.parquet", config)
            list(batches.training(data.train, 4).epoch(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "device", "augment": "resized_crop"}, "--pipeline device"),
        ({"pipeline": "device", "streaming": True}, "--pipeline device"),
        ({"streaming": True, "train_fraction": 0.5}, "--streaming"),
        ({"streaming": True, "exclude_classes": [1]}, "--streaming"),
        ({"exclude_classes": [3]}, "--exclude_classes 3"),
        ({"exclude_classes": [0, 1]}, "--exclude_classes"),
        ({"train_fraction": 0.001}, "--train_fraction"),
        ({"data_dir": "x"}, "--data_dir x"),
    ],
)
def test_options_that_do_not_go_together_are_refused(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_images(files, 12, False, options(tmp_path, **changes))


def test_a_set_that_does_not_fit_says_so(files, tmp_path, monkeypatch):
    monkeypatch.setattr("data.datasets.free_memory", lambda device: 10_000)
    data = load_images(files, 12, False, options(tmp_path))
    assert "workers" in data.described and "do not fit" in data.described
    with pytest.raises(UserError, match="--image_size"):
        load_images(files, None, False, options(tmp_path))
    monkeypatch.undo()
    assert "all on cpu" in load_images(files, 12, False, options(tmp_path)).described


def test_fractions_and_excluded_classes(files, tmp_path):
    whole = load_images(files, None, False)
    data = load_images(files, None, False, options(tmp_path, exclude_classes=[1], train_fraction=0.5))
    assert (data.num_classes, len(data.train), len(data.test)) == (3, 30, 20)
    assert torch.bincount(data.train.labels).tolist() == [15, 0, 15]
    assert torch.equal(data.test.images, whole.test.images)  # the test split keeps every class
    numbers = [(image[0, 0, 0] + 256 * image[1, 0, 0]).item() for image in data.train.images.int()]
    assert len(set(numbers)) == 30 and all(n % 3 == label for n, label in zip(numbers, data.train.labels, strict=True))
    again = load_images(files, None, False, options(tmp_path, exclude_classes=[1], train_fraction=0.5, seed=9))
    assert torch.equal(data.train.labels, again.train.labels)  # the same images whatever the run's seed


def test_a_stream_holds_every_image_once_an_epoch_in_another_order(files, tmp_path):
    data, batches = pipeline(files, options(tmp_path, streaming=True, crop_padding=0, flip=False))
    loader = batches.training(data.train, 16)
    assert isinstance(loader, StreamLoader) and (len(data.train), data.num_classes) == (90, 3)

    def numbers(epoch, start=0):
        scale, shift = batches.normalise.scale.view(3, 1, 1), batches.normalise.shift.view(3, 1, 1)
        for batch in loader.epoch(epoch, start):
            pixels = ((batch.images - shift) / scale).round().int()[:, :, 0, 0]
            yield [(red + 256 * green).item() for red, green, _ in pixels]

    first, second = list(numbers(0)), list(numbers(1))
    assert [len(part) for part in first] == [16, 16, 16, 16, 16, 10]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(90)) and first != second
    assert list(numbers(0)) == first and list(numbers(0, 3)) == first[3:]
    seen = [labels for _, labels in batches.evaluation(data.test, 8)]
    assert torch.cat(seen).tolist() == [n % 3 for n in range(90, 110)]


STREAMS = """
import sys, torch, torch.distributed as dist
from engine.config import RunConfig
from data.datasets import load_images
from data.pipeline import Pipeline
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
config = RunConfig(streaming=True, crop_padding=0, flip=False, data_workers=1, cache_dir=sys.argv[2])
data = load_images(sys.argv[1], 12, False, config)
pipeline = Pipeline(data, config, torch.device("cpu"), rank, world)
loader = pipeline.training(data.train, 16)
scale, shift = pipeline.normalise.scale.view(3, 1, 1), pipeline.normalise.shift.view(3, 1, 1)
def numbers(images):
    pixels = ((images - shift) / scale).round().int()[:, :, 0, 0]
    return [(red + 256 * green).item() for red, green, _ in pixels]
with open(f"{sys.argv[2]}-{rank}.txt", "w") as out:
    for start in (0, 4):
        for batch in loader.epoch(0, start):
            print("train", start, batch.loss_scale, *numbers(batch.images), file=out)
    for images, labels in pipeline.evaluation(data.test, 8):
        print("test", 0, 0, *numbers(images), file=out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_stream_without_loss_or_repetition(files, tmp_path, world):
    """Three shards of 50, 10 and 30 rows: two processes run dry far apart, four cannot have a shard each."""
    succeeded(forked_processes(world, "-c", STREAMS, files, tmp_path / "cache"))
    rows = [line.split() for path in tmp_path.glob("cache-*.txt") for line in path.read_text().splitlines()]
    train = [(scale, numbers) for kind, start, scale, *numbers in rows if (kind, start) == ("train", "0")]
    assert sorted(int(n) for _, numbers in train for n in numbers) == list(range(90))
    assert len(train) == 6 * world and all(2 <= len(numbers) <= 16 for _, numbers in train)
    late = [int(n) for kind, start, _, *numbers in rows if (kind, start) == ("train", "4") for n in numbers]
    assert len(late) == 26
    assert sorted(int(n) for kind, _, _, *numbers in rows if kind == "test" for n in numbers) == list(range(90, 110))
    assert sum(float(scale) for scale, _ in train) == pytest.approx(6 * world)


def test_a_stream_that_is_not_as_long_as_it_says_stops(files, tmp_path):
    for change, message in ((-4, "more than the 86"), (4, "fewer than the 94")):
        data, batches = pipeline(files, options(tmp_path, streaming=True))
        data.train.stream.count += change
        with pytest.raises(UserError, match=message):
            list(batches.training(data.train, 10).epoch(0))


@pytest.mark.parametrize("kind", ["clone", "saved", "tree"])
def test_a_named_set_from_a_local_copy(files, tmp_path, kind):
    import datasets

    folder = tmp_path / "copy"
    folder.mkdir()
    if kind == "tree":
        for part, count in (("train", 5), ("validation", 2)):
            for name in ("n01", "n02"):
                (folder / part / name).mkdir(parents=True)
                for number in range(count):
                    (folder / part / name / f"{number}.png").write_bytes(noise(number, (32, 32)))
    else:
        write(folder / "train-00000-of-00001.parquet", range(30), (32, 32))
        write(folder / "test-00000-of-00001.parquet", range(30, 36), (32, 32))
    if kind == "saved":
        datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "c")).save_to_disk(str(tmp_path / "saved"))
        folder = tmp_path / "saved"
    found = {}
    for place in ("device", "workers"):
        config = options(tmp_path, data_dir=str(folder), offline=True, pipeline=place)
        data, batches = pipeline("cifar10", config)
        loader = batches.training(data.train, 5)
        found[place] = [batch.images for batch in loader.epoch(0)]
    assert len(data.train) == (10 if kind == "tree" else 30)
    assert all(torch.equal(a, b) for a, b in zip(found["device"], found["workers"], strict=True))


def test_imagenet200_is_200_of_the_1000_classes_numbered_anew(tmp_path):
    import datasets

    from data.hub import IMAGENET200
    from data.sources import TableSource

    assert len(set(IMAGENET200)) == 200 and list(IMAGENET200) == sorted(IMAGENET200)
    labels = [0, 1, 25, 2, 988, 25, 999]  # goldfish, salamander, acorn: 0, 1 and 199 of Tiny-ImageNet
    table = datasets.Dataset.from_dict({"image": [noise(i) for i in range(7)], "label": labels})
    source = TableSource("imagenet200", table, "image", "label", IMAGENET200)
    assert source.labels() == [0, 1, 199, 1]
    assert [row.label for row in source] == [0, 1, 199, 1]
    pixels = [np.asarray(row.open())[0, 0, 0] for row in source]
    assert pixels == [1, 2, 4, 5]


def test_an_interrupted_copy_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    write(folder / "train.parquet", range(30), (32, 32))
    write(folder / "test.parquet", range(30, 36), (32, 32))
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])
    for name, config in (
        ("cifar10", options(tmp_path, data_dir=str(folder))),
        ("cifar10", options(tmp_path, data_dir=str(folder), streaming=True)),
        (f"parquet:{folder}/*.parquet", options(tmp_path)),
        (f"parquet:{folder}/*.parquet", options(tmp_path, streaming=True)),
        ("cifar10", options(tmp_path, data_dir=str(tmp_path / "nothing"))),
    ):
        with pytest.raises(UserError) as error:
            load_images(name, 32, False, config)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_options_alone_hold_what_runs_hold():
    assert DataOptions() == DataOptions(
        **{name: getattr(RunConfig(), name) for name in DataOptions.__dataclass_fields__}
    )
