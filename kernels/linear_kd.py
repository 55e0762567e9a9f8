"""The losses of `kd_loss` behind both classifiers, without the logits of more than a few images at a time.

With tens of thousands of classes the logits, [N, C] for student and teacher, their gradients and what is computed on
the way outgrow everything else in memory. Here they are made, a few rows at a time, in both passes and never kept: one
product with each classifier more than unfused, for memory that does not grow with N.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.dispatch import Final
from kernels.kd import Direction, _check_labels, _checked_options, _run_backward, _run_forward, _shape

ELEMENTS = 2**22  # of a network's logits at a time, unless the caller says how many rows


def linear_kd_loss(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_embedding: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`kd_loss` of the logits embedding weight^T + bias and those of the teacher, which gets no gradient.

    Under autocast both products are computed in its type, as those of nn.Linear are; gradients of weight and bias are
    summed in float32 or better.

    Args:
        embedding: of the student, [N, D]; weight [C, D] and bias [C] or None are those of its classifier.
        teacher_embedding, teacher_weight, teacher_bias: the same of the teacher, of a width of its own.
        labels: class indices [N], int64.
        rows: images whose logits are there at a time; default: as many as have 4 million logits, 16 at least.
        temperature, direction, label_smoothing, ignore_index: as in `kd_loss`.

    Returns:
        (ce, kl): means over the batch in nats, scalars, as `kd_loss` gives them.

    Raises:
        ValueError: shapes that do not belong together, a teacher that requires a gradient, or options that `kd_loss`
            refuses.
        RuntimeError: its gradients are differentiated a second time.
    """
    _check_pair("", embedding, weight, bias)
    _check_pair("teacher_", teacher_embedding, teacher_weight, teacher_bias)
    if len(embedding) != len(teacher_embedding) or len(weight) != len(teacher_weight):
        raise ValueError(
            f"student and teacher must have images and classes in common; got {_shape(embedding)} with "
            f"{_shape(weight)} and {_shape(teacher_embedding)} with {_shape(teacher_weight)}"
        )
    if any(each is not None and each.requires_grad for each in (teacher_embedding, teacher_weight, teacher_bias)):
        raise ValueError("the teacher gets no gradient here: pass its tensors detached, or use kd_loss")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")
    options = _checked_options(temperature, direction, label_smoothing, ignore_index, "none")
    _check_labels(labels, embedding[None])
    rows = max(16, ELEMENTS // len(weight)) if rows is None else rows
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}")
    ce, kl = _LinearKD.apply(
        embedding, weight, bias, teacher_embedding, teacher_weight, teacher_bias, labels, options, rows
    )
    counted = (labels != options[3]).sum().clamp(min=1)
    return ce.sum() / counted, kl.mean()


class _LinearKD(torch.autograd.Function):
    """The losses of every image, [N] each."""

    @staticmethod
    def forward(ctx, embedding, weight, bias, teacher_embedding, teacher_weight, teacher_bias, labels, options, rows):
        device = embedding.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.options, ctx.rows = options, rows
        ctx.save_for_backward(embedding, weight, bias, teacher_embedding, teacher_weight, teacher_bias, labels)
        ce, kl, ctx.kept = [], [], []
        student, teacher = (embedding, weight, bias), (teacher_embedding, teacher_weight, teacher_bias)
        for part, *logits in _logits(student, teacher, ctx.dtype, rows):
            found = _run_forward(*logits, labels[part], *options)
            ce.append(found[0][0])
            kl.append(found[1][0])
            ctx.kept.append(found[3])
        return torch.cat(ce), torch.cat(kl)

    @staticmethod
    def backward(ctx, grad_ce, grad_kl):
        with torch.no_grad():
            gradients = _gradients(ctx, grad_ce, grad_kl)
        if torch.is_grad_enabled():  # a graph is made of the gradients
            gradients = Final.apply(len(gradients), *gradients, grad_ce, grad_kl, *ctx.saved_tensors)
        return *gradients, *[None] * 6


def _gradients(ctx, grad_ce: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of embedding, weight and bias, as far as they are wanted."""
    embedding, weight, bias, *teacher, labels = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    wide = torch.promote_types(weight.dtype, torch.float32)
    d_embedding = torch.empty_like(embedding) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
    parts = _logits((embedding, weight, bias), teacher, ctx.dtype, ctx.rows)
    for (part, *logits), kept in zip(parts, ctx.kept, strict=True):
        grads = grad_ce[None, part].contiguous(), grad_kl[None, part].contiguous(), None
        gradient, _ = _run_backward(*grads, *logits, labels[part], kept, *ctx.options, True, False)
        gradient = gradient[0]
        if d_embedding is not None:
            d_embedding[part] = gradient @ weight.to(gradient.dtype)
        if d_weight is not None:
            _add_product(d_weight, gradient.T, embedding[part].to(gradient.dtype))
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=wide)
    narrow = (None if each is None else each.to(weight.dtype) for each in (d_weight, d_bias))
    return d_embedding, *narrow


def _logits(
    student: Sequence[Tensor | None], teacher: Sequence[Tensor | None], dtype: torch.dtype | None, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which images, students' logits [1, n, C], teacher's [n, C]), `rows` images at a time; dtype: of autocast."""

    def product(embedding: Tensor, *classifier: Tensor | None) -> Tensor:
        operands = (embedding[part], *classifier)
        return linear(*(each if each is None or dtype is None else each.to(dtype) for each in operands))

    for begin in range(0, len(student[0]), rows):
        part = slice(begin, begin + rows)
        yield part, product(*student)[None], product(*teacher)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)  # without a second one of its size
    else:
        total += a @ b


def _check_pair(prefix: str, embedding: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if embedding.dim() != 2 or weight.dim() != 2 or embedding.shape[1] != weight.shape[1] or 0 in embedding.shape:
        raise ValueError(
            f"{prefix}embedding must be [N, D] and {prefix}weight [C, D]; got {_shape(embedding)} and {_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{len(weight)}]; got {_shape(bias)}")
    if embedding.device != weight.device or not embedding.is_floating_point():
        raise ValueError(f"{prefix}embedding and {prefix}weight must be floating point on one device")
