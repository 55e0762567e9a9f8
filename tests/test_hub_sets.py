"""Data sets of the hub by their own name, from local copies in the hub's layouts: columns, splits, classes."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common import UserError
from data.datasets import load_images
from data.hub import hub_of
from data.pipeline import Pipeline
from engine.config import RunConfig
from tests.runs import here, read_json, succeeded

CLASSES = ["tench", "cat", "owl"]
MANY = {  # columns of a set: which hold images, which classes, which something else
    "picture": datasets.Image(),
    "id": datasets.Value("int64"),
    "kind": datasets.ClassLabel(names=CLASSES),
}


def png(number: int) -> dict:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def clone(folder: Path, features: dict, splits: dict[str, range], config: str = "default") -> Path:
    """A clone of a repository, as `push_to_hub` fills one: parquet files, and a card that says which are whose."""
    made = {datasets.Image: png, datasets.ClassLabel: lambda number: number % 3, datasets.Value: lambda number: number}
    card, files = folder / "README.md", []
    for split, numbers in splits.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: [made[type(kind)](number) for number in numbers] for name, kind in features.items()}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
        files.append({"split": split, "path": str(path.relative_to(folder))})
    known = yaml.safe_load(card.read_text().split("---")[1]) if card.exists() else {"configs": [], "dataset_info": []}
    known["configs"].append({"config_name": config, "data_files": files})
    counts = [{"name": split, "num_bytes": 1, "num_examples": len(numbers)} for split, numbers in splits.items()]
    known["dataset_info"].append({"config_name": config, "splits": counts})
    card.write_text(f"---\n{yaml.safe_dump(known)}---\n")
    return folder


def options(folder: Path, **changes) -> RunConfig:
    cache = str(folder.parent / "cache")
    return RunConfig(cache_dir=cache, data_dir=str(folder), offline=True, data_workers=0, **changes)


def seen(split) -> list[tuple[int, int]]:
    """The number in the first pixel of each image, and its label."""
    return sorted(zip(split.images[:, 0, 0, 0].tolist(), split.labels.tolist(), strict=True))


def test_columns_splits_and_classes_are_found(tmp_path):
    folder = clone(tmp_path / "copy", MANY, {"train": range(12), "validation": range(12, 18)})
    data = load_images("hf:someone/animals", None, False, options(folder))
    assert seen(data.train) == [(number, number % 3) for number in range(12)]
    assert seen(data.test) == [(number, number % 3) for number in range(12, 18)]
    assert (data.name, data.class_names, data.image_size) == ("hf:someone/animals", CLASSES, 8)
    with pytest.raises(UserError, match="has the splits train, validation; say which is for testing with --split_test"):
        load_images("hf:someone/animals", None, False, options(folder, split_train="validation"))


def test_a_set_is_streamed_whole(tmp_path):
    folder = clone(tmp_path / "copy", MANY, {"train": range(12), "validation": range(12, 18)})
    config = options(folder, streaming=True)
    data = load_images("hf:someone/animals", None, False, config)
    assert (len(data.train), len(data.test), data.class_names, data.image_size) == (12, 6, CLASSES, 8)
    test = list(Pipeline(data, config, torch.device("cpu")).evaluation(data.test, 4))
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    red = ((images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)) * 255)[:, 0, 0, 0]
    assert red.round().tolist() == list(range(12, 18)) and labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_columns_splits_and_one_of_several_sets_are_chosen(tmp_path):
    """Where there are several of a kind; and what is not asked for is not looked at."""
    several = MANY | {"mask": datasets.Image(), "colour": datasets.ClassLabel(names=["a", "b", "c"])}
    folder = clone(tmp_path / "copy", MANY, {"train": range(3)}, "small")
    folder = clone(folder, several, {"fold1": range(6), "fold2": range(6, 9), "test": range(9, 12)}, "large")
    chosen = {"image_column": "picture", "label_column": "kind", "split_train": "fold2", "split_test": "fold1"}
    for pipeline in ("device", "workers"):
        data = load_images("hf:someone/animals/large", 8, False, options(folder, pipeline=pipeline, **chosen))
        assert (len(data.train), len(data.test), data.class_names) == (3, 6, CLASSES)
    with pytest.raises(
        UserError, match=r"^--data_dir .*: cannot be read as hf:someone/animals \(Config name is missing"
    ):
        load_images("hf:someone/animals", 8, False, options(folder))
    for changes, message in (
        (
            {"image_column": None},
            "--dataset hf:a/b/large: has the columns picture, id, kind, mask, colour; .*--image_col",
        ),
        (
            {"label_column": None},
            "--dataset hf:a/b/large: has the columns .*; say which is the label's with --label_col",
        ),
        ({"label_column": "x"}, "--label_column x: hf:a/b/large has the columns picture, id, kind, mask, colour"),
        ({"split_train": None}, "--dataset hf:a/b/large: has the splits fold1, fold2, test; .* with --split_train"),
        ({"split_test": "x"}, "--dataset hf:a/b/large: has the splits fold1, fold2, test; .* with --split_test"),
        ({"split_test": "fold2"}, "--split_test fold2: is what is trained on"),
        ({"label_column": "id"}, "labels run to 8, but class 0 has no training image"),
    ):
        for streaming in (False, True):
            if streaming and "id" in changes.values():
                message = "--streaming: hf:a/b/large does not say how many images and classes it has"
            with pytest.raises(UserError, match=message):
                load_images("hf:a/b/large", 8, False, options(folder, streaming=streaming, **chosen | changes))


def test_a_test_split_without_labels_is_not_taken_for_imagenet():
    assert hub_of("imagenet").test == hub_of("imagenet200").test == "validation"


@pytest.mark.parametrize("name", ["hf:", "hf:a//b", "hf:a/b/c/d", "hf"])
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(UserError, match=f"^--dataset {name}: "):
        load_images(name)


def test_options_of_the_hub_are_refused_elsewhere(tmp_path):
    for option in ("image_column", "label_column", "split_train", "split_test"):
        with pytest.raises(UserError, match=f"^--{option} x: only for data sets of the hub"):
            load_images("digits", options=RunConfig(**{option: "x"}))


def test_a_run_on_such_a_set_keeps_the_names_of_its_classes(tmp_path):
    folder = clone(tmp_path / "copy", MANY, {"train": range(12), "test": range(12, 18)})
    words = ["--dataset", "hf:someone/animals", "--data_dir", folder, "--cache_dir", tmp_path / "cache", "--offline"]
    more = ["--model", "resnet8", "--epochs", 1, "--batch_size", 4, "--output_dir", tmp_path / "run"]
    done = succeeded(here("train_teacher.py", *map(str, words), "--label_column", "kind", *map(str, more)))
    assert f"--data_dir {folder} --label_column kind " in done.stdout  # of the command that goes on from it
    model = read_json(tmp_path / "run/model.json")
    assert (model["dataset"], model["class_names"]) == ("hf:someone/animals", CLASSES)
