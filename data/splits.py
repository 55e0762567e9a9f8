"""Parts of an image set: in memory, on disk, or a stream."""

from dataclasses import dataclass

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
