"""The losses between K students and their teacher: cross-entropy and temperature KL divergence.

The public functions check their arguments and call one operation, whose backward pass is a second one. Both
are operators of PyTorch, so that torch.compile and other tracers know them, and each has two
implementations: the plain PyTorch reference of kernels/kd_reference.py, which is the specification, and the
Triton kernels of kernels/kd_triton.py. Both passes compute what they need from the logits: between them only
a few numbers a row are kept.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.arguments import number, whole_number
from kernels.dispatch import recorded, refuse_second_derivative, runs_triton
from kernels.kd_reference import compute_dtype, reference_backward, reference_forward

Direction = Literal["forward", "reverse"]
Reduction = Literal["mean", "none"]


class DecoupledLoss(NamedTuple):
    """Per-student losses of `decoupled_kd_loss`, each [K] or [K, N]."""

    ce: Tensor
    target: Tensor
    non_target: Tensor


def kd_loss(
    students: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> tuple[Tensor | None, Tensor]:
    """Cross-entropy of every student and its KL divergence from the teacher.

    With p = softmax(teacher / T) and q_k = softmax(students[k] / T), the divergence is KL(p || q_k) when
    `direction` is "forward" (Hinton et al., 2015) and KL(q_k || p) when it is "reverse" (SFTN, eq. 5). It is
    the plain divergence in nats: the factor T^2 that keeps its gradients comparable is the caller's weight.
    Gradients reach the students and the teacher alike, whichever require them; pass `teacher.detach()`
    where the teacher is fixed. They cannot be differentiated a second time: a backward pass through them raises
    RuntimeError.

    Args:
        students: logits [K, N, C], or [N, C] for a single student (K = 1). -inf masks a class out.
        teacher: logits [N, C].
        labels: class indices [N], int64; without them no cross-entropy is computed.
        temperature: T > 0, applied to the divergence only; a number, as there is no gradient for it.
        direction: "forward" or "reverse".
        label_smoothing: share of the target, in [0, 1], spread evenly over all classes.
        ignore_index: rows with this label have no cross-entropy and do not count in its mean (0 if all have
            it); their divergence counts.
        reduction: "mean" over the batch, or "none".

    Returns:
        (ce, kl): float tensors in nats, [K] for "mean" and [K, N] for "none"; `ce` is None without labels.
        Half-precision logits are computed in float32, float64 stays float64. A row whose label is neither a
        class nor `ignore_index` has a cross-entropy of NaN: to raise would mean to wait for the device.

    Raises:
        ValueError: a temperature that is not a positive number, an unknown direction or reduction, a
            smoothing outside its range, an `ignore_index` that is not a whole number, or shapes, dtypes or devices
            that do not belong together.
    """
    students = students.unsqueeze(0) if students.dim() == 2 else students
    _check_logits(students, teacher)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")
    options = _checked_options(temperature, direction, label_smoothing, ignore_index, reduction)
    if labels is not None:
        _check_labels(labels, students)
    ce, kl, _, _ = _losses(students, teacher, labels, *options)
    return (None if labels is None else ce), kl


def decoupled_kd_loss(
    students: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> DecoupledLoss:
    """Cross-entropy, and the two parts into which DKD takes the forward divergence (Zhao et al., CVPR 2022).

    With p_y and q_y the probabilities of the labelled class at temperature T, `target` is the divergence
    between the binary distributions (p_y, 1 - p_y) and (q_y, 1 - q_y), and `non_target` that between p and q
    restricted to the other classes and renormalised (eq. 5 to 7 there). DKD's loss is alpha T^2 target +
    beta T^2 non_target: alpha, beta and T^2 are the caller's weights; target + (1 - p_y) non_target, row by
    row, is KL(p || q).

    Args and errors as in `kd_loss`, with C >= 2; a row with `ignore_index` counts in none of the three means. A row
    whose label is neither a class nor `ignore_index` has `ce` and `target` of NaN, with gradients of NaN, as `kd_loss`
    has for `ce`; no class is left out of its `non_target`, which is then all of KL(p || q).
    """
    students = students.unsqueeze(0) if students.dim() == 2 else students
    _check_logits(students, teacher)
    options = _checked_options(temperature, "decoupled", label_smoothing, ignore_index, reduction)
    _check_labels(labels, students)
    if students.shape[-1] < 2:
        raise ValueError(f"students need 2 classes or more to have non-target ones; got {_shape(students)}")
    ce, non_target, target, _ = _losses(students, teacher, labels, *options)
    return DecoupledLoss(ce, target, non_target)


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy in nats of logits [N, C] against class indices [N] int64, in float32 or better.

    Options as in `kd_loss`. Raises ValueError for shapes, dtypes or devices that do not belong together.
    """
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, C], not empty; got {logits.dtype} {_shape(logits)}")
    options = _checked_options(1.0, "none", label_smoothing, ignore_index, "mean")
    _check_labels(labels, logits[None])
    return _losses(logits[None], None, labels, *options)[0][0]


def _losses(students: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_forward if recorded(students) else _Eager.apply)(students, *arguments)


# The operators. `form` is a direction, "decoupled", or "none" when there is no teacher. Of the results ce, kl
# (the non-target part when decoupled) and target, those that a form lacks are empty. `rows` is what the
# kernels keep for their backward pass; the reference keeps nothing.


def _run_forward(
    students: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    form: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (students, teacher, labels, temperature, form, label_smoothing, ignore_index, mean)
    if runs_triton(students, teacher):
        from kernels import kd_triton

        return kd_triton.forward(*arguments)
    return reference_forward(*arguments)


_forward = torch.library.custom_op("distillation::kd", _run_forward, mutates_args=())


@_forward.register_fake
def _(students, teacher, labels, temperature, form, label_smoothing, ignore_index, mean):
    shape = students.shape[:1] if mean else students.shape[:2]
    dtype = compute_dtype(students, teacher)
    wanted = (labels is not None, form != "none", form == "decoupled")
    losses = [students.new_empty(shape if there else (0,), dtype=dtype) for there in wanted]
    kept = 0
    if runs_triton(students, teacher):
        from kernels import kd_triton

        kept = kd_triton.planes_of(form) * students.shape[0] * students.shape[1] + int(mean)
    return *losses, students.new_empty(kept, dtype=torch.float32)


def _run_backward(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    grad_target: Tensor | None,
    students: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    rows: Tensor,
    temperature: float,
    form: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    for_students: bool,
    for_teacher: bool,
) -> tuple[Tensor, Tensor]:
    grads, wanted = (grad_ce, grad_kl, grad_target), (for_students, for_teacher)
    options = (temperature, form, label_smoothing, ignore_index, mean)
    if rows.numel():
        from kernels import kd_triton

        return kd_triton.backward(*grads, students, teacher, labels, rows, *options, *wanted)
    return reference_backward(*grads, students, teacher, labels, *options, *wanted)


_backward = torch.library.custom_op("distillation::kd_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(grad_ce, grad_kl, grad_target, students, teacher, labels, rows, *options):
    *_, for_students, for_teacher = options
    d_students = students.new_empty(students.shape if for_students else (0,))
    d_teacher = teacher.new_empty(teacher.shape) if for_teacher else students.new_empty(0)
    return d_students, d_teacher


_backward.register_autograd(refuse_second_derivative)


def _setup_context(ctx, inputs, output) -> None:
    students, teacher, labels, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # a loss that is not used costs nothing in the backward pass
    ctx.mark_non_differentiable(output[3], *(loss for loss in output[:3] if not loss.numel()))
    ctx.save_for_backward(students, teacher, labels, output[3])


def _gradients(ctx, grads, backward):
    for_students, for_teacher = ctx.needs_input_grad[:2]
    d_students, d_teacher = backward(*grads[:3], *ctx.saved_tensors, *ctx.options, for_students, for_teacher)
    return d_students if for_students else None, d_teacher if for_teacher else None, *[None] * 6


def _autograd(ctx, *grads):
    return _gradients(ctx, grads, _backward)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """What the operator does, without being one."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        # Where a graph is made of the gradients, the operator is in it, and raises if they are differentiated.
        return _gradients(ctx, grads, _backward if torch.is_grad_enabled() else _run_backward)


def _check_logits(students: Tensor, teacher: Tensor) -> None:
    if students.dim() != 3 or teacher.dim() != 2 or students.shape[1:] != teacher.shape:
        raise ValueError(
            f"students must be [K, N, C] or [N, C] and teacher [N, C]; got {_shape(students)} and {_shape(teacher)}"
        )
    if 0 in students.shape:
        raise ValueError(f"students must not be empty; got {_shape(students)}")
    if not (students.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floating point; got {students.dtype} and {teacher.dtype}")
    if students.device != teacher.device:
        raise ValueError(f"students are on {students.device} but the teacher is on {teacher.device}")


def _checked_options(
    temperature: float, form: str, label_smoothing: float, ignore_index: int, reduction: str
) -> tuple[float, str, float, int, bool]:
    """The operators' options: numbers as float and int, and whether the losses are means."""
    temperature, label_smoothing = number("temperature", temperature), number("label_smoothing", label_smoothing)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number; got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
    return temperature, form, label_smoothing, whole_number("ignore_index", ignore_index), reduction == "mean"


def _check_labels(labels: Tensor, students: Tensor) -> None:
    if labels.shape != students.shape[1:2] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{students.shape[1]}]; got {labels.dtype} {_shape(labels)}")
    if labels.device != students.device:
        raise ValueError(f"labels are on {labels.device} but the logits on {students.device}")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"
