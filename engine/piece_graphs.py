"""CUDA graphs by piece: for steps that draw on the host what they run, as GTN's do.

A graph of the whole step (engine/cuda_graph.py) would repeat one path. Here every module that a path can lead through
has graphs of its own, of its forward and its backward pass, captured when it is first drawn: a step replays those of
its path. Losses, sums, whatever has no BatchNorm and the optimiser run as ever.

A graph reads and writes where it did when it was captured, which is what can go wrong:

- The modules of a place, of which a step differentiates one at a time, share memory for each time: their activations
  are there from the forward to the backward pass of a step, and no longer. Places share none. What breaks this raises
  RuntimeError.
- Graphs without a backward pass share memory with all others of their kind: what they return is copied at once.
- The gradients of weights are the graph's own memory until the optimiser has taken them: one backward pass a step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from engine.config import RunConfig
from engine.cuda_graph import CudaGraphCapture, StepGraph, Terms, check_capturable
from engine.objective import Objective, Phase

Tensors = Sequence[Tensor | None]
WARM_UPS = 3  # passes before one is captured, in which libraries choose their algorithms


def recorded_steps(
    gradients: Callable[..., Terms],
    apply: Callable[..., None],
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
):
    """What runs the loop's steady steps with --cuda_graph: its two parts as one graph, or as graphs of their pieces.

    Raises:
        UserError: steps that cannot be captured.
    """
    check_recordable(objective, config, accelerator)
    if objective.capturable:
        whole = config.opt == "sgd"  # the one that is known to decide nothing on the host
        return StepGraph(gradients, apply, whole, objective.trained_parameters(), CudaGraphCapture())
    return PieceGraphs(gradients, apply, objective.pieces(), CudaPieces())


def check_recordable(objective: Objective, config: RunConfig, accelerator: Accelerator) -> None:
    """Raises UserError for steps that cannot be captured."""
    check_capturable(accelerator, objective.capturable or bool(objective.pieces()))
    if objective.capturable and objective.follows_steps and config.opt != "sgd":
        raise UserError(f"--cuda_graph: --method {config.method} has work of its own after a step; only with --opt sgd")
    for option, none in (("compile", False), ("gradient_accumulation_steps", 1), ("freeze", [])):
        if not objective.capturable and getattr(config, option) != none:
            raise UserError(f"--cuda_graph: cannot be combined with --{option} by a method that draws its paths")


def advice(objective: Objective, config: RunConfig, accelerator: Accelerator) -> str | None:
    """What to say where --cuda_graph is possible and not asked for."""
    if config.cuda_graph or config.opt != "sgd" or config.mixes:  # of the others nobody has measured what it brings
        return None
    with suppress(UserError):
        check_recordable(objective, config, accelerator)
        return "a GPU waits for the host to launch small networks' kernels: --cuda_graph is several times as fast"
    return None


class CudaPieces:
    """How a GPU captures pieces. A stand-in for it has the same methods."""

    def pool(self) -> Any:
        """Memory for graphs no two of which hold anything in it at the same time."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run what is going to be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, function: Callable[[], Tensors], pool: Any) -> Callable[[], Tensors]:
        """What runs `function` again and returns its results, always the same tensors; it need not run it now."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function()

        def replay() -> Tensors:
            graph.replay()
            return results

        return replay


class PieceGraphs:
    """Steps with each of the `places`' modules replayed.

    Args:
        gradients, apply: the parts of a step, of the weights or of a phase.
        places: the modules by place, Tensor to Tensor each: see above.
        device: captures; CudaPieces.
    """

    def __init__(
        self,
        gradients: Callable[..., Terms],
        apply: Callable[..., None],
        places: Iterable[Iterable[nn.Module]],
        device: CudaPieces,
    ):
        self.gradients, self.apply, self.pieces, inference = gradients, apply, [], device.pool()
        for modules in places:
            place = Place(device, inference)
            self.pieces += [Piece(module, place) for module in modules if _norm_of(module) is not None]

    def __call__(self, batch: Batch, phase: Phase | None, epoch: int) -> Terms:
        # In the modules for the time of a step alone: evaluation, copies and files see them as they are.
        for piece in self.pieces:
            vars(piece.module)["forward"] = piece
            piece.place.turn = 0
        try:
            terms = self.gradients(batch, phase)
        finally:
            for piece in self.pieces:
                del vars(piece.module)["forward"]
        self.apply(phase)
        return terms


class Place:
    """What the modules of a place share: input, gradient of the output, and the memory between the passes, each of them
    for every time that a step differentiates one of the modules."""

    def __init__(self, device: CudaPieces, inference: Any):
        self.device, self.inference = device, inference
        self.turn = 0  # how many of them the step under way has differentiated
        self.holders: dict[int, object] = {}  # the calls whose activations the memory holds, by turn
        self._pools: dict[int, Any] = {}
        self._buffers: dict[tuple, Tensor] = {}

    def pool(self, turn: int) -> Any:
        if turn not in self._pools:
            self._pools[turn] = self.device.pool()
        return self._pools[turn]

    def buffer(self, name: str, turn: int, like: Tensor) -> Tensor:
        key = (name, turn, like.shape, like.dtype, like.stride())
        if key not in self._buffers:
            self._buffers[key] = torch.zeros_like(like, requires_grad=False)
        return self._buffers[key]


class Piece:
    """The forward pass of `module` by graphs: one for every use of it, with its backward pass where there is one."""

    def __init__(self, module: nn.Module, place: Place):
        self.module, self.place, self.run = module, place, module.forward
        self.norm, self.weights = _norm_of(module), list(module.parameters())
        self.recorded: dict[tuple, Recorded] = {}

    def __call__(self, x: Tensor) -> Tensor:
        norm, grad = self.norm, torch.is_grad_enabled()
        tracks = norm.track_running_stats
        # A step that leaves the statistics alone is one of the gates and has no use for the weights' gradients.
        learns = grad and tracks and self.weights[0].requires_grad
        for_x, weights = grad and x.requires_grad, self.weights if learns else []
        turn = self.place.turn
        self.place.turn += bool(for_x or weights)
        key = (for_x, learns, norm.training, tracks, x.shape, x.dtype, x.stride(), turn if for_x or weights else 0)
        if key not in self.recorded:
            self.recorded[key] = Recorded(self, x, for_x, weights, key[-1])
        recorded = self.recorded[key]
        if not recorded.inputs:
            return recorded.forward(x).clone()
        return _Replay.apply(recorded, x, *recorded.weights)


class Recorded:
    """A module's passes on a place's memory of a turn, for some of the gradients of its input and `weights`."""

    def __init__(self, piece: Piece, x: Tensor, for_x: bool, weights: list[nn.Parameter], turn: int):
        self.place, self.weights, self.for_x, self.turn = piece.place, weights, for_x, turn
        self.written: set[int] = set()  # where the gradients of the weights were left
        self.x = piece.place.buffer("input", turn, x)
        leaf = self.x.data.requires_grad_(for_x)  # its memory, but not its count of changes
        # Leaves of their own for the weights too: those of the step under way belong to its stream, not to a capture's.
        learning = [weight.detach().requires_grad_() for weight in weights]
        self.inputs = [leaf] * for_x + learning
        kind = x.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        raw: list[Tensor] = []  # the output, with its graph

        def forward() -> Tensors:
            # A cast of a weight that autocast keeps may be older than the graph, or younger.
            casts = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
            with casts, torch.set_grad_enabled(bool(self.inputs)), standing_in(piece.module, weights, learning):
                raw[:] = [piece.run(leaf)]
            return [raw[0].detach()]

        def backward() -> Tensors:
            return torch.autograd.grad(raw[0], self.inputs, self.gradient, allow_unused=True)

        def both() -> None:
            forward()
            self.gradient = self.place.buffer("gradient", turn, raw[0])
            if self.inputs:
                backward()
            raw.clear()

        statistics = [(each, each.clone()) for each in piece.module.buffers()]
        self.place.device.warm_up(both)
        for each, before in statistics:
            each.data.copy_(before)  # uncounted: another turn's backward pass may still be to come
        pool = self.place.pool(turn) if self.inputs else self.place.inference
        self._forward = self.place.device.capture(forward, pool)
        self._backward = self.place.device.capture(backward, pool) if self.inputs else None

    def forward(self, x: Tensor) -> Tensor:
        """The output, in memory that the next call writes over."""
        self.x.copy_(x)
        return self._forward()[0]

    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the input, None where it needs none, and of the weights."""
        self.gradient.copy_(gradient)
        found = [None if each is None else each.detach() for each in self._backward()]
        found = found if self.for_x else [None, *found]
        self.written = {each.data_ptr() for each in found[1:] if each is not None}
        return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorded: Recorded, x: Tensor, *weights: Tensor):
        ctx.recorded, ctx.call = recorded, object()
        recorded.place.holders[recorded.turn] = ctx.call
        return recorded.forward(x).detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        recorded = ctx.recorded
        if recorded.place.holders[recorded.turn] is not ctx.call:
            raise RuntimeError("another step began before this one's backward pass: its activations are gone")
        # A gradient may be there from another turn of this pass: what is returned is added to it.
        if any(weight.grad is not None and weight.grad.data_ptr() in recorded.written for weight in recorded.weights):
            raise RuntimeError("an earlier backward pass left gradients, in the memory that this one writes to")
        return None, *recorded.backward(gradient)


@contextmanager
def standing_in(module: nn.Module, weights: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """`others` in the place of a module's `weights`; torch.func.functional_call would call the piece in turn."""
    by_weight = dict(zip(map(id, weights), others, strict=True))
    places = [(part._parameters, name) for part in module.modules() for name in part._parameters]
    replaced = [(at, name, at[name]) for at, name in places if id(at[name]) in by_weight]
    for at, name, weight in replaced:
        at[name] = by_weight[id(weight)]
    try:
        yield
    finally:
        for at, name, weight in replaced:
            at[name] = weight


def _norm_of(module: nn.Module) -> nn.Module | None:
    return next((part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)), None)
