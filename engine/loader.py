"""Batches of normalised, augmented images, as a function of seed and epoch.

Which images make a batch and how each is augmented depends on (seed, epoch) alone, so a resumed run needs no
sampler state, and every process can compute its share of a batch by itself. `DeviceLoader` is for sets that
are in memory: a batch is a gather of rows of pixels on the device. Sets that are not are read by workers.py
and stream.py, with the same plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common import UserError, derive_seed
from engine.data import Split


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    kind: "crop" (`padding` zeros around, a random crop of the image's own size) or "resized_crop" (a part of
    random size and shape, resized: Szegedy et al., CVPR 2015, as torchvision has it). size: side of the result.
    flip: mirror half of the images. cutout: side of a square set to the mean colour, centred anywhere on the
    image (DeVries and Taylor, arXiv 1708.04552); 0: none.
    """

    size: int
    kind: str = "crop"
    padding: int = 0
    flip: bool = True
    cutout: int = 0

    @property
    def views(self) -> int | None:
        """How many different images it makes of one; None: more than can be counted."""
        return (2 * self.padding + 1) ** 2 * (1 + self.flip) if self.kind == "crop" and not self.cutout else None

    def view(self, offsets: Tensor, flips: Tensor) -> Tensor | None:
        """Numbers [N] int64 of the views with these crops [N, 2] and mirrors [N]."""
        if self.views is None:
            return None
        places = offsets[:, 0] * (2 * self.padding + 1) + offsets[:, 1]
        return places * 2 + flips if self.flip else places


class Plan(NamedTuple):
    """How every image of an epoch is met: what to do with row `order[i]` of the split stands in place i."""

    order: Tensor  # [N] int64
    offsets: Tensor  # [N, 2] int64, rows and columns, of the crop in the padded image
    flips: Tensor  # [N] bool
    holes: Tensor  # [N, 2] int64, rows and columns, centre of the cutout

    def part(self, begin: int, end: int, rank: int, world: int) -> "Plan":
        return Plan(*(each[begin:end][rank::world] for each in self))

    def to(self, device: torch.device) -> "Plan":
        return Plan(*(each.to(device) for each in self))


class Batch(NamedTuple):
    """A process's share of a global batch.

    `share` is what the mean loss over it must be multiplied with so that the average over processes is the
    mean over the global batch: 1 unless the shares differ in size.
    """

    images: Tensor  # [n, 3, H, W] float32, normalised, channels_last
    labels: Tensor  # [n] int64
    share: float
    rows: Tensor | None = None  # [n] int64: which images of the split; None in a stream, which has no numbers
    views: Tensor | None = None  # [n] int64: which of `Augmentation.views`; None where they are not known

    def parts(self, count: int, world: int = 1) -> list["Batch"]:
        """`count` batches that together are this one, in all of `world` processes alike, and fewer where it is
        too small: BatchNorm needs two images in each. Their shares sum to this one's.
        """
        if count == 1:
            return [self]
        images = len(self.labels)
        smallest = round(images * world / self.share) // world  # any process's share of the global batch
        count = max(1, min(count, smallest // 2))
        copies = self.images.unflatten(0, (-1, images)).tensor_split(count, dim=1)
        labels, *numbers = (
            [None] * count if each is None else each.tensor_split(count)
            for each in (self.labels, self.rows, self.views)
        )
        return [
            Batch(each.flatten(0, 1), label, self.share * len(label) / images, *which)
            for each, label, *which in zip(copies, labels, *numbers, strict=True)
        ]


class Loader(ABC):
    """Training batches of a split; what its kinds share.

    Args:
        split: where the images are.
        batch_size: images a step over all processes.
        normalise: from uint8 to what networks take.
        augmentation: of training images.
        seed: of the run.
        rank, world: this process and how many there are.
        copies: how many times each batch's images are given, augmented anew, one behind the other.
    """

    def __init__(
        self,
        split,
        batch_size: int,
        normalise: "Normalise",
        augmentation: Augmentation,
        seed: int,
        rank: int = 0,
        world: int = 1,
        copies: int = 1,
    ):
        if batch_size > len(split):
            raise UserError(f"--batch_size {batch_size}: the training split has {len(split)} images only")
        if batch_size < 2 * world:
            raise UserError(f"--batch_size {batch_size}: {world} processes need at least 2 images each")
        self.split, self.batch_size, self.normalise, self.augmentation = split, batch_size, normalise, augmentation
        self.seed, self.rank, self.world, self.copies = seed, rank, world, copies
        # BatchNorm needs two images in every process: a rest smaller than that joins the batch before it.
        full, rest = divmod(len(split), batch_size)
        self.edges = [batch_size * i for i in range(full)] + ([batch_size * full] if rest >= 2 * world else [])
        self.edges.append(len(split))
        self._stream: tuple[int, Iterator[Batch] | None] = (-1, None)  # the number `one` gives next

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.edges) - 1

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; together they hold every image exactly once."""

    def one(self, number: int) -> Batch:
        """Batch `number` of an endless stream over epochs; the one after the last is at hand."""
        expected, batches = self._stream
        if number != expected or number % len(self) == 0:
            batches = self.epoch(*divmod(number, len(self)))
        self._stream = (number + 1, batches)
        return next(batches)

    def plan(self, epoch: int, copy: int = 0) -> Plan:
        """The plan of an epoch, on the host, the same in every process; copies have the order in common."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", epoch))
        images, vary = len(self.split), self.augmentation
        order = torch.randperm(images, generator=generator)
        if copy:
            generator.manual_seed(derive_seed(self.seed, "batches", epoch, "copy", copy))
        offsets = torch.randint(0, 2 * vary.padding + 1, (images, 2), generator=generator)
        flips = torch.rand(images, generator=generator) < (0.5 if vary.flip else 0.0)
        holes = torch.randint(0, vary.size, (images, 2), generator=generator)
        return Plan(order, offsets, flips, holes)

    def finish(
        self,
        images: Tensor,
        labels: Tensor,
        holes: Tensor,
        number: int,
        rows: Tensor | None = None,
        views: Tensor | None = None,
    ) -> Batch:
        """The batch of these uint8 images [n, 3, H, W] on the device, cropped and mirrored already."""
        images = self.normalise(images)
        if self.augmentation.cutout:
            images = cut_out(images, holes, self.augmentation.cutout)
        share = len(labels) * self.world / (self.edges[number + 1] - self.edges[number])
        return Batch(images, labels, share, rows, views)


class DeviceLoader(Loader):
    """Batches of a split whose pixels are on the device."""

    split: Split

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pixels, rows, padding = self.split.pixels, self.split.rows, self.augmentation.padding
        plans = [self.plan(epoch, copy).to(pixels.device) for copy in range(self.copies)]
        views = self.augmentation.view(plans[0].offsets, plans[0].flips) if self.copies == 1 else None
        for number in range(start, len(self)):
            edges = self.edges[number], self.edges[number + 1]
            parts = [plan.part(*edges, self.rank, self.world) for plan in plans]
            chosen = parts[0].order
            originals = select(pixels, chosen if rows is None else rows[chosen])
            copies = [augment(originals, part.offsets, part.flips, padding) for part in parts]
            images = copies[0] if len(copies) == 1 else torch.cat(copies)
            holes = parts[0].holes if len(parts) == 1 else torch.cat([part.holes for part in parts])
            seen = None if views is None else views[slice(*edges)][self.rank :: self.world]
            yield self.finish(images, self.split.labels[chosen], holes, number, chosen, seen)

    def view(self, view: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows [n], images) of this process's share of the split, all as this one of `Augmentation.views`."""
        device, padding = self.split.labels.device, self.augmentation.padding
        place, flip = divmod(view, 2) if self.augmentation.flip else (view, 0)
        offset = torch.tensor(divmod(place, 2 * padding + 1), device=device)
        for part in evaluation_parts(len(self.split), batch_size, self.rank, self.world):
            rows = torch.arange(len(self.split), device=device)[part]
            originals = select(self.split.pixels, rows if self.split.rows is None else self.split.rows[rows])
            flips = torch.full((len(rows),), bool(flip), device=device)
            yield rows, self.normalise(augment(originals, offset.expand(len(rows), 2), flips, padding))


class Normalise:
    """uint8 [N, 3, H, W] -> float32 (x / 255 - mean) / std, channels_last."""

    def __init__(self, mean, std, device: torch.device):
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        flat = images.permute(0, 2, 3, 1).reshape(count, -1)
        # Whole images in a row: a loop over three channels would be too short to be fast on a CPU.
        scale, shift = self.scale.repeat(height * width), self.shift.repeat(height * width)
        wide = flat.float()
        torch.addcmul(shift, wide, scale, out=wide)
        return wide.view(count, height, width, channels).permute(0, 3, 1, 2)


def select(pixels: Tensor, rows: Tensor) -> Tensor:
    """`pixels[rows]` of channels_last [M, 3, H, W], copied as whole images."""
    count, channels, height, width = pixels.shape
    chosen = pixels.permute(0, 2, 3, 1).view(count, -1).index_select(0, rows)
    return chosen.view(-1, height, width, channels).permute(0, 3, 1, 2)


def augment(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop [N, C, H, W] images, padded with zeros, at `offsets` [N, 2] (rows, columns), and mirror `flips` [N].

    The crop is a gather of whole rows of pixels: in channels_last memory those are W * C consecutive bytes.
    """
    count, channels, height, width = images.shape
    images = images.permute(0, 2, 3, 1)
    if padding:
        tall, wide = height + 2 * padding, width + 2 * padding
        canvas = images.new_zeros(count, tall, wide, channels)
        canvas[:, padding:-padding, padding:-padding] = images
        image = torch.arange(count, device=images.device)[:, None] * tall
        line = image + offsets[:, :1] + torch.arange(height, device=images.device)
        starts = (line * wide + offsets[:, 1:]) * channels
        length = width * channels
        lines = canvas.view(-1).as_strided((canvas.numel() - length + 1, length), (1, 1))
        images = lines.index_select(0, starts.view(-1)).view(count, height, width, channels)
    both = torch.cat([images, images.flip(2)]).view(2 * count, -1)  # select copies whole images, where() bytes
    chosen = torch.arange(count, device=images.device) + flips * count
    return both.index_select(0, chosen).view(count, height, width, channels).permute(0, 3, 1, 2)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Zero, the mean colour, in a square of `side` around `centres` [N, 2], clipped at the border."""
    height, width = images.shape[2:]
    first = centres - side // 2
    rows = torch.arange(height, device=images.device) - first[:, :1]
    columns = torch.arange(width, device=images.device) - first[:, 1:]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)


def evaluation_parts(count: int, batch_size: int, rank: int, world: int) -> Iterator[slice]:
    """This process's share of `count` images: over all processes each once, in parts of about equal size."""
    batches = -(-count // (batch_size * world))
    for number in range(batches):
        yield slice(rank + number * world, None, batches * world)


def evaluation_batches(split: Split, normalise: Normalise, batch_size: int, rank: int, world: int) -> Iterator:
    """(images, labels) of a split in memory, each image once over all processes."""
    for part in evaluation_parts(len(split), batch_size, rank, world):
        rows = torch.arange(len(split), device=split.labels.device)[part]
        yield normalise(select(split.pixels, rows if split.rows is None else split.rows[rows])), split.labels[part]
