"""A training step as one CUDA graph: captured once an epoch, then replayed by a single launch.

A step of a small network is hundreds of kernels of a few microseconds each, and the host needs longer to launch one
than the device to run it. Captured are the kernels and where their data lies, not the Python that launched them: only
a step that decides nothing on the host can be replayed.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from engine.objective import Phase

Terms = list[tuple[dict[str, Tensor], int]]  # loss terms of a batch's parts, and the images of each
Result = TypeVar("Result")


def check_capturable(accelerator: Accelerator, capturable: bool) -> None:
    """Raises UserError where a step, `capturable` by itself or not, cannot be a CUDA graph."""
    reasons = {
        "needs an NVIDIA GPU": accelerator.device.type != "cuda",
        "is for one process": accelerator.num_processes > 1,
        "cannot be combined with --mixed_precision fp16, whose scaler looks at the gradients": bool(accelerator.scaler),
        "this method's steps differ from one to the next": not capturable,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--cuda_graph: {reason}")


class StepGraph:
    """Steps of batches of one shape, replayed where they can be.

    The learning rate, and whatever else is fixed for an epoch, are captured as they are: each epoch takes its first
    batch as it comes (momentum and algorithms are there after it), and captures its second.

    Args:
        gradients: forward and backward passes.
        apply: the optimiser's part, which leaves no gradients.
        whole: capture that too; else it follows every replay, as an optimiser must that decides something on the host.
            What the objective does after a step is captured, or follows, with it.
        parameters: that have gradients.
        capture: runs a function of the device and returns what runs it again, on the same memory. Running it the first
            time need not compute anything.
    """

    def __init__(
        self,
        gradients: Callable[..., Terms],
        apply: Callable[..., None],
        whole: bool,
        parameters: Sequence[nn.Parameter],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        self.gradients, self.apply, self.whole = gradients, apply, whole
        self.parameters, self.capture = parameters, capture
        self.key: tuple | None = None  # what the graph is, or will be, captured for
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, phase: Phase | None, epoch: int) -> Terms:
        key = (epoch, batch.images.shape, batch.loss_scale)
        if phase is not None or key != self.key:
            if phase is None:
                self.key, self.replay = key, None
                self.static_terms = self.static_gradients = []  # whose memory the next graph may have
            terms = self.gradients(batch, phase)
            self.apply(phase)
            return terms
        if self.replay is None:
            self.static_batch = Batch(*(each.clone() if isinstance(each, Tensor) else each for each in batch))
            self.replay = self.capture(self._run)
            self.static_gradients = [(each, each.grad) for each in self.parameters]
        for static, new in zip(self.static_batch, batch, strict=True):
            if isinstance(static, Tensor):
                static.copy_(new, non_blocking=True)
        self.replay()
        if not self.whole:
            for parameter, gradient in self.static_gradients:
                parameter.grad = gradient
            self.apply()
        # The next replay writes over the captured terms.
        return [({name: term.clone() for name, term in terms.items()}, images) for terms, images in self.static_terms]

    def _run(self) -> None:
        self.static_terms = self.gradients(self.static_batch)
        if self.whole:
            self.apply()


class CudaGraphCapture:
    """Captures CUDA graphs one after the other in the same memory."""

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


def beside(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Start `function`, which nothing depends on until its result is asked for of what is returned.

    In a graph its kernels are a branch of their own, so that a GPU that they do not fill runs others at the same time.
    Elsewhere it is called at once.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        result = function()
        return lambda: result
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = function()

    def joined() -> Result:
        torch.cuda.current_stream().wait_stream(side)
        return result

    return joined


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, as what libraries keep for each stream is then made once."""
    return torch.cuda.Stream(device)
