"""Where images come from: tables of Hugging Face datasets, parquet files, folder trees. One source is one split."""

import csv
import glob
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common import UserError, read_text
from data.decode import from_cell, open_file

TEST_FILE = re.compile(r"(?<![a-z])(test|val|validation)(?![a-z])")
LABEL_FILES = ("labels.csv", "metadata.csv")  # beside the images of a split: columns file_name and label
CLASS_NUMBER = re.compile(r"[0-9]{1,18}")
TEST_SPLITS = ("test", "validation", "valid", "val")
READ_AT_ONCE = 64  # rows of a parquet file
READ_BUFFER = 1 << 16  # bytes of a column: without it and with read-ahead, whole files stay in memory


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
    class_names: list[str] | None

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
    """The sources of PATH/train and PATH/test, or of PATH alone: a folder for each class, or a file of labels."""
    from torchvision.datasets import ImageFolder

    root = Path(path)
    names = [name for name in ("train", *TEST_SPLITS) if (root / name).is_dir()]
    places = [root / name for name in names[:2]] if "train" in names else [root]
    if any((place / file).exists() for place in places for file in LABEL_FILES):
        return _listed_sources(path, places)
    try:
        folders = [ImageFolder(place) for place in places]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--dataset folder:{path}: {str(error).splitlines()[0]}") from None
    if len(folders) == 2 and folders[0].classes != folders[1].classes:
        raise UserError(f"--dataset folder:{path}: {names[0]} and {names[1]} have different classes")
    return [FolderSource(folder.samples, folder.classes) for folder in folders]


def _listed_sources(path: str, places: list[Path]) -> list[FolderSource]:
    """The sources of folders with a file of labels each: class numbers if all of them are, else names, sorted."""
    tables = [_read_labels(path, place) for place in places]
    if all(CLASS_NUMBER.fullmatch(label) for table in tables for _, label in table):
        return [FolderSource([(file, int(label)) for file, label in table], None) for table in tables]
    names = sorted({label for _, label in tables[0]})
    numbers = {name: number for number, name in enumerate(names)}
    for place, table in zip(places, tables, strict=True):
        if unknown := sorted({label for _, label in table} - numbers.keys()):
            said = f"{place.name} has the class {unknown[0]!r}, which {places[0].name} has not"
            raise UserError(f"--dataset folder:{path}: {said}")
    return [FolderSource([(file, numbers[label]) for file, label in table], names) for table in tables]


def _read_labels(path: str, place: Path) -> list[tuple[str, str]]:
    """Image file and label of each row; the files lie in the folder `place`, or below."""
    files = [place / name for name in LABEL_FILES if (place / name).exists()]
    if len(files) != 1:
        raise UserError(f"--dataset folder:{path}: {place} must hold one of {' and '.join(LABEL_FILES)}")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(files[0]).removeprefix("\ufeff"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--dataset folder:{path}: cannot read {files[0]} ({error})") from None
    found = []
    for number, row in enumerate(rows, 1):
        name, label = row.get("file_name"), row.get("label")
        if not name or not label:
            raise UserError(f"--dataset folder:{path}: {files[0]} row {number} has no file_name or no label")
        if os.path.isabs(name) or Path(os.path.normpath(name)).parts[0] == os.pardir:
            raise UserError(f"--dataset folder:{path}: {files[0]} row {number} leads out of the folder ({name})")
        found.append((str(place / name), label))
    return found


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
    datasets = datasets_library()
    try:
        return datasets.load_dataset("parquet", split="train", cache_dir=cache_dir, data_files=files, **options)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"--dataset parquet:{pattern}: cannot be read ({reason_of(error)})") from None


def datasets_library():
    """The library, which shows its bars and retries on a terminal only, and warns of nothing that is no error here."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.logging.set_verbosity_error()
    return datasets


def reason_of(error: Exception) -> str:
    """The first line of what an error of the library goes back to."""
    cause = error.__cause__ or error  # "an error occurred while generating" says less than its cause
    return (str(cause).splitlines() or [type(cause).__name__])[0]
