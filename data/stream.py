"""Batches of images that are read while they are fetched: one pass an epoch, each process its own shards.

A process reads its shards only, shuffled: shards as a whole, and rows within a window of SHUFFLE_WINDOW. Shards
differ in size, so towards the end of an epoch some processes run dry before others; what is left is then
shared anew among all of them, so that every image is trained on exactly once and every process takes
part in every step.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import UserError, derive_seed
from data.augment import Augmentation, Normalise
from data.batch import Batch
from data.decode import from_cell
from data.loader import Loader
from data.sources import Row, Stream
from data.splits import StreamSplit
from data.workers import transform

SHUFFLE_WINDOW = 4096  # encoded images in memory, of which a random one comes next
AHEAD = 4  # batches that are being decoded while one is trained on


class Cell(NamedTuple):
    """An encoded image on its way: `key` tells it from all others of the epoch."""

    row: Row
    key: str


class StreamLoader(Loader):
    """Batches of a stream. `workers` threads decode: the order does not depend on how many."""

    split: StreamSplit

    def __init__(self, *arguments, workers: int, device: torch.device, **options):
        super().__init__(*arguments, **options)
        self.workers, self.device = workers, device
        # Processes tell each other how much they have before every step: on the host, no GPU waits for it.
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        stream, seed = self.split.stream, derive_seed(self.seed, "stream", epoch)
        # One shard at a time: with more the library reads ahead in threads and waits 5 s for them at the end.
        shuffled = stream.rows.shuffle(seed=seed % 2**32, buffer_size=SHUFFLE_WINDOW, max_buffer_input_shards=1)
        cells = cells_of(stream, shuffled, self.rank, self.world)
        shares = islice(self._deal(cells), start, None)  # reading up to `start` repeats what was dealt before
        decoded = decode(shares, self.augmentation, (self.seed, epoch), self.workers)
        for number, (pixels, labels, holes) in enumerate(decoded, start):
            yield self.finish(pixels.to(self.device), labels.to(self.device), holes.to(self.device), number)

    def _deal(self, cells: Iterator[Cell]) -> Iterator[list[Cell]]:
        """This process's cells of every batch of the epoch."""
        at_hand: list[Cell] = []
        for number in range(len(self)):
            wanted = self.edges[number + 1] - self.edges[number]
            quota = len(range(self.rank, wanted, self.world))
            at_hand += islice(cells, max(0, quota - len(at_hand)))
            if all(self._everyones(len(at_hand) >= quota)):
                mine, at_hand = at_hand[:quota], at_hand[quota:]
            else:
                at_hand += islice(cells, max(0, wanted - len(at_hand)))
                offered = self._everyones(at_hand)
                together = [cell for each in offered for cell in each]
                if len(together) < wanted:
                    raise self._not_as_announced("fewer")
                mine = together[:wanted][self.rank :: self.world]
                before = sum(map(len, offered[: self.rank]))
                at_hand = at_hand[max(0, wanted - before) :]
            yield mine
        if any(self._everyones(bool(at_hand) or next(cells, None) is not None)):
            raise self._not_as_announced("more")

    def _not_as_announced(self, what: str) -> UserError:
        name, count = self.split.stream.name, len(self.split)
        return UserError(f"--streaming: {name} has {what} than the {count} images it announces")

    def _everyones(self, thing) -> list:
        """What each process has, in their order."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing, group=self.group)
        return things


def cells_of(stream: Stream, rows, rank: int, world: int) -> Iterator[Cell]:
    """This process's rows of a Hugging Face stream: whole shards where there are enough of them."""
    from datasets.distributed import split_dataset_by_node

    if rows.num_shards >= world:
        rows = rows.shard(num_shards=world, index=rank)
    else:  # every process reads everything, and skips what is not its own
        rows = split_dataset_by_node(rows, rank, world)
    for number, cells in enumerate(rows):
        label, where = cells[stream.label], f"{stream.name} image {number} of process {rank}"
        if type(label) is not int or not 0 <= label < stream.num_classes:
            raise UserError(f"--dataset: {where} has the label {label!r} of {stream.num_classes} classes")
        yield Cell(Row(where, _Opener(cells[stream.image]), label), f"{rank}/{number}")


class _Opener:
    """Opens a cell; unlike a lambda it can be sent to another process."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self):
        return from_cell(self.cell)


def decode(
    shares: Iterable[list[Cell]], augmentation: Augmentation, drawn: tuple | None, workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images uint8 [n, 3, size, size], labels and cutouts of each share; `drawn` is (seed, epoch), None: as
    images are evaluated."""

    def image(cell: Cell) -> tuple[Tensor, int, list[int]]:
        if drawn is None:
            return transform(cell.row, augmentation, None, [0, 0], False), cell.row.label, [0, 0]
        seed = derive_seed(*drawn, "crop", cell.key)
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randint(0, 2 * augmentation.padding + 1, (2,), generator=generator).tolist()
        flip = augmentation.flip and bool(torch.rand(1, generator=generator) < 0.5)
        hole = torch.randint(0, augmentation.size, (2,), generator=generator).tolist()
        return transform(cell.row, augmentation, seed, offset, flip), cell.row.label, hole

    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending: deque = deque()
        for share in shares:
            pending.append([pool.submit(image, cell) for cell in share])
            if len(pending) > AHEAD:
                yield _stack(pending.popleft(), augmentation.size)
        while pending:
            yield _stack(pending.popleft(), augmentation.size)


def _stack(futures: list, size: int) -> tuple[Tensor, Tensor, Tensor]:
    done = [future.result() for future in futures]
    images = torch.stack([image for image, _, _ in done]) if done else torch.empty(0, 3, size, size, dtype=torch.uint8)
    holes = torch.tensor([hole for _, _, hole in done]).view(-1, 2)
    return images, torch.tensor([label for _, label, _ in done], dtype=torch.int64), holes


def stream_evaluation_batches(
    split: StreamSplit,
    normalise: Normalise,
    batch_size: int,
    augmentation: Augmentation,
    rank: int,
    world: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels), each image once over all processes; at least one batch, maybe empty, in each."""
    cells = cells_of(split.stream, split.stream.rows, rank, world)
    shares = iter(lambda: list(islice(cells, batch_size)), [])
    met = False
    for pixels, labels, _ in decode(shares, augmentation, None, workers):
        met = True
        yield normalise(pixels.to(device)), labels.to(device)
    if not met:
        pixels, labels, _ = _stack([], augmentation.size)
        yield normalise(pixels.to(device)), labels.to(device)
