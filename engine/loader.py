"""Batches of normalised, augmented images: on the device, in one piece, and a function of seed and epoch.

A whole set of small images lives on the device as uint8; a batch is a gather, a crop by index and a flip.
Which images make a batch and how each is augmented depends on (seed, epoch) alone, so a resumed run needs
no sampler state, and every process can compute its share of a batch by itself.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, derive_seed
from engine.data import Split


class Batch(NamedTuple):
    """A process's share of a global batch.

    `share` is what the mean loss over it must be multiplied with so that the average over processes is the
    mean over the global batch: 1 unless the shares differ in size.
    """

    images: Tensor  # [n, 3, H, W] float32, normalised, channels_last
    labels: Tensor  # [n] int64
    share: float


class Loader:
    """Training batches of a split.

    Args:
        split: on the device already.
        batch_size: images a step over all processes.
        mean, std: normalisation of RGB in [0, 1].
        padding: zeros around an image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images.
        seed: of the run.
        rank, world: this process and how many there are.
    """

    def __init__(self, split: Split, batch_size: int, mean, std, padding: int, flip: bool, seed: int, rank=0, world=1):
        if batch_size > len(split):
            raise UserError(f"--batch_size {batch_size}: the training split has {len(split)} images only")
        if batch_size < 2 * world:
            raise UserError(f"--batch_size {batch_size}: {world} processes need at least 2 images each")
        self.split, self.batch_size, self.padding, self.flip = split, batch_size, padding, flip
        self.seed, self.rank, self.world = seed, rank, world
        self.normalise = Normalise(mean, std, split.images.device)
        # BatchNorm needs two images in every process: a rest smaller than that joins the batch before it.
        full, rest = divmod(len(split), batch_size)
        self.edges = [batch_size * i for i in range(full)] + ([batch_size * full] if rest >= 2 * world else [])
        self.edges.append(len(split))
        self._planned: tuple[int, tuple | None] = (-1, None)  # the epoch that `one` is in

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.edges) - 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; together they hold every image exactly once."""
        plan = self.plan(epoch)
        for number in range(start, len(self)):
            yield self._batch(plan, number)

    def one(self, number: int) -> Batch:
        """Batch `number` of an endless stream over epochs."""
        epoch, number = divmod(number, len(self))
        if self._planned[0] != epoch:  # shuffled once an epoch, not once a batch
            self._planned = (epoch, self.plan(epoch))
        return self._batch(self._planned[1], number)

    def plan(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(order [N], crop offsets [N, 2], flips [N]) of an epoch, the same in every process."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", epoch))
        images = len(self.split)
        order = torch.randperm(images, generator=generator)
        offsets = torch.randint(0, 2 * self.padding + 1, (images, 2), generator=generator)
        flips = torch.rand(images, generator=generator) < (0.5 if self.flip else 0.0)
        device = self.split.images.device
        return order.to(device), offsets.to(device), flips.to(device)

    def _batch(self, plan, number: int) -> Batch:
        begin, end = self.edges[number], self.edges[number + 1]
        order, offsets, flips = (part[begin:end][self.rank :: self.world] for part in plan)
        images = augment(self.split.images[order], offsets, flips, self.padding)
        share = len(order) * self.world / (end - begin)
        return Batch(self.normalise(images), self.split.labels[order], share)


class Normalise:
    """uint8 [N, 3, H, W] -> float32 (x / 255 - mean) / std, channels_last."""

    def __init__(self, mean, std, device: torch.device):
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self.shift = (-mean / std).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        wide = images.to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(self.shift, wide, self.scale)


def augment(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop [N, C, H, W] images, padded with zeros, at `offsets` [N, 2] (rows, columns), and mirror `flips` [N]."""
    count, channels, height, width = images.shape
    if padding:
        images = F.pad(images, (padding,) * 4)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def evaluation_batches(split: Split, normalise: Normalise, batch_size: int, rank: int, world: int) -> Iterator:
    """(images, labels) of every world-th image: over all processes, each image once, in batches of about
    equal size."""
    batches = -(-len(split) // (batch_size * world))
    for number in range(batches):
        part = slice(rank + number * world, None, batches * world)
        yield normalise(split.images[part]), split.labels[part]
