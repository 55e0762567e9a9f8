"""Deep networks in little memory: layers that are computed again in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 4; for DenseNets
Pleiss et al., "Memory-Efficient Implementation of DenseNets" (arXiv 1707.06990).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DEEP = 100  # WRNs and DenseNets of this depth and more are recomputed


@contextmanager
def spare_statistics(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Within it BatchNorms update copies of their running statistics, which are then dropped.

    (Not tracking any would be simpler, but then fewer tensors are saved for the backward pass than the
    first time, and `checkpoint` takes that for an error.)
    """
    before = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in before:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in before:
            setattr(norm, name, buffer)


class ActivationCheckpointing(nn.Module):
    """Runs `module`, registered elsewhere, and in training keeps its inputs alone for the backward pass.

    There the module runs a second time; its BatchNorms count that batch once. The module holds at least one
    BatchNorm and nothing random.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.norms = tuple(part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))

    def forward(self, *inputs: Tensor) -> Tensor:
        # The BatchNorm is asked for the mode: a wrapper that nobody registers is not told by model.train().
        if not (self.norms[0].training and torch.is_grad_enabled()):
            return self.module(*inputs)
        return checkpoint(
            self.module,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), spare_statistics(self.norms)),
        )


def checkpoint_if_deep(layers: Iterable[nn.Module], depth: int) -> list[nn.Module]:
    """`layers`, each of them recomputed in the backward pass when the network is `DEEP`."""
    return [ActivationCheckpointing(layer) for layer in layers] if depth >= DEEP else list(layers)
