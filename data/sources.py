"""Where images come from: Hugging Face data sets, parquet files, folder trees. One source is one split."""

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common import UserError
from data.decode import from_cell, open_file

TEST_FILE = re.compile(r"(?<![a-z])(test|val|validation)(?![a-z])")
TEST_SPLITS = ("test", "validation", "valid", "val")
READ_AT_ONCE = 64  # rows of a parquet file
READ_BUFFER = 1 << 16  # bytes of a column: without it and with read-ahead, whole files stay in memory

# The classes of Tiny-ImageNet-200 among ImageNet's 1,000, both in the order of their WordNet ids.
IMAGENET200 = (
    *(1, 25, 30, 32, 50, 61, 69, 71, 75, 76, 79, 99, 105, 107, 109, 113, 114, 115, 122, 123, 128, 145, 146, 149, 151),
    *(187, 207, 208, 235, 267, 281, 283, 285, 286, 291, 294, 301, 308, 309, 311, 313, 314, 315, 319, 323, 325, 329),
    *(338, 341, 345, 347, 349, 353, 354, 365, 367, 372, 386, 387, 398, 400, 406, 411, 414, 421, 424, 425, 427, 430),
    *(435, 436, 437, 438, 440, 445, 447, 448, 457, 458, 462, 463, 466, 467, 470, 471, 474, 480, 485, 488, 492, 496),
    *(500, 508, 509, 511, 517, 525, 526, 532, 542, 543, 557, 562, 565, 567, 568, 570, 573, 576, 604, 605, 612, 614),
    *(619, 621, 625, 627, 635, 645, 652, 655, 675, 677, 678, 682, 683, 687, 704, 707, 716, 720, 731, 733, 734, 735),
    *(737, 739, 744, 747, 758, 760, 761, 765, 768, 774, 779, 781, 786, 801, 806, 808, 811, 815, 817, 821, 826, 837),
    *(839, 842, 845, 849, 850, 853, 862, 866, 873, 874, 877, 879, 887, 888, 890, 899, 900, 909, 910, 917, 923, 924),
    *(928, 929, 932, 935, 938, 945, 947, 950, 951, 954, 957, 962, 963, 964, 967, 970, 972, 973, 975, 978, 988),
)


class Hub(NamedTuple):
    """A data set of the Hugging Face hub.

    `size`: the side of its images, or of what networks see of them where they differ in size: these are
    trained on as `resized_crop`. `classes`: the labels that are kept, in the order of their new numbers.
    """

    path: str
    image: str
    label: str
    size: int
    resized_crop: bool = False
    classes: tuple[int, ...] | None = None


HUB = {
    "cifar10": Hub("uoft-cs/cifar10", "img", "label", 32),
    "cifar100": Hub("uoft-cs/cifar100", "img", "fine_label", 32),
    "stl10": Hub("tanganke/stl10", "image", "label", 96),
    "tiny_imagenet": Hub("zh-plus/tiny-imagenet", "image", "label", 64),
    "imagenet": Hub("ILSVRC/imagenet-1k", "image", "label", 224, resized_crop=True),
    "imagenet200": Hub("ILSVRC/imagenet-1k", "image", "label", 224, resized_crop=True, classes=IMAGENET200),
}


class Row(NamedTuple):
    """An image and its label, not yet decoded."""

    where: str  # what to call the image
    open: Callable[[], Image.Image]
    label: object


@dataclass
class TableSource:
    """Rows of a Hugging Face `Dataset`, memory-mapped: any row at any time.

    With `classes` only the rows of these labels, numbered anew in the order given.
    """

    name: str
    table: object
    image: str
    label: str
    classes: tuple[int, ...] | None = None
    folder: str | None = None  # where cells may name files

    def __post_init__(self):
        if self.classes is not None:
            wanted = set(self.classes)
            labels = self.table[self.label][:]
            self.table = self.table.select([index for index, label in enumerate(labels) if label in wanted])

    def __len__(self) -> int:
        return len(self.table)

    @property
    def class_names(self) -> list[str] | None:
        names = getattr((self.table.features or {}).get(self.label), "names", None)
        return names if names is None or self.classes is None else [names[label] for label in self.classes]

    def labels(self) -> list:
        return [self._number(label) for label in self.table[self.label][:]]

    def row(self, index: int) -> Row:
        cells = self.table[int(index)]
        label = self._number(cells[self.label])
        return Row(f"{self.name} image {index}", lambda: from_cell(cells[self.image], self.folder), label)

    def _number(self, label):
        return label if self.classes is None else self.classes.index(label)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


@dataclass
class FolderSource:
    """Image files with their labels."""

    samples: list[tuple[str, int]]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    def labels(self) -> list:
        return [label for _, label in self.samples]

    def row(self, index: int) -> Row:
        file, label = self.samples[index]
        return Row(file, lambda: open_file(file), label)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


@dataclass
class ParquetSource:
    """Rows of parquet files, read front to back, a few at a time. `indexed` gives access to any row."""

    pattern: str
    files: list[str]
    cache_dir: str | None

    def __post_init__(self):
        import pyarrow
        import pyarrow.parquet

        try:
            if pipes := [file for file in self.files if not Path(file).is_file()]:  # opening a pipe would wait
                raise OSError(f"{pipes[0]} is no regular file")
            self.tables = [
                pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_BUFFER) for file in self.files
            ]
            for table in self.tables:
                if missing := {"image", "label"} - set(table.schema_arrow.names):
                    raise OSError(f"no column {' and no column '.join(sorted(missing))}")
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--dataset parquet:{self.pattern}: cannot read image and label: {reason}") from None

    def __len__(self) -> int:
        return sum(table.metadata.num_rows for table in self.tables)

    @property
    def class_names(self) -> list[str] | None:
        return _noted_names(self.tables[0].schema_arrow.metadata)

    def labels(self) -> list:
        return [label for table in self.tables for label in table.read(columns=["label"])["label"].to_pylist()]

    def __iter__(self) -> Iterator[Row]:
        import pyarrow

        for file, table in zip(self.files, self.tables, strict=True):
            index = 0
            try:
                for batch in table.iter_batches(READ_AT_ONCE, columns=["image", "label"], use_threads=False):
                    cells, labels = batch["image"], batch["label"].to_pylist()
                    for cell, label in zip(cells, labels, strict=True):
                        yield Row(f"{file} row {index}", lambda cell=cell: from_cell(cell.as_py()), label)
                        index += 1
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"--dataset: {file} is damaged after row {index}: {reason}") from None

    def indexed(self) -> TableSource:
        """The same rows as a memory-mapped table in the cache of Hugging Face datasets."""
        table = undecoded(load_parquet(self.pattern, self.files, self.cache_dir), "image")
        return TableSource(self.pattern, table, "image", "label")


def _noted_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The names that Hugging Face datasets notes in a parquet file for `label`; None where it does not."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):  # another writer's file, or labels without names
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


Source = TableSource | FolderSource | ParquetSource


@dataclass
class Stream:
    """A split that is read from front to back while it is fetched: a Hugging Face `IterableDataset`."""

    name: str
    rows: object
    image: str
    label: str
    count: int
    num_classes: int
    class_names: list[str] | None = None


def parquet_sources(pattern: str, cache_dir: str | None) -> list[ParquetSource]:
    """One or two sources: training files, and test files where there are any."""
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"--dataset parquet:{pattern}: no file matches")
    tests = [file for file in files if TEST_FILE.search(Path(file).name)]
    groups = ([file for file in files if file not in tests], tests)
    sources = [ParquetSource(pattern, group, cache_dir) for group in groups if group]
    noted = [_noted_names(table.schema_arrow.metadata) for source in sources for table in source.tables]
    if any(names != noted[0] for names in noted):
        raise UserError(f"--dataset parquet:{pattern}: its files name their classes differently")
    return sources


def folder_sources(path: str) -> list[FolderSource]:
    """The sources of PATH/train and PATH/test, or of PATH alone."""
    from torchvision.datasets import ImageFolder

    root = Path(path)
    names = [name for name in ("train", *TEST_SPLITS) if (root / name).is_dir()]
    try:
        folders = [ImageFolder(root / name) for name in names[:2]] if "train" in names else [ImageFolder(root)]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--dataset folder:{path}: {str(error).splitlines()[0]}") from None
    if len(folders) == 2 and folders[0].classes != folders[1].classes:
        raise UserError(f"--dataset folder:{path}: {names[0]} and {names[1]} have different classes")
    return [FolderSource(folder.samples, folder.classes) for folder in folders]


def hub_sources(name: str, data_dir: str | None, cache_dir: str | None, offline: bool) -> list[TableSource]:
    """Training and test split of a named data set, from the hub, the cache or a local copy."""
    splits = _load_hub(name, data_dir, cache_dir, offline, streaming=False)
    sources = []
    for split in _split_names(name, splits):
        table = splits[split]
        image, label = _columns(name, table.column_names)
        parts = (undecoded(table, image), image, label, HUB[name].classes, data_dir)
        sources.append(TableSource(f"{name} {split}", *parts))
    return sources


def hub_streams(name: str, data_dir: str | None, cache_dir: str | None, offline: bool) -> list[Stream]:
    """The same without fetching the set first."""
    import datasets

    if HUB[name].classes is not None:
        raise UserError(f"--streaming: {name} is picked out of a larger set by index, which a stream does not have")
    splits = _load_hub(name, data_dir, cache_dir, offline, streaming=True)
    streams = []
    for split in _split_names(name, splits):
        rows = splits[split]
        image, label = _columns(name, rows.column_names)
        kind, known = rows.features[label], (rows.info.splits or {}).get(split)
        if known is None or not known.num_examples or not isinstance(kind, datasets.ClassLabel):
            raise UserError(f"--streaming: {name} does not say how many images and classes it has")
        rows = undecoded(rows, image)
        counts = known.num_examples, kind.num_classes
        streams.append(Stream(f"{name} {split}", rows, image, label, *counts, kind.names))
    return streams


def parquet_streams(pattern: str, cache_dir: str | None) -> list[Stream]:
    """The streams of parquet files, training images first."""
    streams = []
    for source in parquet_sources(pattern, cache_dir):
        labels = source.labels()
        if not labels or any(type(label) is not int for label in labels):
            raise UserError(f"--dataset parquet:{pattern}: labels must be whole numbers, in every row")
        rows = undecoded(load_parquet(pattern, source.files, cache_dir, streaming=True), "image")
        counts = len(labels), max(labels) + 1
        streams.append(Stream(pattern, rows, "image", "label", *counts, source.class_names))
    return streams


def undecoded(table, image: str):
    """The data set with cells of `image` as they are stored: they are decoded later, and named when it fails."""
    import datasets

    if isinstance((table.features or {}).get(image), datasets.Image):
        return table.cast_column(image, datasets.Image(decode=False))
    return table


def load_parquet(pattern: str, files: list[str], cache_dir: str | None, **options):
    """All rows of parquet files, as a Hugging Face data set. Raises UserError for files that cannot be read."""
    datasets = _datasets()
    try:
        return datasets.load_dataset("parquet", split="train", cache_dir=cache_dir, data_files=files, **options)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"--dataset parquet:{pattern}: cannot be read ({_reason(error)})") from None


def _load_hub(name: str, data_dir: str | None, cache_dir: str | None, offline: bool, streaming: bool):
    datasets = _datasets()
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir}: is no folder")
    if offline:
        _go_offline()
    try:
        if data_dir is not None and (Path(data_dir) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(data_dir)
        return datasets.load_dataset(data_dir or HUB[name].path, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds
        reason = _reason(error)
        if data_dir is not None:
            raise UserError(f"--data_dir {data_dir}: cannot be read as {name} ({reason})") from None
        raise UserError(
            f"--dataset {name}: cannot fetch '{HUB[name].path}' and no cached copy was found ({reason}). What was "
            "fetched before is kept: run again, or give a local copy with --data_dir"
        ) from None


def _datasets():
    """The library, which shows its bars and retries on a terminal only, and warns of nothing that is no error here."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.logging.set_verbosity_error()
    return datasets


def _go_offline() -> None:
    """As HF_HUB_OFFLINE=1 would, which the library reads only once, when it is first imported."""
    import datasets.config
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # "an error occurred while generating" says less than its cause
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _split_names(name: str, splits) -> list[str]:
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if "train" not in splits or test is None:
        raise UserError(f"--dataset {name}: has the splits {', '.join(splits)}; a training and a test split are needed")
    return ["train", test]


def _columns(name: str, columns: list[str]) -> tuple[str, str]:
    image = next((column for column in (HUB[name].image, "image", "img") if column in columns), None)
    label = next((column for column in (HUB[name].label, "label") if column in columns), None)
    if image is None or label is None:
        wanted = f"{HUB[name].image} and {HUB[name].label}"
        raise UserError(f"--dataset {name}: has the columns {', '.join(columns)}; {wanted} are needed")
    return image, label
