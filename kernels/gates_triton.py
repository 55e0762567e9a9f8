"""Triton kernels of the gated mixed operation: one launch forward, two backward (the second sums partial dots).

Elements are taken in the order in which they lie in memory, so that every dense layout is contiguous here.
The forward pass reads each term once and writes y; the backward pass reads dL/dy and each output once,
writes what gradients are not dL/dy itself, and multiplies and sums in float32. Formulas: the reference in
kernels/gates.py.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device_of
from kernels.dtypes import accumulate_dtype, mixed_dtype

BLOCK = 8192


@triton.jit(do_not_specialize=["units"])
def mix_kernel(
    outputs,  # tuple of pointers, None for zeros
    gates,  # [J], or None: outputs are taken as they are
    shortcut,  # or None
    y,
    units,
    ALIGN: tl.constexpr,  # elements a unit, so that the compiler sees how wide it may load
    J: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = sum_j gates_j outputs_j + shortcut, with RELU rectified."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(units, tl.int64) * ALIGN
    total = tl.zeros([BLOCK], tl.float32)
    if shortcut is not None:
        total = tl.load(shortcut + at, mask=inside).to(tl.float32)
    for j in tl.static_range(J):
        if outputs[j] is not None:
            output = tl.load(outputs[j] + at, mask=inside).to(tl.float32)
            if gates is not None:
                output = tl.load(gates + j).to(tl.float32) * output
            total += output
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN
    tl.store(y + at, total, mask=inside)


@triton.jit(do_not_specialize=["units"])
def mix_backward_kernel(
    grad,
    outputs,
    gates,  # [J], or None: no output has a gradient of its own
    y,  # or None: no ReLU
    dz,  # or None: no term needs it
    d_outputs,  # tuple of pointers, None for what needs no gradient of its own
    partial,  # [J, programs], or None: gates need no gradient
    units,
    ALIGN: tl.constexpr,  # elements a unit, so that the compiler sees how wide it may load
    J: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `mix_kernel` for what is given: outputs and shortcut, and partial sums of the gates'."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(units, tl.int64) * ALIGN
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        d = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, d)
    if dz is not None:
        tl.store(dz + at, d, mask=inside)
    for j in tl.static_range(J):
        if partial is not None:
            dot = 0.0
            if outputs[j] is not None:
                dot = tl.sum(d * tl.load(outputs[j] + at, mask=inside, other=0.0).to(tl.float32), 0)
            tl.store(partial + j * tl.num_programs(0) + tl.program_id(0), dot)
        if d_outputs[j] is not None:
            tl.store(d_outputs[j] + at, tl.load(gates + j).to(tl.float32) * d, mask=inside)


def mix(outputs: Sequence[Tensor | None], gates: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    """As the operator in kernels/gates.py, for tensors of one layout."""
    terms = [each for each in (*outputs, shortcut) if each is not None]
    y = torch.empty_like(terms[0], dtype=mixed_dtype(terms))
    gates = None if gates is None else gates.contiguous()
    if y.numel():
        with on_device_of(y):
            mix_kernel[(-(-y.numel() // BLOCK),)](
                tuple(outputs),
                gates,
                shortcut,
                y,
                *_units(y.numel()),
                J=len(outputs),
                RELU=relu,
                BLOCK=BLOCK,
                num_warps=8,
            )
    return y


def mix_backward(
    grad: Tensor,
    outputs: Sequence[Tensor | None],
    gates: Tensor | None,
    y: Tensor | None,
    for_gates: bool,
    for_sum: bool,
    shares: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As the operator in kernels/gates.py, for tensors of one layout."""
    J, elements = len(outputs), grad.numel()
    programs = -(-elements // BLOCK)
    dz = torch.empty_like(grad) if for_sum else None
    partial = grad.new_empty((J, programs), dtype=accumulate_dtype(grad)) if for_gates else None
    d_outputs = [torch.empty_like(grad) if wanted else None for wanted in shares]
    gates = None if gates is None else gates.contiguous()
    if programs:
        with on_device_of(grad):
            mix_backward_kernel[(programs,)](
                grad,
                tuple(outputs),
                gates,
                y,
                dz,
                tuple(d_outputs),
                partial,
                *_units(elements),
                J=J,
                BLOCK=BLOCK,
                num_warps=8,
            )
    dots = grad.new_empty(0, dtype=accumulate_dtype(grad)) if partial is None else partial.sum(1)
    return grad.new_empty(0) if dz is None else dz, dots, [each for each in d_outputs if each is not None]


def _units(elements: int) -> tuple[int, int]:
    """(units, elements a unit): the largest power of two up to 16 that goes into them, and how often."""
    align = math.gcd(elements, 16)
    return elements // align, align
