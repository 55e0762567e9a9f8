"""Several training loops on the same batches, a step each in turn."""

from collections.abc import Callable, Iterator, Mapping

from data.batch import Batch
from data.loader import Loader
from engine.distributed import Interrupted, RunError, StopSignals
from engine.loop import Loop


class SharedBatches:
    """A loader's batches for loops that take turns: the one that the first of them asks for is kept for the others.

    Args:
        loader: of the split that all train on.
        next_batch: called before every batch that the loader makes.
    """

    def __init__(self, loader: Loader, next_batch: Callable[[], None]):
        self.loader, self.next_batch = loader, next_batch
        self._place, self._batch, self._rest = (-1, -1), None, iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As the loader's."""
        for number in range(start, len(self)):
            yield self._get(epoch, number)

    def _get(self, epoch: int, number: int) -> Batch:
        if self._place != (epoch, number):
            self.next_batch()
            if self._place != (epoch, number - 1):
                self._rest = self.loader.epoch(epoch, number)
            self._place, self._batch = (epoch, number), next(self._rest)
        return self._batch


def run_together(loops: Mapping[str, Loop], next_batch: Callable[[], None]) -> dict[str, RunError]:
    """Train loops that have the seed, the batch size and the training split in common: each as if it were alone.

    The one that is furthest behind takes the next step, so that all see a batch while it is at hand, also where they go
    on from checkpoints of different epochs. Those that want another kind of batches than others, several copies or
    another normalisation, have theirs in common. In one process a loop that fails stops alone.

    Args:
        loops: by name.
        next_batch: called before the first of a kind sees another batch.

    Returns:
        What stopped those that failed.

    Raises:
        UserError, Interrupted: see Loop.run; all have been saved.
        RunError: one has failed where there are several processes, which must take the same steps.
    """
    failed, interruption = {}, None
    for loop in loops.values():
        loop.start()
    batches = {loop.batch_kind: SharedBatches(loop.train, next_batch) for loop in loops.values()}
    kinds = list(batches)
    turns = sorted(loops, key=lambda name: kinds.index(loops[name].batch_kind))  # a kind's use a batch up before others
    with StopSignals() as signals:
        going = {name: loops[name].batches(signals, batches[loops[name].batch_kind]) for name in turns}
        while going:
            name = min(going, key=lambda name: loops[name].position)
            try:
                next(going[name])
                continue
            except RunError as error:
                if loops[name].world > 1:
                    raise RunError(f"{name}: {error}") from None
                failed[name] = error
                loops[name].console.print(f"{name} stopped: {error}")
            except Interrupted as caught:
                interruption = caught
            except StopIteration:
                pass
            del going[name]
    if interruption:
        raise Interrupted(
            interruption.signum,
            "interrupted; all are saved. Continue with the same command and --resume_from_checkpoint latest",
        )
    return failed
