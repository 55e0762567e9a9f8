"""The images of a split as they are, without augmentation, a few at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data.decode import read_rgb
from data.sources import Row
from data.splits import Split, StoredSplit

CHUNK = 1024  # images at once


def images_of(split: Split | StoredSplit, side: int) -> Iterator[Tensor]:
    """A split's images uint8 [n, 3, side, side], CHUNK at a time, channels_last and on the host."""
    if isinstance(split, StoredSplit):
        return decoded(map(split.source.row, split.indices.tolist()), side)
    rows = torch.arange(len(split), device=split.labels.device)
    return (split.take(some).images.cpu() for some in rows.split(CHUNK))


def decoded(rows: Iterable[Row], side: int) -> Iterator[Tensor]:
    """The same of rows of a source. Raises UserError for an image that cannot be read, named."""
    rows = iter(rows)
    while images := [np.asarray(read_rgb(row.open, row.where, side)) for row in islice(rows, CHUNK)]:
        yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
