"""A training step as one CUDA graph: recorded once an epoch, then started by a single launch.

A step of a small network is hundreds of kernels of a few microseconds each, and the host needs longer to launch one
than the device to run it. Recorded are the kernels and where their data lies, not the Python that launched them: only
a step that decides nothing on the host can be replayed.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from common import UserError
from engine.loader import Batch

Terms = list[tuple[dict[str, Tensor], int]]  # loss terms of a batch's parts, and the images of each


def check_recordable(accelerator: Accelerator, recordable: bool) -> None:
    """Raises UserError where a step, `recordable` by itself or not, cannot be a CUDA graph."""
    reasons = {
        "needs an NVIDIA GPU": accelerator.device.type != "cuda",
        "is for one process": accelerator.num_processes > 1,
        "cannot be combined with --mixed_precision fp16, whose scaler looks at the gradients": bool(accelerator.scaler),
        "the paths of --method gtn change from step to step": not recordable,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--cuda_graph: {reason}")


class StepGraph:
    """`update` of batches of one shape, replayed where it can be.

    The learning rate, and whatever else is fixed for an epoch, are recorded as they are: each epoch takes its first
    batch as it comes (momentum and algorithms are there after it), and records with its second.

    Args:
        update: a whole step, forward pass to optimiser.
        record: runs a function of the device and returns what runs it again, on the same memory. Running it the first
            time need not compute anything.
    """

    def __init__(self, update: Callable[[Batch], Terms], record: Callable[[Callable[[], None]], Callable[[], None]]):
        self.update, self.record = update, record
        self.of: tuple | None = None  # what the graph is, or will be, recorded for
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, epoch: int) -> Terms:
        key = (epoch, batch.images.shape, batch.share)
        if key != self.of:
            self.of, self.replay = key, None
            return self.update(batch)
        if self.replay is None:
            self.held = Batch(*(each.clone() if isinstance(each, Tensor) else each for each in batch))
            self.replay = self.record(self._run)
        for held, new in zip(self.held, batch, strict=True):
            if isinstance(held, Tensor):
                held.copy_(new, non_blocking=True)
        self.replay()
        # The next replay writes over the recorded terms.
        return [({name: term.clone() for name, term in terms.items()}, images) for terms, images in self.said]

    def _run(self) -> None:
        self.said = self.update(self.held)


class CudaRecorder:
    """Records CUDA graphs one after the other in the same memory."""

    def __init__(self):
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        pool = None if self.graph is None else self.graph.pool()
        # Loaders may have threads of their own that copy to the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        self.graph = graph
        return graph.replay
