"""Which images a split holds, as a checksum."""

import hashlib

import torch

from data.images import images_of
from data.splits import Split, StoredSplit

SAMPLED = 1024  # images on disk that are looked at


def digest_of(split: Split | StoredSplit, side: int) -> str:
    """SHA-256 of a split's labels and pixels: of all images in memory, of evenly spread ones of those on disk."""
    digest = hashlib.sha256(split.labels.cpu().numpy().tobytes())
    if isinstance(split, StoredSplit):
        split = split.take(torch.linspace(0, len(split) - 1, min(len(split), SAMPLED)).long())
    for images in images_of(split, side):
        digest.update(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    return digest.hexdigest()
