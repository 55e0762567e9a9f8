"""The gated mixed operation of a supernet layer, and the gradient of its gates.

Source: Cai et al., ProxylessNAS (ICLR 2019), section 3.2: binary gates choose one candidate operation a
layer, and the gates' gradient is what the loss says about every candidate's output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_mix(outputs: Sequence[Tensor | None], gates: Tensor, active: int, shortcut: Tensor | None = None) -> Tensor:
    """y = shortcut + sum_j gates[j] * outputs[j] for one-hot gates, without a multiplication.

    The forward pass only selects; the backward pass sends dL/dy to the active output and to the shortcut,
    and gives every gate dL/dgates[j] = <dL/dy, outputs[j]>, accumulated in float32 or better. Inactive
    outputs receive no gradient, since their gate is 0.

    Args:
        outputs: J candidate outputs of one shape, any layout; None stands for an output of zeros.
        gates: [J] floating point, one-hot at `active`; only its gradient matters.
        active: index of the candidate whose gate is 1.
        shortcut: tensor of the outputs' shape added to the chosen one, or None.

    Raises:
        ValueError: `active` out of range, gates of another length, or nothing to return (the active output
            is zero and there is no shortcut).
    """
    if gates.shape != (len(outputs),) or not 0 <= active < len(outputs):
        raise ValueError(
            f"{len(outputs)} outputs need gates [{len(outputs)}] and an active index among them; "
            f"got gates {list(gates.shape)} and active {active}"
        )
    if outputs[active] is None and shortcut is None:
        raise ValueError("the active output is zero and there is no shortcut: the signal would be cut")
    return _GatedMix.apply(gates, active, shortcut, *outputs)


def gate_gradient(probabilities: Tensor, gate_gradients: Tensor) -> Tensor:
    """Gradient of the gate parameters phi from that of the binary gates, for all layers at once.

    dL/dphi_i = sum_j dL/dg_j * p_j * (delta_ij - p_i) = p_i * (dL/dg_i - <p, dL/dg>), with p = softmax(phi)
    (ProxylessNAS, eq. 4).

    Args:
        probabilities: p [L, J], rows summing to 1; a candidate that a layer lacks has p = 0.
        gate_gradients: dL/dg [L, J].

    Returns:
        dL/dphi [L, J]; its rows sum to 0.
    """
    mean = (probabilities * gate_gradients).sum(-1, keepdim=True)
    return probabilities * (gate_gradients - mean)


class _GatedMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, active, shortcut, *outputs):
        ctx.active, ctx.has_shortcut = active, shortcut is not None
        ctx.present = [output is not None for output in outputs]
        ctx.save_for_backward(gates, *(output for output in outputs if output is not None))
        chosen = outputs[active]
        if chosen is None:
            return shortcut
        return chosen if shortcut is None else shortcut + chosen

    @staticmethod
    def backward(ctx, grad):
        gates, *saved = ctx.saved_tensors
        gate_grads = torch.zeros_like(gates)
        if ctx.needs_input_grad[0]:
            accumulate = torch.promote_types(grad.dtype, torch.float32)
            dots = iter([(grad.to(accumulate) * output).sum() for output in saved])
            zero = gates.new_zeros(())
            gate_grads = torch.stack([next(dots).to(gates.dtype) if there else zero for there in ctx.present])
        output_grads = [grad if j == ctx.active and there else None for j, there in enumerate(ctx.present)]
        return gate_grads, None, grad if ctx.has_shortcut else None, *output_grads
