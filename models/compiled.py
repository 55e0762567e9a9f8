"""torch.compile region by region: residual blocks and the like.

Compiled as a whole, a supernet would be compiled anew for every path. Its regions are not: whatever is drawn,
the same blocks run, and those of the same kind and shape share what was compiled for one of them.
"""

from collections.abc import Callable, Iterator
from types import CodeType

import torch
from torch import nn

from common import UserError
from models.activation_checkpointing import ActivationCheckpointing
from models.foreign import Foreign
from models.network import BeforeReLU, Network
from models.supernet import Supernet

# A kind of block is compiled for each of its uses: training, frozen, without gradients, in a gate step, on other maps.
VARIANTS = 64


def compile_regions(module: nn.Module, backend: str | Callable = "inductor") -> None:
    """Have the regions of `module` compiled when they first run, for the shapes they then meet.

    Names of parameters stay as they are.

    Raises:
        UserError: a network of another library, or no C++ compiler, which Inductor needs, on a GPU too.
    """
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler  # here, because Inductor is slow to import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError("--compile: needs a C++ compiler (g++ or clang++, or one that CXX names)") from None
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 8 * VARIANTS
    for region in regions(module):
        region.forward = torch.compile(_own(region.forward, repr(region)), backend=backend, dynamic=False)


_codes: dict[str, CodeType] = {}


def _own(forward: Callable, kind: str) -> Callable:
    """`forward` as a function defined here, whose code belongs to its kind.

    Defined here, because Dynamo starts no graph at a function of torch.nn, as a Sequential's forward is. Of its kind,
    because what was compiled for a code is searched through at every call, and shared by all functions that have it.
    """

    def run(*inputs):
        return forward(*inputs)

    run.__code__ = _codes.setdefault(kind, run.__code__.replace(co_name=f"region{len(_codes)}"))
    return run


def regions(module: nn.Module) -> Iterator[nn.Module]:
    """The smallest parts of `module` that are more than one layer: those with layers of their own."""
    if isinstance(module, Foreign):
        raise UserError(f"--compile: {module.name}: only the zoo's own networks are known by their blocks")
    if isinstance(module, Network):  # what it runs is not registered, and cut in two ways
        found = (part for piece in (*module.stages, *module.preact) for part in regions(piece))
        yield from {id(part): part for part in found}.values()
    elif isinstance(module, BeforeReLU) or _is_region(module):
        yield module
    else:
        for child in module.children():
            yield from regions(child)


def _is_region(module: nn.Module) -> bool:
    if isinstance(module, (Supernet, nn.ModuleList, nn.ModuleDict)):
        return False
    # Checkpoints cannot be traced; a DenseNet's lists of layers hold them unregistered.
    if any(isinstance(part, (ActivationCheckpointing, nn.ModuleList)) for part in module.modules()):
        return False
    return any(_is_layer(child) for child in module.children())


def _is_layer(module: nn.Module) -> bool:
    """Whether it has weights and no parts."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None
