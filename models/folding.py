"""BatchNorms folded into the convolutions of a network that is not trained any more: fewer passes over its maps."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@torch.no_grad()
def fold_batch_norms(network: nn.Module, run: Callable[[], object]) -> int:
    """Scale and shift the convolutions of `network`, in place, so that they do what the BatchNorms behind them do.

    Folded is a BatchNorm in eval mode whose input is the output of a convolution that nothing else reads: what else
    there is of the network computes what it did, but for rounding.

    Args:
        network: in eval mode; its BatchNorms that are folded become identities.
        run: executes it in every way in which it is going to be, and returns all of its outputs.

    Returns:
        How many were folded.
    """
    watch = _Uses()
    hooks = [part.register_forward_hook(watch.made) for part in network.modules() if type(part) is nn.Conv2d]
    hooks += [part.register_forward_hook(watch.normed) for part in network.modules() if type(part) is nn.BatchNorm2d]
    try:
        with watch:
            returned = _tensors(run())
    finally:
        for hook in hooks:
            hook.remove()
    kept = {id(each) for each in returned}
    behind: dict[nn.Conv2d, set] = {}  # what is behind a convolution, each time it ran; None: what cannot be folded
    for conv, output in watch.outputs:
        norm, alone = watch.norms.get(id(output)), watch.uses[id(output)] == 1 and id(output) not in kept
        behind.setdefault(conv, set()).add(norm if alone and norm is not None and not norm.training else None)
    counted = Counter(norm for norms in behind.values() for norm in norms)
    pairs = [(conv, *norms) for conv, norms in behind.items() if len(norms) == 1]
    pairs = [(conv, norm) for conv, norm in pairs if norm is not None and counted[norm] == 1]
    for conv, norm in pairs:
        _fold(conv, norm)
    return len(pairs)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(shift, requires_grad=False)
    norm.forward = _identity  # and not another module: it may be held in several places


def _identity(x: Tensor) -> Tensor:
    return x


class _Uses(TorchFunctionMode):
    """Counts the functions that read each convolution's output."""

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[nn.Conv2d, Tensor]] = []  # tensors are kept, so that ids stay theirs
        self.uses: dict[int, int] = {}  # by an output's id
        self.norms: dict[int, nn.BatchNorm2d] = {}  # that read it

    def made(self, conv: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        self.outputs.append((conv, output))
        self.uses[id(output)] = 0

    def normed(self, norm: nn.BatchNorm2d, inputs: tuple, output: Tensor) -> None:
        if id(inputs[0]) in self.uses:
            self.norms[id(inputs[0])] = norm

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for read in {id(each) for each in _tensors((args, kwargs or {}))} & self.uses.keys():
            self.uses[read] += function not in _LOOKS
        return function(*args, **(kwargs or {}))


_LOOKS = {getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "is_cuda", "requires_grad")}
_LOOKS |= {Tensor.dim, Tensor.size, Tensor.is_floating_point}  # what tells of a tensor and reads none of its values


def _tensors(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [tensor for each in found for tensor in _tensors(each)]
    return (
        [tensor for tensor in vars(found).values() if isinstance(tensor, Tensor)] if hasattr(found, "__dict__") else []
    )
