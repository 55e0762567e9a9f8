"""The gated mixed operation of a supernet layer, and the gradient of its gates.

Source: Cai et al., ProxylessNAS (ICLR 2019), section 3.2: binary gates choose one candidate operation a
layer, and a gate's gradient is the inner product of its candidate's output with the gradient of the mix. The plain
PyTorch reference in this file is the specification of the Triton kernels in kernels/gates_triton.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import whole_number
from kernels.dispatch import recorded, refuse_second_derivative, runs_triton
from kernels.dtypes import accumulate_dtype, mixed_dtype


def gated_mix(
    outputs: Sequence[Tensor | None],
    gates: Tensor,
    active: int | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """y = shortcut + sum_j gates[j] * outputs[j], then max(y, 0) with `relu`.

    With `active`, gates are one-hot there and nothing is multiplied: the forward pass only selects, dL/dy
    goes to the active output and to the shortcut, and inactive outputs, whose gate is 0, receive no
    gradient. Without, gates are weights of any value, and every output receives its share. Either way
    every gate has its gradient dL/dgates[j] = <dL/dy, outputs[j]>, accumulated in float32 or better in the
    same pass over memory as the outputs' gradients.

    Args:
        outputs: J candidate outputs of one shape; None stands for an output of zeros. Contiguous or
            channels_last tensors are taken as they are, mixed layouts are brought to the first one's.
        gates: [J] floating point; with `active` only its gradient matters.
        active: index of the candidate whose gate is 1, or None for weights.
        shortcut: tensor of the outputs' shape added to them, or None.
        relu: clip the sum at 0, as a residual block does.

    Returns:
        y in the outputs' shape and layout and in the type that outputs and shortcut promote to. Where there
        is nothing to compute it is the active output, or the shortcut, itself, and shares its memory: who changes
        it in place changes both, and takes from gates that need a gradient the output that it is computed from
        (PyTorch then raises).

    Raises:
        ValueError: `active` no whole number or out of range, gates of another length, shapes or devices that
            differ, or nothing to return (all that counts is zero and there is no shortcut).
        RuntimeError: the backward pass is differentiated again, where it multiplies.
    """
    J = len(outputs)
    active = None if active is None else whole_number("active", active)
    if gates.shape != (J,) or not (active is None or 0 <= active < J):
        raise ValueError(
            f"{J} outputs need gates [{J}] and an active index among them; "
            f"got gates {list(gates.shape)} and active {active}"
        )
    if not gates.is_floating_point():
        raise ValueError(f"gates must be floating point; got {gates.dtype}")
    present = [tensor for tensor in (*outputs, shortcut) if tensor is not None]
    for tensor in present:
        if tensor.shape != present[0].shape or not tensor.is_floating_point():
            described = ", ".join(f"{each.dtype} {list(each.shape)}" for each in present)
            raise ValueError(f"outputs and shortcut must be floating point and of one shape; got {described}")
        if tensor.device != gates.device:
            raise ValueError(f"gates are on {gates.device} but an output or the shortcut is on {tensor.device}")
    counted = outputs if active is None else [outputs[active]]
    if shortcut is None and all(output is None for output in counted):
        raise ValueError("the active output is zero and there is no shortcut: the signal would be cut")
    terms = [term for term in (*counted, shortcut) if term is not None]
    if active is not None and len(terms) == 1 and not relu and not gates.requires_grad:
        return terms[0]
    return _GatedMix.apply(gates, active, relu, shortcut, *outputs)


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
    """Keeps the operators below from copying where the result is one of the inputs."""

    @staticmethod
    def forward(ctx, gates, active, relu, shortcut, *outputs):
        ctx.active, ctx.dtypes = active, [None if each is None else each.dtype for each in (shortcut, *outputs)]
        chosen = outputs if active is None else [outputs[active]]
        terms = [each for each in (*chosen, shortcut) if each is not None]
        if active is not None and len(terms) == 1 and not relu:
            y = terms[0].detach()  # no view of it, which could not be changed in place
        else:
            mix = _mix if recorded(terms[0]) else _run_mix
            y = mix(chosen, gates if active is None else None, shortcut, relu)
        kept = outputs if ctx.needs_input_grad[0] else [None] * len(outputs)
        ctx.save_for_backward(gates, y if relu else None, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        gates, y, *outputs = ctx.saved_tensors
        soft, clipped = ctx.active is None, y is not None
        for_gates, _, _, for_shortcut, *for_outputs = ctx.needs_input_grad
        shares = for_outputs if soft else [False] * len(outputs)  # outputs whose gradient is not dL/dy
        for_sum = clipped and (for_shortcut or (not soft and for_outputs[ctx.active]))
        dz, dots, d_outputs = grad, None, []
        if for_gates or for_sum or any(shares):
            # Where a graph is made of the gradients, the operator is in it, and raises if they are differentiated.
            mix_backward = _mix_backward if recorded(grad) or torch.is_grad_enabled() else _run_mix_backward
            dz, dots, d_outputs = mix_backward(grad, outputs, gates if soft else None, y, for_gates, for_sum, shares)
            dz = dz if clipped else grad
        d_outputs = iter(d_outputs)
        d_terms = [dz if for_shortcut else None]
        for j, wanted in enumerate(for_outputs):
            d_terms.append(None if not wanted else next(d_outputs) if soft else dz if j == ctx.active else None)
        d_terms = [None if each is None else each.to(dtype) for each, dtype in zip(d_terms, ctx.dtypes, strict=True)]
        return dots.to(gates.dtype) if for_gates else None, None, None, *d_terms


# The operators. `gates` are None where the one output is taken as it is.


def _run_mix(outputs: Sequence[Tensor | None], gates: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    *outputs, shortcut = _same_layout([*outputs, shortcut])
    if runs_triton(*outputs, shortcut):
        from kernels import gates_triton

        return gates_triton.mix(outputs, gates, shortcut, relu)
    return reference_mix(outputs, gates, shortcut, relu)


_mix = torch.library.custom_op("distillation::mix", _run_mix, mutates_args=())


@_mix.register_fake
def _(outputs, gates, shortcut, relu):
    terms = [each for each in _same_layout([*outputs, shortcut]) if each is not None]
    return torch.empty_like(terms[0], dtype=mixed_dtype(terms))


def _run_mix_backward(
    grad: Tensor,
    outputs: Sequence[Tensor | None],
    gates: Tensor | None,
    y: Tensor | None,
    for_gates: bool,
    for_sum: bool,
    shares: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(gradient before the ReLU, [J] dots with the outputs, gate times that gradient for the j in `shares`).

    The first, which needs `y`, and the second, which needs the outputs, are empty unless `for_sum` and `for_gates`.
    """
    *outputs, y, grad = _same_layout([*outputs, y, grad])
    if runs_triton(*outputs, y, grad):
        from kernels import gates_triton

        return gates_triton.mix_backward(grad, outputs, gates, y, for_gates, for_sum, shares)
    return reference_mix_backward(grad, outputs, gates, y, for_gates, for_sum, shares)


_mix_backward = torch.library.custom_op("distillation::mix_backward", _run_mix_backward, mutates_args=())


@_mix_backward.register_fake
def _(grad, outputs, gates, y, for_gates, for_sum, shares):
    *outputs, y, grad = _same_layout([*outputs, y, grad])
    dots = grad.new_empty(len(outputs) if for_gates else 0, dtype=accumulate_dtype(grad))
    dz = torch.empty_like(grad) if for_sum else grad.new_empty(0)
    return dz, dots, [torch.empty_like(grad) for wanted in shares if wanted]


_mix_backward.register_autograd(refuse_second_derivative)


# The reference.


def reference_mix(outputs, gates, shortcut, relu):
    """As `_mix`, for tensors of one layout."""
    terms = [each for each in (shortcut, *outputs) if each is not None]
    if gates is None:
        y = terms[0] + terms[1] if len(terms) == 2 else terms[0]
        return y.relu() if relu else y.clone() if len(terms) == 1 else y
    dtype = accumulate_dtype(*terms)
    total = torch.zeros_like(terms[0], dtype=dtype) if shortcut is None else shortcut.to(dtype)
    for gate, output in zip(gates, outputs, strict=True):
        if output is not None:
            total = total + gate.to(dtype) * output
    total = total.to(mixed_dtype(terms))
    return total.relu() if relu else total


def reference_mix_backward(grad, outputs, gates, y, for_gates, for_sum, shares):
    """As `_mix_backward`, for tensors of one layout."""
    dtype = accumulate_dtype(grad)
    dz = grad if y is None else grad.masked_fill(y <= 0, 0.0)
    wide = dz.to(dtype)
    dots = grad.new_empty(0, dtype=dtype)
    if for_gates:
        zero = wide.new_zeros(())
        dots = torch.stack([zero if each is None else (wide * each).sum() for each in outputs])
    d_outputs = [(gates[j].to(dtype) * wide).to(grad.dtype) for j, wanted in enumerate(shares) if wanted]
    return dz if for_sum else grad.new_empty(0), dots, d_outputs


def _same_layout(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors as dense ones whose elements lie in the same order: as they are if they do, copies if not."""
    present = [tensor for tensor in tensors if tensor is not None]
    images = present[0].dim() == 4
    if images and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in present):
        return list(tensors)
    if all(tensor.is_contiguous() for tensor in present):
        return list(tensors)
    first_is_last = images and present[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if first_is_last else torch.contiguous_format
    return [None if tensor is None else tensor.contiguous(memory_format=layout) for tensor in tensors]
