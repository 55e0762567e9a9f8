"""Images without labels, to learn from a teacher on: where they come from, and which of them are left out."""

import glob
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, check_name
from data.batch import UNLABELED
from data.datasets import MIN_IMAGES_TO_SAY, decide
from data.images import CHUNK, decoded, images_of
from data.near_duplicates import NEAR, is_near, perceptual_hash
from data.sources import FolderSource, Row, TableSource, load_parquet, undecoded
from data.splits import ImageSet, Split, StoredSplit, Unlabeled


def with_unlabeled(data: ImageSet, config, device: torch.device | None = None, progress: bool = True) -> ImageSet:
    """`data` with the images of --unlabeled, without the near-duplicates of its test images.

    They are compared as networks of `data.image_size` see them; `config` holds a run's options (distill.py's).

    Raises:
        UserError: a place without images, one that cannot be read (named), or nothing that is left.
    """
    place = config.unlabeled
    known = torch.cat([perceptual_hash(images) for images in images_of(data.test, data.image_size)])
    try:
        source = _source(place, config.cache_dir)
        held, where = decide([len(source)], data.image_size, data.augment, config.pipeline, device)
        rows = tqdm(source, desc="unlabelled images", disable=not progress or len(source) < MIN_IMAGES_TO_SAY or None)
        split, digest = _kept(source, rows, data.image_size, known, held)
    except UserError as error:  # of what reads data sets
        raise UserError(str(error).replace("--dataset", "--unlabeled", 1)) from None
    left_out = f"{len(source) - len(split):,} near-duplicates of test images (at most {NEAR} of 64 bits apart)"
    if not len(split):
        raise UserError(f"--unlabeled {place}: has no images but {left_out}")
    described = (
        f"unlabelled: {len(split):,} images, {config.unlabeled_ratio} with each labelled one; left out: {left_out}"
    )
    return replace(data, unlabeled=Unlabeled(split, config.unlabeled_ratio, digest, f"{described}; {where}"))


def _source(place: str, cache_dir: str | None) -> FolderSource | TableSource:
    kind, _, where = place.partition(":")
    check_name("--unlabeled", kind, ["folder", "parquet"])
    if kind == "parquet":
        files = sorted(file for file in glob.glob(where, recursive=True) if Path(file).is_file())
        source = _table(where, files, cache_dir) if files else None
    else:
        from torchvision.datasets.folder import IMG_EXTENSIONS  # here, because torchvision is slow to import

        files = sorted(str(file) for file in Path(where).rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        source = FolderSource([(file, UNLABELED) for file in files], [])
    if not source:
        raise UserError(f"--unlabeled {place}: there are no images")
    return source


def _table(pattern: str, files: list[str], cache_dir: str | None) -> TableSource:
    table = load_parquet(pattern, files, cache_dir)
    if "image" not in table.column_names:
        raise UserError(f"--unlabeled parquet:{pattern}: has the columns {', '.join(table.column_names)}, but no image")
    table = undecoded(table.select_columns("image"), "image")
    return TableSource(pattern, table.add_column("label", [UNLABELED] * len(table)), "image", "label")


def _kept(
    source: FolderSource | TableSource, rows: Iterable[Row], side: int, known: Tensor, held: bool
) -> tuple[Split | StoredSplit, str]:
    """The images unlike those of the hashes `known`, decoded if they are `held`; a digest of all their hashes."""
    count, kept, digest = len(source), [], hashlib.sha256()
    shape = (count if held else 0, 3, side, side)
    pixels = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for number, images in enumerate(decoded(rows, side)):
        if held:
            pixels[number * CHUNK :][: len(images)] = images
        hashes = perceptual_hash(images)
        kept.append(~is_near(hashes, known))
        digest.update((hashes > 0).numpy().tobytes())
    indices = torch.cat(kept).nonzero().squeeze(1)
    labels = torch.full((len(indices),), UNLABELED)
    split = Split(pixels, labels, indices) if held else StoredSplit(source, labels, indices)
    return split, digest.hexdigest()[:12]
