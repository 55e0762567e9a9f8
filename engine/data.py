"""Image sets as uint8 tensors in memory: by name, from parquet files, or from a folder tree."""

import glob
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import UserError, check_name

HUB = {"cifar10": ("uoft-cs/cifar10", "img", "label"), "cifar100": ("uoft-cs/cifar100", "img", "fine_label")}
TEST_SHARE = 0.2  # of a set that comes without a test split
SPLIT_SEED = 0  # the same split in every run, whatever its seed
TEST_FILE = re.compile(r"(?<![a-z])(test|val|validation)(?![a-z])")
MIN_IMAGES_TO_SAY = 5000  # decoding fewer than these shows no bar


@dataclass
class Split:
    """images uint8 [N, 3, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class ImageSet:
    """A data set ready for training: `val` and `gates` are parts kept apart from `train`, or None.

    `mean` and `std` are those of the training split's RGB values in [0, 1]; `flip` says whether mirrored
    images keep their class.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    mean: list[float]
    std: list[float]
    flip: bool
    val: Split | None = None
    gates: Split | None = None

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]


def load_images(name: str, image_size: int | None = None, progress: bool = True) -> ImageSet:
    """Load a data set.

    Args:
        name: `digits` (scikit-learn's 1,797 handwritten digits, embedded), `cifar10` or `cifar100` (through
            Hugging Face datasets), `parquet:GLOB` (columns image and label; files with "test" or "val" in
            their name are the test split) or `folder:PATH` (PATH/train/CLASS/*.png and PATH/test or PATH/val,
            or just PATH/CLASS/*.png). A set without a test split gets a fixed, stratified one of a fifth.
        image_size: side that all images are resized to; None keeps the set's own.
        progress: show a bar while many images are decoded.

    Raises:
        UserError: unknown name, nothing found, an image that cannot be read (named), images of several sizes
            without `image_size`, labels that are not class indices, or an empty split.
    """
    kind, _, place = name.partition(":")
    check_name("--dataset", kind, ["digits", *HUB, "parquet", "folder"])
    if bool(place) != (kind in ("parquet", "folder")):
        raise UserError(f"--dataset {name}: a place follows parquet: and folder: only, and must follow them")
    if kind == "digits":
        splits, flip = [_digits(image_size or 16)], False
    else:
        reader = {"parquet": _parquet, "folder": _folder}.get(kind, _hub)
        splits = [_decode(*source, image_size, progress) for source in reader(place or kind)]
        flip = True
    train, test = splits if len(splits) == 2 else _divide(splits[0], TEST_SHARE, "the test split")
    for where, split in (("training", train), ("test", test)):
        if not len(split):
            raise UserError(f"--dataset {name}: the {where} split is empty")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(f"--dataset {name}: training and test images differ in size; give --image_size")
    num_classes = _count_classes(name, train, test)
    mean, std = _normalisation(train.images)
    return ImageSet(name, num_classes, train, test, mean, std, flip)


def hold_out(data: ImageSet, fraction: float, part: str) -> ImageSet:
    """`data` with a fixed, stratified fraction of its training split moved to `part` ("val" or "gates")."""
    if not fraction:
        return data
    train, held = _divide(data.train, fraction, f"the part for {part}")
    return replace(data, train=train, **{part: held})


def _divide(split: Split, share: float, purpose: str) -> tuple[Split, Split]:
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(split))
    try:
        kept, held = train_test_split(indices, test_size=share, random_state=SPLIT_SEED, stratify=split.labels.numpy())
    except ValueError as error:
        raise UserError(f"--dataset: cannot take {share:g} of the training split as {purpose}: {error}") from None
    return split.take(torch.from_numpy(np.sort(kept))), split.take(torch.from_numpy(np.sort(held)))


def _digits(image_size: int) -> Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)  # 8x8, values 0..16
    resized = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = resized.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Split(images, torch.from_numpy(bunch.target).long())


# A source of images: how many, and an iterator of (what to call it, how to open it, its label).
Source = tuple[int, Iterable[tuple[str, Callable[[], Image.Image], object]]]


def _hub(name: str) -> list[Source]:
    import datasets

    path, image_column, label_column = HUB[name]
    try:
        loaded = datasets.load_dataset(path)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"--dataset {name}: cannot fetch '{path}' and no cached copy was found ({reason})") from None

    def rows(split):
        for index, row in enumerate(loaded[split]):
            yield f"{name} {split} image {index}", lambda image=row[image_column]: image, row[label_column]

    return [(len(loaded[split]), rows(split)) for split in ("train", "test")]


def _parquet(pattern: str) -> list[Source]:
    import pyarrow
    import pyarrow.parquet

    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"--dataset parquet:{pattern}: no file matches")
    tests = [file for file in files if TEST_FILE.search(Path(file).name)]
    sources = []
    for group in ([file for file in files if file not in tests], tests):
        if not group:
            continue
        try:
            tables = [pyarrow.parquet.read_table(file, columns=["image", "label"]) for file in group]
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--dataset parquet:{pattern}: cannot read image and label: {reason}") from None
        sources.append((sum(map(len, tables)), _parquet_rows(group, tables)))
    return sources


def _parquet_rows(files, tables):
    for file, table in zip(files, tables, strict=True):
        labels = table["label"].to_pylist()
        for index, (image, label) in enumerate(zip(table["image"], labels, strict=True)):
            cell = image.as_py()
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            yield f"{file} row {index}", lambda data=data: Image.open(io.BytesIO(data)), label


def _folder(path: str) -> list[Source]:
    from torchvision.datasets import ImageFolder

    root = Path(path)
    names = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    try:
        folders = [ImageFolder(root / name) for name in names[:2]] if "train" in names else [ImageFolder(root)]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--dataset folder:{path}: {str(error).splitlines()[0]}") from None
    if len(folders) == 2 and folders[0].classes != folders[1].classes:
        raise UserError(f"--dataset folder:{path}: {names[0]} and {names[1]} have different classes")

    def rows(samples):
        for file, label in samples:
            yield file, lambda file=file: Image.open(file), label

    return [(len(folder.samples), rows(folder.samples)) for folder in folders]


def _decode(count: int, rows: Iterable, image_size: int | None, progress: bool) -> Split:
    images, labels = [], []
    quiet = not progress or count < MIN_IMAGES_TO_SAY
    for where, open_image, label in tqdm(rows, total=count, desc="reading images", disable=quiet or None, leave=False):
        try:
            image = open_image().convert("RGB")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"--dataset: cannot read the image {where}: {error}") from None
        if image_size and image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        if image.size[0] != image.size[1] or (images and image.size[0] != images[0].shape[1]):
            size = f"{image.size[0]}x{image.size[1]}"
            raise UserError(f"--dataset: {where} is {size}, unlike others or not square; give --image_size")
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise UserError(f"--dataset: {where} has the label {label!r}; labels are whole numbers from 0")
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(label)
    if not images:
        return Split(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    return Split(torch.stack(images), torch.tensor(labels))


def _count_classes(name: str, train: Split, test: Split) -> int:
    classes = int(train.labels.max()) + 1
    present = train.labels.unique()  # sorted; its length, not the largest label, bounds the memory
    if len(present) < classes:
        missing = next(index for index, label in enumerate(present.tolist()) if index != label)
        raise UserError(f"--dataset {name}: labels run to {classes - 1}, but class {missing} has no training image")
    if classes < 2:
        raise UserError(f"--dataset {name}: all training images are of one class")
    if int(test.labels.max()) >= classes:
        raise UserError(f"--dataset {name}: the test split has the label {int(test.labels.max())} of {classes} classes")
    return classes


def _normalisation(images: Tensor) -> tuple[list[float], list[float]]:
    # Exact sums over integers: the same on every machine.
    counts = torch.stack([torch.bincount(images[:, c].flatten().int(), minlength=256) for c in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return [round(m, 6) for m in mean.tolist()], [round(max(v, 1e-6) ** 0.5, 6) for v in variance.tolist()]
