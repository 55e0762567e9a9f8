"""Parts of an image set, wherever their images are."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sources import Source, Stream


@dataclass
class Split:
    """Images in memory, and their labels int64 [N].

    `pixels` uint8 [M, 3, H, W], stored channels_last; the split is its rows `indices`, all of them if None. So
    parts of a set share the set's memory.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W]; a copy where the split is a part."""
        return self.pixels if self.indices is None else self.pixels[self.indices]

    def take(self, indices: Tensor) -> "Split":
        return Split(self.pixels, self.labels[indices], indices if self.indices is None else self.indices[indices])


@dataclass
class StoredSplit:
    """Images on disk, decoded whenever they are needed: rows `indices` int64 [N] of `source`, labels int64 [N]."""

    source: Source
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "StoredSplit":
        return StoredSplit(self.source, self.labels[indices], self.indices[indices])


@dataclass
class StreamSplit:
    """Images that can only be read from front to back."""

    stream: Stream

    def __len__(self) -> int:
        return self.stream.count


AnySplit = Split | StoredSplit | StreamSplit


@dataclass
class Unlabeled:
    """Images without labels: a step sees `ratio` of them with every labelled one.

    split: the images, their labels UNLABELED. digest: of what they look like. described: how many there are, and why
    not more.
    """

    split: Split | StoredSplit
    ratio: int
    digest: str
    described: str

    def repeated(self, wanted: int) -> Split | StoredSplit:
        """The images, all of them as often as it takes for `wanted` or more."""
        count = len(self.split)
        return self.split.take(torch.arange(-(-wanted // count) * count) % count)


@dataclass
class ImageSet:
    """A data set ready for training: `val` is a part kept apart from `train`, or None.

    `mean` and `std` normalise RGB values in [0, 1]; `flip` says whether mirrored images keep their class;
    `augment` is crop or resized_crop; `described` says where the images are and why; `class_names` in the order of
    the labels, where the set has any; `unlabeled` images that are trained on beside `train`, or None.
    """

    name: str
    num_classes: int
    image_size: int
    train: AnySplit
    test: AnySplit
    mean: list[float]
    std: list[float]
    flip: bool
    augment: str = "crop"
    described: str = ""
    val: AnySplit | None = None
    class_names: list[str] | None = None
    unlabeled: Unlabeled | None = None

    def fingerprint(self) -> str:
        """Sizes and labels in words: two sets that differ in these are not the same set."""
        parts = []
        for name, split in (("training", self.train), ("test", self.test)):
            digest = ""
            if not isinstance(split, StreamSplit):
                digest = f" (labels {hashlib.sha256(split.labels.numpy().tobytes()).hexdigest()[:12]})"
            parts.append(f"{len(split):,} {name} images{digest}")
        if self.unlabeled is not None:
            parts.append(f"{len(self.unlabeled.split):,} without labels (hashes {self.unlabeled.digest})")
        return f"{', '.join(parts)} of {self.image_size}x{self.image_size}, {self.num_classes} classes"
