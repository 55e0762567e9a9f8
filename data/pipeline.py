"""From a data set to batches: one interface, three kinds of places where images can be."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from common import UserError, derive_seed
from data.augment import Augmentation, Normalise
from data.loader import DeviceLoader, Loader, LoaderWithUnlabeled, evaluation_batches, evaluation_parts
from data.splits import AnySplit, ImageSet, Split, StoredSplit, Unlabeled
from data.stream import StreamLoader, stream_evaluation_batches
from data.workers import WorkerLoader, worker_evaluation_batches


def augmentation_of(data: ImageSet, config) -> Augmentation:
    """How a run varies its training images; `config` holds its options (engine.config.RunConfig)."""
    padding = data.image_size // 8 if config.crop_padding is None else config.crop_padding
    flip = data.flip if config.flip is None else config.flip
    cutout = min(config.cutout, data.image_size)
    return Augmentation(data.image_size, data.augment, padding, flip, cutout, config.aa, config.reprob)


class Pipeline:
    """Batches of a data set's parts on the device.

    Args:
        data: the set; what of it is in memory moves to the device.
        config: the run's options (engine.config.RunConfig).
        device: where networks are.
        rank, world: this process and how many there are.
    """

    def __init__(self, data: ImageSet, config, device: torch.device, rank: int = 0, world: int = 1):
        self.augmentation = augmentation_of(data, config)
        self.normalise = Normalise(data.mean, data.std, device)
        self.device, self.seed, self.where = device, config.seed, {"rank": rank, "world": world}
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) // local
        self.workers = max(1, cores - 1) if config.data_workers is None else config.data_workers
        self._moved: dict[int, Tensor] = {}

    def training(
        self,
        split: AnySplit,
        batch_size: int,
        copies: int = 1,
        cycle: int | None = None,
        unlabeled: Unlabeled | None = None,
    ) -> Loader | LoaderWithUnlabeled:
        """Batches of `batch_size` images of a split, and beside them unlabelled ones, if there are any."""
        loader = self._loader(split, batch_size, copies, cycle, self.seed)
        if unlabeled is None:
            return loader
        others = unlabeled.repeated(len(split) * unlabeled.ratio)
        seed = derive_seed(self.seed, "unlabeled")
        return LoaderWithUnlabeled(loader, self._loader(others, batch_size, 1, None, seed), unlabeled.ratio)

    def _loader(self, split: AnySplit, batch_size: int, copies: int, cycle: int | None, seed: int) -> Loader:
        if copies > 1 and not isinstance(split, Split):
            raise UserError("--method: networks that see copies of their own need the data set in memory")
        arguments = (self._on_device(split), batch_size, self.normalise, self.augmentation, seed)
        if isinstance(split, Split):
            return DeviceLoader(*arguments, **self.where, copies=copies, cycle=cycle)
        kind = WorkerLoader if isinstance(split, StoredSplit) else StreamLoader
        return kind(*arguments, **self.where, cycle=cycle, workers=self.workers, device=self.device)

    def evaluation(self, split: AnySplit, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of every image once over all processes, in about equal batches of up to `batch_size`."""
        split = self._on_device(split)
        if isinstance(split, Split):
            return evaluation_batches(split, self.normalise, batch_size, **self.where)
        kind = worker_evaluation_batches if isinstance(split, StoredSplit) else stream_evaluation_batches
        place = {"workers": self.workers, "device": self.device, **self.where}
        return kind(split, self.normalise, batch_size, self.augmentation, **place)

    def evaluated(self, split: AnySplit, batch_size: int) -> Iterator[Tensor]:
        """For each batch of `evaluation`, which images of the split it holds: int64 [n]. Not for streams."""
        rows = torch.arange(len(split))
        return (rows[part] for part in evaluation_parts(len(split), batch_size, **self.where))

    def _on_device(self, split: AnySplit) -> AnySplit:
        """Parts of a set share its pixels: they are moved once."""
        if not isinstance(split, Split):
            return split
        pixels = self._moved.setdefault(id(split.pixels), split.pixels.to(self.device))
        indices = None if split.indices is None else split.indices.to(self.device)
        return replace(split, pixels=pixels, labels=split.labels.to(self.device), indices=indices)
