"""Batches of images that stay encoded on disk: decoded, cropped and mirrored by worker processes.

The plan is the loader's, so crops, mirrors and cutouts are those that the pipeline on the device would make,
whatever the number of workers. What a plan cannot hold, the size and shape of a resized crop, is drawn with
a seed of the image and the epoch.
"""

import ctypes
import signal
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import UserError, derive_seed
from data.augment import Augmentation, Normalise, Plan, apply_policy
from data.batch import Batch
from data.decode import read_rgb
from data.loader import Loader, evaluation_parts
from data.splits import StoredSplit

CENTRE = 0.875  # of a photograph's shorter side is looked at in evaluation: 224 of 256


class WorkerLoader(Loader):
    """Batches of a split on disk. `workers` processes decode; 0: this process does."""

    split: StoredSplit

    def __init__(self, *arguments, workers: int, device: torch.device, **options):
        super().__init__(*arguments, **options)
        self.workers, self.device = workers, device

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        plan = self.plan(epoch)
        numbers = range(start, len(self))
        jobs = [self.share(plan, number) for number in numbers]
        images = _Images(self.split, self.augmentation, (self.seed, self.view_of(epoch)))
        batches = zip(numbers, jobs, _read(images, jobs, self.workers, self.device), strict=True)
        for number, job, (pixels, labels, holes) in batches:
            yield self.finish(pixels, labels, holes, number, job.order.to(self.device))


def worker_evaluation_batches(
    split: StoredSplit,
    normalise: Normalise,
    batch_size: int,
    augmentation: Augmentation,
    rank: int,
    world: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels), each image once over all processes; photographs are resized and cropped at the centre."""
    rows = torch.arange(len(split))
    nothing = torch.zeros(len(split), 2, dtype=torch.int64)
    plan = Plan(rows, nothing, torch.zeros(len(split), dtype=torch.bool), nothing)
    parts = evaluation_parts(len(split), batch_size, rank, world)
    jobs = (Plan(*(each[part] for each in plan)) for part in parts)
    for pixels, labels, _ in _read(_Images(split, augmentation, None), jobs, workers, device):
        yield normalise(pixels), labels


class _Images(Dataset):
    """Looked up with a Plan, the part of a batch: uint8 images, labels and cutouts; or a UserError's text."""

    def __init__(self, split: StoredSplit, augmentation: Augmentation, drawn: tuple | None):
        self.split, self.augmentation, self.drawn = split, augmentation, drawn

    def __getitem__(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor] | str:
        try:
            images = [self._image(*each) for each in zip(*(part.tolist() for part in plan[:3]), strict=True)]
        except UserError as error:  # raised in a worker, it would come back with the worker's traceback
            return str(error)
        size = self.augmentation.size
        pixels = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return pixels, self.split.labels[plan.order], plan.holes

    def _image(self, index: int, offset: list[int], flip: bool) -> Tensor:
        row = self.split.source.row(int(self.split.indices[index]))
        seed = None if self.drawn is None else derive_seed(*self.drawn, "crop", index)
        return transform(row, self.augmentation, seed, offset, flip)


def transform(row, augmentation: Augmentation, seed: int | None, offset: list[int], flip: bool) -> Tensor:
    """One image as the network sees it, uint8 [3, size, size]; without a seed as it is evaluated.

    Raises:
        UserError: an image that cannot be read, named.
    """
    from torchvision.transforms import v2  # here, because torchvision is slow to import
    from torchvision.transforms.v2 import functional as vision

    size = augmentation.size
    if augmentation.kind == "crop":
        image = vision.pil_to_tensor(read_rgb(row.open, row.where, size))
        if augmentation.padding and seed is not None:
            image = vision.pad(image, augmentation.padding)
            image = vision.crop(image, *offset, size, size)
    else:
        image = read_rgb(row.open, row.where)
        if seed is None:
            image = vision.center_crop(vision.resize(image, round(size / CENTRE)), size)
        else:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                image = v2.RandomResizedCrop(size)(image)
        image = vision.pil_to_tensor(image)
    image = vision.horizontal_flip(image) if flip else image
    return image if seed is None or augmentation.policy == "none" else apply_policy(image, augmentation.policy, seed)


def _read(
    images: _Images, jobs: Iterable[Plan], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The images of each job in turn, on the device."""
    pinned = device.type == "cuda"
    batches = DataLoader(
        images,
        sampler=jobs,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_begin if workers else None,
    )
    for batch in batches:
        if isinstance(batch, str):
            raise UserError(batch)
        yield tuple(each.to(device, non_blocking=pinned) for each in batch)


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that happens (Linux)."""
    set_option = getattr(ctypes.CDLL(None), "prctl", None)
    if set_option is not None:
        set_option(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _begin(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the run's own process decides what becomes of its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
