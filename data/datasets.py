"""Image sets: which images there are, how they are parted, and whether they are held in memory."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, check_name
from data.decode import from_cell, read_rgb
from data.hub import HUB, hub_of, hub_sources, hub_streams
from data.options import OF_THE_HUB, DataOptions
from data.sources import (
    ParquetSource,
    Row,
    Source,
    folder_sources,
    parquet_sources,
    parquet_streams,
)
from data.splits import AnySplit, ImageSet, Split, StoredSplit, StreamSplit

TEST_SHARE = 0.2  # of a set that comes without a test split
SPLIT_SEED = 0  # the same split in every run, whatever its seed
MIN_IMAGES_TO_SAY = 5000  # decoding fewer than these shows no bar
SHARE_OF_MEMORY = 0.5  # of what is free: a set below it is held in memory
STATISTICS_FROM = 1024  # images that the normalisation of a set that is not in memory is measured on
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's weights expect these
MAX_CLASSES = 1_000_000  # a classifier of more would not fit beside the images
CHUNK = 1 << 20  # bytes of images whose statistics are counted at once


def load_images(
    name: str,
    image_size: int | None = None,
    progress: bool = True,
    options: DataOptions | None = None,
    device: torch.device | None = None,
) -> ImageSet:
    """Load a data set.

    Args:
        name: `digits` (scikit-learn's 1,797 handwritten digits), a name of `HUB`, `hf:ORG/NAME`, `parquet:GLOB`
            (columns image and label; files with "test" or "val" in their name are the test split) or
            `folder:PATH` (PATH/train/CLASS/*.png and PATH/test or PATH/val, or just PATH/CLASS/*.png). A set
            without a test split gets a fixed, stratified one of a fifth.
        image_size: side that all images are resized to; None keeps the set's own.
        progress: show a bar while many images are decoded.
        options: fractions, subsets, places and pipeline; `dataset`, `image_size` and `val_fraction` in it are
            the caller's to use.
        device: where images will be held, for the question whether they fit; the CPU when None.

    Raises:
        UserError: unknown name, nothing found, an image that cannot be read (named), images of several sizes
            without `image_size`, labels that are not class indices, or an empty split.
    """
    options = options or DataOptions()
    kind = _kind(name, options)
    known = hub_of(name)
    augment = options.augment or ("resized_crop" if known and known.resized_crop else "crop")
    image_size = image_size or (known.size if known else None)
    if options.streaming:
        return _stream(name, image_size, augment, options)
    if kind == "digits":
        splits, names, described = [_digits(image_size or 16)], list("0123456789"), "images: in memory"
        if options.pipeline == "workers" or augment == "resized_crop":
            raise UserError("--dataset digits: has no encoded images for workers or resized crops")
    else:
        sources = _sources(name, options)
        names = sources[0].class_names
        sources = [_first_readable(name, source) for source in sources]
        size = image_size or sources[0][1]
        held, described = decide([len(source) for source, _ in sources], size, augment, options.pipeline, device)
        if not held and image_size is None:
            raise UserError(f"--image_size: give the side that networks shall see ({described})")
        if held:
            splits = [_decode(source, image_size, progress) for source, _ in sources]
        else:
            splits = [_stored(source) for source, _ in sources]
    train, test = splits if len(splits) == 2 else _divide(splits[0], TEST_SHARE, "the test split")
    for where, split in (("training", train), ("test", test)):
        if not len(split):
            raise UserError(f"--dataset {name}: the {where} split is empty")
    if isinstance(train, Split):
        if train.pixels.shape[1:] != test.pixels.shape[1:]:
            raise UserError(f"--dataset {name}: training and test images differ in size; give --image_size")
        size = train.pixels.shape[-1]
    classes = _count_classes(name, train, test)
    train, test, num_classes = _subset(train, test, classes, options)
    names = _class_names(names, classes, options.binary)
    moments, flip = _normalisation(train, size, known is not None and known.resized_crop), kind != "digits"
    return ImageSet(name, num_classes, size, train, test, *moments, flip, augment, described, class_names=names)


def _kind(name: str, options: DataOptions) -> str:
    kind, _, place = name.partition(":")
    check_name("--dataset", kind, ["digits", *HUB, "hf", "parquet", "folder"])
    if bool(place) != (kind in ("hf", "parquet", "folder")):
        raise UserError(f"--dataset {name}: a place follows hf:, parquet: and folder: only, and must follow them")
    for option in OF_THE_HUB:
        value = getattr(options, option)
        if value is not None and kind not in ("hf", *HUB):
            raise UserError(f"--{option} {value}: only for data sets of the hub (hf:ORG/NAME, {', '.join(HUB)})")
    return kind


def hold_out(data: ImageSet, fraction: float, purpose: str) -> tuple[ImageSet, AnySplit | None]:
    """(`data` without a fixed, stratified fraction of its training split, that part); None of it for a fraction of 0.

    Raises:
        UserError: a stream, or classes with too few images; `purpose` says what the part was wanted for.
    """
    if not fraction:
        return data, None
    if isinstance(data.train, StreamSplit):
        raise UserError(f"--streaming: nothing can be held out of a stream for {purpose}; load the set without it")
    train, held = _divide(data.train, fraction, f"the part for {purpose}")
    return replace(data, train=train), held


def free_memory(device: torch.device | None) -> int:
    """Bytes that a process may still take on its device: of the host, its share among the local processes."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kilobytes * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _sources(name: str, options: DataOptions) -> list[Source]:
    kind, _, place = name.partition(":")
    if kind == "parquet":
        return parquet_sources(place, options.cache_dir)
    if kind == "folder":
        return folder_sources(place)
    return hub_sources(name, options)


def _first_readable(name: str, source: Source) -> tuple[Source, int]:
    """The source with the side of its first image."""
    first = next(iter(source), None)
    if first is None:
        raise UserError(f"--dataset {name}: a split is empty")
    return source, read_rgb(first.open, first.where).size[0]


def decide(counts: list[int], size: int, augment: str, pipeline: str, device) -> tuple[bool, str]:
    """Whether the images are held in memory, and the reason in words."""
    place = device.type if device is not None else "cpu"
    needed, free = sum(counts) * 3 * size * size, free_memory(device)
    if augment == "resized_crop":
        if pipeline == "device":
            raise UserError("--pipeline device: resized crops need the original images; use --pipeline workers")
        return False, "images: decoded by workers, as resized crops need the originals"
    room = f"{needed / 1e6:,.0f} MB as uint8, {free / 1e6:,.0f} MB free on {place}"
    if pipeline == "workers":
        return False, f"images: decoded by workers, as asked ({room})"
    if pipeline == "device" or needed <= SHARE_OF_MEMORY * free:
        return True, f"images: all on {place} ({room})"
    return False, f"images: decoded by workers, as they do not fit ({room})"


def _decode(source: Source, image_size: int | None, progress: bool) -> Split:
    """All images of a source, decoded into one tensor: beside it only a few encoded images are in memory."""
    count = len(source)
    quiet = not progress or count < MIN_IMAGES_TO_SAY
    pixels, labels = None, []
    rows = tqdm(source, total=count, desc="reading images", disable=quiet or None, leave=False)
    for index, row in enumerate(rows):
        image = read_rgb(row.open, row.where, image_size)
        if pixels is None:
            pixels = np.empty((count, image.size[1], image.size[0], 3), dtype=np.uint8)
        if image.size[0] != image.size[1] or image.size[0] != pixels.shape[2]:
            size = f"{image.size[0]}x{image.size[1]}"
            raise UserError(f"--dataset: {row.where} is {size}, unlike others or not square; give --image_size")
        pixels[index] = np.asarray(image)
        labels.append(_label(row))
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels))


def _label(row: Row) -> int:
    if isinstance(row.label, bool) or not isinstance(row.label, int) or not 0 <= row.label < MAX_CLASSES:
        shown = repr(row.label) if not isinstance(row.label, int) or abs(row.label) < 10**20 else "of many digits"
        raise UserError(
            f"--dataset: {row.where} has the label {shown}; labels are whole numbers from 0 to {MAX_CLASSES - 1}"
        )
    return row.label


def _stored(source: Source) -> StoredSplit:
    if isinstance(source, ParquetSource):
        source = source.indexed()
    labels = source.labels()
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            _label(source.row(index))
    return StoredSplit(source, torch.tensor(labels), torch.arange(len(labels)))


def _subset(train: AnySplit, test: AnySplit, num_classes: int, options: DataOptions) -> tuple[AnySplit, AnySplit, int]:
    """The training images that are left after --exclude_classes and --train_fraction, the test images, and how many
    classes they are of, after --binary."""
    excluded = sorted(set(options.exclude_classes))
    if excluded:
        wrong = [label for label in excluded if not 0 <= label < num_classes]
        if wrong:
            raise UserError(f"--exclude_classes {wrong[0]}: the data set has the classes 0 to {num_classes - 1}")
        if len(excluded) > num_classes - 2:
            raise UserError(f"--exclude_classes: leaves {num_classes - len(excluded)} of {num_classes} classes")
        keep = ~torch.isin(train.labels, torch.tensor(excluded))
        train = train.take(keep.nonzero().squeeze(1))
    if options.train_fraction < 1:
        _, train = _divide(train, options.train_fraction, "--train_fraction")
    if not options.binary:
        return train, test, num_classes
    check_binary(options.binary, num_classes)
    positive = torch.tensor(options.binary)
    return *(replace(split, labels=torch.isin(split.labels, positive).long()) for split in (train, test)), 2


def check_binary(positive: list[int], num_classes: int) -> None:
    """Raise UserError for classes of --binary that a set does not have, or for all of them."""
    if wrong := [label for label in positive if not 0 <= label < num_classes]:
        raise UserError(f"--binary {wrong[0]}: the data set has the classes 0 to {num_classes - 1}")
    if len(set(positive)) == num_classes:
        raise UserError(f"--binary: names all of the {num_classes} classes; leave some for the other side")


def _divide(split: AnySplit, share: float, purpose: str) -> tuple[AnySplit, AnySplit]:
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
    images = resized.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return Split(images, torch.from_numpy(bunch.target).long())


def _stream(name: str, image_size: int | None, augment: str, options: DataOptions) -> ImageSet:
    """A set that is never held: its size and classes are what it says of itself."""
    kind, _, place = name.partition(":")
    if options.train_fraction < 1 or options.exclude_classes or options.binary:
        raise UserError("--streaming: --train_fraction, --exclude_classes and --binary need the set to be loaded")
    if options.pipeline == "device":
        raise UserError("--pipeline device: holds the whole set in memory, which --streaming avoids")
    if kind == "parquet":
        streams = parquet_streams(place, options.cache_dir)
    elif hub_of(name):
        streams = hub_streams(name, options)
    else:
        raise UserError(f"--streaming: is for data sets of the hub and for parquet:, not for {name}")
    if len(streams) != 2:
        raise UserError(f"--streaming: {name} needs a test split of its own")
    train, test = streams
    if image_size is None:
        first = next(iter(train.rows))
        image_size = read_rgb(lambda: from_cell(first[train.image]), f"{train.name} image 0").size[0]
    classes = max(train.num_classes, 2)
    if test.num_classes > classes:
        raise UserError(f"--dataset {name}: the test split has the label {test.num_classes - 1} of {classes} classes")
    described = "images: streamed, nothing is kept"
    splits, names = (StreamSplit(train), StreamSplit(test)), _class_names(train.class_names, classes, [])
    moments = IMAGENET_MEAN, IMAGENET_STD
    return ImageSet(name, classes, image_size, *splits, *moments, True, augment, described, class_names=names)


def _count_classes(name: str, train: AnySplit, test: AnySplit) -> int:
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


def _class_names(names: list[str] | None, num_classes: int, positive: list[int]) -> list[str] | None:
    """The names of the classes that are trained on; None where the labels of some have none."""
    if names is None or len(names) < num_classes:
        return None
    names = [name.encode(errors="replace").decode() for name in names]  # a folder's may be no text
    if not positive:
        return names[:num_classes]  # a set may announce more than it has images of
    chosen = " or ".join(names[label] for label in sorted(set(positive)))
    return [f"not {chosen}", chosen]


def _normalisation(train: AnySplit, size: int, photographs: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the training split, values in [0, 1]."""
    if photographs:
        return IMAGENET_MEAN, IMAGENET_STD
    if isinstance(train, StoredSplit):
        some = torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_FROM)).long()
        rows = [train.source.row(index) for index in train.indices[some].tolist()]
        pixels = np.stack([np.asarray(read_rgb(row.open, row.where, size)) for row in rows])
        train = Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), train.labels[some])
    # Exact sums over integers: the same on every machine. A chunk at a time: counting takes wider numbers.
    counts = torch.zeros(3, 256, dtype=torch.float64)
    indices = torch.arange(len(train)) if train.indices is None else train.indices
    for chunk in indices.split(max(1, CHUNK // train.pixels[0].numel())):
        images = train.pixels.permute(0, 2, 3, 1)[chunk].flatten(0, 2)
        counts += torch.stack([torch.bincount(images[:, c].int(), minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return [round(m, 6) for m in mean.tolist()], [round(max(v, 1e-6) ** 0.5, 6) for v in variance.tolist()]
