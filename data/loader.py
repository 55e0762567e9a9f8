"""Batches of normalised, augmented images, as a function of seed and epoch.

Which images make a batch and how each is augmented depends on (seed, epoch) alone, so a resumed run needs no
sampler state, and every process can compute its share of a batch by itself. `DeviceLoader` is for sets that
are in memory: a batch is a gather of rows of pixels on the device. Sets that are not are read by workers.py
and stream.py, with the same plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy as copy_of
from typing import Self

import torch
from torch import Tensor

from common import UserError, derive_seed
from data.augment import (
    Augmentation,
    Normalise,
    Plan,
    apply_policy,
    augment,
    cut_out,
    erase,
    erased_boxes,
    select,
)
from data.batch import Batch
from data.splits import Split


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
        cycle: after so many epochs every image is varied again as in the first of them; None: always anew.
    """

    def __init__(
        self,
        split,
        batch_size: int,
        normalise: Normalise,
        augmentation: Augmentation,
        seed: int,
        rank: int = 0,
        world: int = 1,
        copies: int = 1,
        cycle: int | None = None,
    ):
        if batch_size > len(split):
            raise UserError(f"--batch_size {batch_size}: the training split has {len(split)} images only")
        if batch_size < 2 * world:
            raise UserError(f"--batch_size {batch_size}: {world} processes need at least 2 images each")
        self.split, self.batch_size, self.normalise, self.augmentation = split, batch_size, normalise, augmentation
        self.seed, self.rank, self.world, self.copies, self.cycle = seed, rank, world, copies, cycle
        self.edges = batch_edges(len(split), batch_size, world)
        self.fold = 1  # images of the plan for each that the edges count
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

    def undivided(self, stop: int) -> Self:
        """The same batches as one process alone has them, up to number `stop`."""
        whole = copy_of(self)
        whole.rank, whole.world, whole._stream = 0, 1, (-1, None)
        whole.edges = batch_edges(len(self.split), self.batch_size, 1)[: stop + 1]
        return whole

    def beside(self, other: "Loader", fold: int) -> Self:
        """Batches in step with another loader's: to each of its images, in every process, `fold` of these."""
        companion = copy_of(self)
        companion.edges, companion.fold = other.edges, fold
        return companion

    def share(self, plan: Plan, number: int) -> Plan:
        """This process's part of batch `number` of an epoch's plan."""
        return plan.part(self.edges[number], self.edges[number + 1], self.rank, self.world, self.fold)

    def view_of(self, epoch: int) -> int:
        """The epoch whose draws vary the images of this one."""
        return epoch if self.cycle is None else epoch % self.cycle

    def plan(self, epoch: int, copy: int = 0) -> Plan:
        """The plan of an epoch, on the host, the same in every process; copies have the order in common."""
        plan = self._draw(epoch, copy)
        if self.view_of(epoch) == epoch:
            return plan
        before = self._draw(self.view_of(epoch), copy)
        places = torch.argsort(before.order)[plan.order]  # in which these images came then
        return Plan(plan.order, *(each[places] for each in before[1:]))

    def _draw(self, epoch: int, copy: int) -> Plan:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", epoch))
        images, vary = len(self.split), self.augmentation
        order = torch.randperm(images, generator=generator)
        if copy:
            generator.manual_seed(derive_seed(self.seed, "batches", epoch, "copy", copy))
        offsets = torch.randint(0, 2 * vary.padding + 1, (images, 2), generator=generator)
        flips = torch.rand(images, generator=generator) < (0.5 if vary.flip else 0.0)
        holes = torch.randint(0, vary.size, (images, 2), generator=generator)
        if vary.erasing:
            holes = torch.cat([holes, erased_boxes(images, vary.size, vary.erasing, generator)], 1)
        return Plan(order, offsets, flips, holes)

    def finish(
        self,
        images: Tensor,
        labels: Tensor,
        holes: Tensor,
        number: int,
        indices: Tensor | None = None,
        views: Tensor | None = None,
    ) -> Batch:
        """The batch of these uint8 images [n, 3, H, W] on the device, cropped and mirrored already."""
        images = self.normalise(images)
        if self.augmentation.cutout:
            images = cut_out(images, holes[:, :2], self.augmentation.cutout)
        if self.augmentation.erasing:
            images = erase(images, holes[:, 2:])
        loss_scale = len(labels) * self.world / (self.edges[number + 1] - self.edges[number]) / self.fold
        return Batch(images, labels, loss_scale, indices, views)


class DeviceLoader(Loader):
    """Batches of a split whose pixels are on the device."""

    split: Split

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pixels, indices, padding = self.split.pixels, self.split.indices, self.augmentation.padding
        drawn = [self.plan(epoch, copy) for copy in range(self.copies)]
        plans = [plan.to(pixels.device) for plan in drawn]
        alone = self.copies == self.fold == 1
        views = self.augmentation.view(plans[0].offsets, plans[0].flips) if alone else None
        for number in range(start, len(self)):
            edges = self.edges[number], self.edges[number + 1]
            parts = [self.share(plan, number) for plan in plans]
            chosen = parts[0].order
            originals = select(pixels, chosen if indices is None else indices[chosen])
            copies = [augment(originals, part.offsets, part.flips, padding) for part in parts]
            if self.augmentation.policy != "none":
                rows = self.share(drawn[0], number).order.tolist()  # on the host: asking the device would wait for it
                copies = [self._by_policy(each, rows, epoch, copy) for copy, each in enumerate(copies)]
            images = copies[0] if len(copies) == 1 else torch.cat(copies)
            holes = parts[0].holes if len(parts) == 1 else torch.cat([part.holes for part in parts])
            seen = None if views is None else views[slice(*edges)][self.rank :: self.world]
            yield self.finish(images, self.split.labels[chosen], holes, number, chosen, seen)

    def _by_policy(self, images: Tensor, rows: list[int], epoch: int, copy: int) -> Tensor:
        again = ("copy", copy) if copy else ()
        seeds = [derive_seed(self.seed, self.view_of(epoch), "crop", row, *again) for row in rows]
        policy = self.augmentation.policy
        varied = [apply_policy(image, policy, seed) for image, seed in zip(images, seeds, strict=True)]
        return torch.stack(varied).contiguous(memory_format=torch.channels_last)

    def view(self, view: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices [n], images) of this process's share of the split, all as this one of `Augmentation.views`."""
        device, padding = self.split.labels.device, self.augmentation.padding
        place, flip = divmod(view, 2) if self.augmentation.flip else (view, 0)
        offset = torch.tensor(divmod(place, 2 * padding + 1), device=device)
        for part in evaluation_parts(len(self.split), batch_size, self.rank, self.world):
            indices = torch.arange(len(self.split), device=device)[part]
            chosen = indices if self.split.indices is None else self.split.indices[indices]
            flips = torch.full((len(indices),), bool(flip), device=device)
            varied = augment(select(self.split.pixels, chosen), offset.expand(len(indices), 2), flips, padding)
            yield indices, self.normalise(varied)


class LoaderWithUnlabeled:
    """A loader's batches with `ratio` images of another, which have no labels, behind each of its own.

    So a part of a batch has its share of both. An epoch is as long as the first loader's, and draws its unlabelled
    images anew from all of them.
    """

    def __init__(self, labeled: Loader, unlabeled: Loader, ratio: int):
        self.labeled, self.unlabeled, self.ratio = labeled, unlabeled.beside(labeled, ratio), ratio

    def __len__(self) -> int:
        return len(self.labeled)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As the loader's."""
        pairs = zip(self.labeled.epoch(epoch, start), self.unlabeled.epoch(epoch, start), strict=True)
        for batch, others in pairs:
            both = (each.images.permute(0, 2, 3, 1) for each in (batch, others))
            labels = _interleaved(batch.labels, others.labels)
            images = _interleaved(*both).permute(0, 3, 1, 2)
            yield Batch(images, labels, batch.loss_scale, unlabeled=self.ratio)


def _interleaved(first: Tensor, others: Tensor) -> Tensor:
    """[n, ...] and [n k, ...] -> [n (1 + k), ...]: behind each of the first k of the others."""
    return torch.cat([first[:, None], others.unflatten(0, (len(first), -1))], 1).flatten(0, 1)


def batch_edges(images: int, batch_size: int, world: int) -> list[int]:
    """Where an epoch's batches begin, and where the last ends."""
    # BatchNorm needs two images in every process: a rest smaller than that joins the batch before it.
    full, rest = divmod(images, batch_size)
    edges = [batch_size * i for i in range(full)] + ([batch_size * full] if rest >= 2 * world else [])
    return [*edges, images]


def evaluation_parts(count: int, batch_size: int, rank: int, world: int) -> Iterator[slice]:
    """This process's share of `count` images: over all processes each once, in parts of about equal size.

    They are the same parts whatever the number of processes, as long as there is one for each.
    """
    parts = max(-(-count // batch_size), world)
    for number in range(rank, parts, world):
        yield slice(number, None, parts)


def evaluation_batches(split: Split, normalise: Normalise, batch_size: int, rank: int, world: int) -> Iterator:
    """(images, labels) of a split in memory, each image once over all processes."""
    for part in evaluation_parts(len(split), batch_size, rank, world):
        rows = torch.arange(len(split), device=split.labels.device)[part]
        yield (
            normalise(select(split.pixels, rows if split.indices is None else split.indices[rows])),
            split.labels[part],
        )
