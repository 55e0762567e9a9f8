"""Which images a split holds, as a checksum."""

import hashlib

import numpy as np
import torch

from data.decode import read_rgb
from data.splits import Split, StoredSplit

CHUNK = 4096  # images that are hashed at once
SAMPLED = 1024  # images on disk that are looked at


def digest_of(split: Split | StoredSplit, side: int) -> str:
    """SHA-256 of a split's labels and pixels: of all images in memory, of evenly spread ones of those on disk."""
    digest = hashlib.sha256(split.labels.cpu().numpy().tobytes())
    if isinstance(split, Split):
        for rows in torch.arange(len(split)).split(CHUNK):
            part = split.take(rows.to(split.labels.device))
            digest.update(part.images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()
    some = torch.linspace(0, len(split) - 1, min(len(split), SAMPLED)).long()
    for index in split.indices[some].tolist():
        row = split.source.row(index)
        digest.update(np.asarray(read_rgb(row.open, row.where, side)).tobytes())
    return digest.hexdigest()
