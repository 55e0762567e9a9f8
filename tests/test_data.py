"""Image sets: where they come from, how they are split, and what is wrong with bad ones."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from common import UserError
from data.datasets import hold_out, load_images
from data.options import DataOptions
from data.sources import TableSource
from tests.runs import forked, here

SHARED = Path(__file__).parents[2] / "shared" / "data"


def encoded(value: int = 0, size=(8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    colour = value if mode in ("L", "1") else (value, 255 - value, 7)
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list) -> None:
    cells = [{"bytes": image, "path": None} for image in images]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), path)


def test_digits_are_scikit_learns_split_in_one_fixed_stratified_way():
    first, second = load_images("digits"), load_images("digits")
    assert (len(first.train), len(first.test), first.num_classes, first.image_size) == (1437, 360, 10, 16)
    assert torch.equal(first.test.images, second.test.images)
    digest = hashlib.sha256(bytes(first.test.labels.tolist())).hexdigest()
    assert digest.startswith("da1a2ec12e5c2ed7")  # the same on every machine
    counts = torch.bincount(first.test.labels)
    assert counts.max() - counts.min() <= 3
    together = torch.cat([first.train.labels, first.test.labels]).bincount()
    assert together.tolist() == np.bincount(load_digits().target).tolist()
    assert not first.flip


def test_digits_are_resized_and_grey_in_three_channels():
    data = load_images("digits", 32)
    images = data.train.images
    assert images.shape == (1437, 3, 32, 32) and images.dtype == torch.uint8 and images.max() == 255
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    # Bilinear, pixels as squares: of twice the side each pixel is 9, 3, 3 and 1 sixteenths of the four around it.
    small, large = (load_images("digits", size).train.images[:20, 0].double() for size in (8, 16))
    around = small[:, :-1, :-1], small[:, :-1, 1:], small[:, 1:, :-1], small[:, 1:, 1:]
    expected = sum(share * each for share, each in zip((9, 3, 3, 1), around, strict=True)) / 16
    assert (large[:, 1:-1:2, 1:-1:2] - expected).abs().max() < 1.1  # both are rounded


def test_normalisation_is_that_of_the_training_split():
    data = load_images("digits")
    values = data.train.images.double() / 255
    for channel in range(3):
        assert data.mean[channel] == pytest.approx(values[:, channel].mean().item(), abs=1e-6)
        assert data.std[channel] == pytest.approx(values[:, channel].std(correction=0).item(), abs=1e-6)


def test_parts_held_out_are_stratified_disjoint_and_complete():
    data = load_images("digits")
    rest, val = hold_out(data, 0.1, "validation")
    rest, gates = hold_out(rest, 0.1, "gates")
    assert len(val) == 144 and len(gates) == 130
    everything = torch.cat([part.images.flatten(1) for part in (rest.train, val, gates)])
    assert torch.equal(everything.sort(0).values, data.train.images.flatten(1).sort(0).values)
    assert torch.bincount(val.labels).min() >= 13
    same, nothing = hold_out(data, 0.0, "validation")
    assert same is data and nothing is None


def test_parquet_with_a_test_file_grey_images_and_a_new_size(tmp_path):
    write_parquet(tmp_path / "x-train.parquet", [encoded(i, mode="L") for i in range(6)], [0, 1] * 3)
    write_parquet(tmp_path / "x-test.parquet", [encoded(9), encoded(200)], [1, 0])
    data = load_images(f"parquet:{tmp_path}/*.parquet", 16)
    assert data.train.images.shape == (6, 3, 16, 16) and len(data.test) == 2 and data.flip
    assert data.train.images[4].unique().tolist() == [4]
    assert data.test.images[1, :, 0, 0].tolist() == [200, 55, 7] and data.test.labels.tolist() == [1, 0]


def test_parquet_without_a_test_file_gives_a_fifth_away(tmp_path):
    write_parquet(tmp_path / "all.parquet", [encoded(i) for i in range(20)], [0, 1] * 10)
    data = load_images(f"parquet:{tmp_path}/all.parquet")
    assert (len(data.train), len(data.test)) == (16, 4)
    assert torch.bincount(data.test.labels).tolist() == [2, 2]


def test_classes_are_named_in_the_order_of_their_labels(tmp_path):
    assert load_images("digits").class_names == list("0123456789")
    images, labels = [encoded(i) for i in range(20)], [0, 1, 2, 1] * 5
    write_parquet(tmp_path / "plain.parquet", images, labels)
    assert load_images(f"parquet:{tmp_path}/plain.parquet").class_names is None
    names = ["wolf", "ant", "bee", "yak"]  # of the last there is no image
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    cells = [{"bytes": image, "path": None} for image in images]
    for part in ("train", "test"):
        Dataset.from_dict({"image": cells, "label": labels}, kinds).to_parquet(tmp_path / f"of-{part}.parquet")
    place = f"parquet:{tmp_path}/of-*.parquet"
    assert load_images(place).class_names == names[:3]
    assert load_images(place, options=DataOptions(binary=[2, 0])).class_names == ["not wolf or bee", "wolf or bee"]
    streamed = load_images(place, options=DataOptions(streaming=True, cache_dir=str(tmp_path / "cache")))
    assert streamed.class_names == names[:3]
    table = TableSource("x", Dataset.from_dict({"image": cells, "label": labels}, kinds), "image", "label", (2, 0))
    assert table.class_names == ["bee", "wolf"] and table.labels()[:3] == [1, 0, 1]
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=names[::-1])})
    Dataset.from_dict({"image": cells, "label": labels}, kinds).to_parquet(tmp_path / "of-test.parquet")
    with pytest.raises(UserError, match="its files name their classes differently"):
        load_images(place)


@pytest.mark.parametrize("layout", ["train and test", "train and val", "classes only"])
def test_folder_trees(tmp_path, layout):
    parts = {"train and test": ["train", "test"], "train and val": ["train", "val"], "classes only": [""]}[layout]
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(10):
                (tmp_path / part / name / f"{i}.png").write_bytes(encoded(100 * label + i))
    data = load_images(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test)) == ((16, 4) if parts == [""] else (20, 20))
    assert data.class_names == ["cat", "dog"]
    assert all(
        (image[0, 0, 0] >= 100) == label for image, label in zip(data.train.images, data.train.labels, strict=True)
    )


def listed(folder: Path, part: str, rows: dict[str, object], file: str = "labels.csv") -> None:
    """A folder of images, whose red is their number, and a file that says what each is; with a column to spare."""
    for number, name in enumerate(rows):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_bytes(encoded(number))
    lines = [f'{name},{number},"{label}"\r\n' for number, (name, label) in enumerate(rows.items())]
    (folder / part / file).write_text("".join(["\ufefffile_name,id,label\r\n", *lines]), newline="")


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [(["owl", "a, b", "cat"], [2, 0, 1], ["a, b", "cat", "owl"]), ([10, 2, 0], [10, 2, 0], None)],
    ids=["names", "numbers"],
)
def test_folders_with_a_file_of_labels(tmp_path, labels, numbers, names):
    spare = {f"more/{number}.png": number for number in range(11)} if names is None else {}
    images = {f"{number}.png": label for number, label in enumerate(labels)}
    listed(tmp_path, "train", images | spare, "metadata.csv")
    listed(tmp_path, "test", {name: images[name] for name in list(images)[:2]})
    for place in ("device", "workers"):
        data = load_images(f"folder:{tmp_path}", 8, options=DataOptions(pipeline=place))
        assert data.train.labels[:3].tolist() == numbers and data.test.labels.tolist() == numbers[:2]
        assert data.class_names == names
    assert load_images(f"folder:{tmp_path}").train.images[:3, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n../0.png,cat\n", "row 1 leads out of the folder"),
        ("file_name,label\na/../../0.png,cat\n", "row 1 leads out of the folder"),
        ("file_name,label\n/etc/0.png,cat\n", "row 1 leads out of the folder"),
        ("file_name,class\n0.png,cat\n", "row 1 has no file_name or no label"),
        ("file_name,label\n0.png,cat\n1.png\n", "row 2 has no file_name or no label"),
        ("file_name,label\n0.png,cow\n", "test has the class 'cow', which train has not"),
        ("file_name,label\n", "a split is empty"),
        ("file_name,label\n9.png,cat\n", r"cannot read the image .*test/9\.png: .*No such file"),
        (None, "test must hold one of labels.csv and metadata.csv"),
    ],
)
def test_files_of_labels_that_cannot_be_followed(tmp_path, text, message):
    listed(tmp_path, "train", {"0.png": "cat", "1.png": "dog"})
    (tmp_path / "test").mkdir()
    if text is not None:
        (tmp_path / "test/labels.csv").write_text(text)
    with pytest.raises(UserError, match=rf"^--dataset[^\n]*{message}[^\n]*$"):
        load_images(f"folder:{tmp_path}")


def test_a_corrupt_file_in_a_folder_tree_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "dog" / "3.png").write_bytes(encoded(3)[:50])
    with pytest.raises(UserError, match=r"dog/3\.png"):
        load_images(f"folder:{tmp_path}")


def bad_parquet(tmp_path, images=None, labels=None) -> str:
    images = images or [encoded(i) for i in range(10)]
    write_parquet(tmp_path / "bad.parquet", images, labels or [0, 1] * 5)
    return f"parquet:{tmp_path}/bad.parquet"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": [encoded(1)] * 3 + [b"no image"] + [encoded(1)] * 6}, "bad.parquet row 3"),
        ({"images": [encoded(1)] * 3 + [encoded(1)[:40]] + [encoded(1)] * 6}, "bad.parquet row 3"),
        ({"images": [encoded(1)] * 9 + [encoded(1, (9, 9))]}, "row 9 is 9x9"),
        ({"images": [encoded(1, (8, 9))] * 10}, "row 0 is 8x9"),
        ({"labels": [0, 1, -1, *[0, 1] * 3, 0]}, "row 2 has the label -1"),
        ({"labels": [0.0, 1.0] * 5}, "label 0.0"),
        ({"labels": [0, None] * 5}, "label None"),
        ({"labels": ["a", "b"] * 5}, "label 'a'"),
        ({"labels": [0, 2] * 5}, "class 1 has no training image"),
        ({"labels": [0] * 10}, "one class"),
        ({"labels": [0, 1, *[1] * 8]}, "test split"),
    ],
)
def test_bad_sets_are_refused_with_the_place(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        load_images(bad_parquet(tmp_path, **changes))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "find any class folder"),
        (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/cow/1.png"], "train and test have different"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], "train and val have different classes"),
        (["train/cat/1.png", "train/dog/", "test/cat/1.png", "test/dog/1.png"], "no valid file for the classes dog"),
        (["cat/notes.txt", "dog/notes.txt"], "no valid file for the classes cat, dog"),
    ],
    ids=["nothing", "other classes", "a class too few", "an empty class", "no images"],
)
def test_folders_that_cannot_be_a_set(tmp_path, files, message):
    for name in files:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(encoded(1))
    with pytest.raises(UserError, match=f"--dataset folder:{tmp_path}: .*{message}"):
        load_images(f"folder:{tmp_path}")


def test_test_labels_above_the_class_count_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(1)] * 4, [0, 1] * 2)
    write_parquet(tmp_path / "test.parquet", [encoded(1)] * 2, [1, 2])
    with pytest.raises(UserError, match="test split has the label 2 of 2"):
        load_images(f"parquet:{tmp_path}/*.parquet")


def test_nothing_there(tmp_path):
    (tmp_path / "not.parquet").write_text("text")
    write_parquet(tmp_path / "empty-train.parquet", [], [])
    for name, message in {
        f"parquet:{tmp_path}/none*.parquet": "no file matches",
        f"parquet:{tmp_path}/not.parquet": "cannot read",
        f"parquet:{tmp_path}/empty-train.parquet": "empty|cannot take|test split",
        f"folder:{tmp_path}/missing": "missing",
        f"folder:{tmp_path}": "class",
        "cifar11": "did you mean cifar1",
    }.items():
        with pytest.raises(UserError, match=message):
            load_images(name)


def test_cifar_without_a_network_is_one_line(tmp_path, monkeypatch):
    """As with HF_HUB_OFFLINE=1, which these libraries read when they are imported."""
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    done = here("train_teacher.py", "--dataset", "cifar10", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "cannot fetch 'uoft-cs/cifar10'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real CIFAR-10 files beside the checkout")
def test_real_images_in_the_hubs_parquet_layout(tmp_path):
    for part in ("train", "test"):
        table = pyarrow.parquet.read_table(SHARED / f"cifar10-{part}.parquet").slice(0, 300)
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
    data = load_images(f"parquet:{tmp_path}/*.parquet")
    assert data.train.images.shape == (300, 3, 32, 32) and data.num_classes == 10
    assert all(0.35 < mean < 0.55 for mean in data.mean)


def write_cells(path: Path, cells: list, labels: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), path)


def cells(count: int) -> list[dict]:
    return [{"bytes": encoded(), "path": None}] * count


def test_only_a_whole_word_makes_a_file_the_test_split(tmp_path):
    write_cells(tmp_path / "latest-train.parquet", cells(20), [0, 1] * 10)
    write_cells(tmp_path / "latest-test.parquet", cells(4), [0, 1] * 2)
    data = load_images(f"parquet:{tmp_path}/*.parquet")
    assert (len(data.train), len(data.test)) == (20, 4)


def test_a_picture_of_absurd_size_is_named(tmp_path):
    images = [encoded(), encoded(1, (20000, 18000), "1")]
    write_cells(tmp_path / "x.parquet", [{"bytes": image, "path": None} for image in images], [0, 1])
    with pytest.raises(UserError, match="parquet row 1"):
        load_images(f"parquet:{tmp_path}/x.parquet", 8)


def test_image_cells_without_bytes_are_named(tmp_path):
    write_cells(tmp_path / "x.parquet", [{"path": "a.png"}] * 10, [0, 1] * 5)
    with pytest.raises(UserError, match="parquet row 0"):
        load_images(f"parquet:{tmp_path}/x.parquet")


LITTLE_MEMORY = """
import resource, sys
from common import UserError
from data.datasets import load_images
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_images(sys.argv[1])
except UserError as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    assert "labels are whole numbers from 0 to 999999" in str(error) and grown < 200_000, (error, grown)
    sys.exit(9)
"""


def test_a_huge_label_costs_no_memory(tmp_path):
    write_cells(tmp_path / "train.parquet", cells(20), [0] * 19 + [10_000_000])
    write_cells(tmp_path / "test.parquet", cells(2), [0, 0])
    done = forked("-c", LITTLE_MEMORY, f"parquet:{tmp_path}/*.parquet")
    assert done.returncode == 9, done.stderr[-300:]
