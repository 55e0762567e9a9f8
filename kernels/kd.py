"""The losses between K students and their teacher: temperature KL divergence and cross-entropy."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Direction = Literal["forward", "reverse"]


def kd_loss(
    students: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> tuple[Tensor | None, Tensor]:
    """Cross-entropy of every student and its KL divergence from the teacher, each a mean over the batch.

    With p = softmax(teacher / T) and q_k = softmax(students[k] / T), the divergence is KL(p || q_k) when
    `direction` is "forward" (Hinton et al., 2015) and KL(q_k || p) when it is "reverse" (SFTN, eq. 5). It is
    the plain divergence in nats: the factor T^2 that keeps its gradients comparable is the caller's weight.
    Gradients reach the students and the teacher alike; pass `teacher.detach()` where the teacher is fixed.

    Args:
        students: logits [K, N, C], or [N, C] for a single student (K = 1).
        teacher: logits [N, C].
        labels: class indices [N], int64; without them no cross-entropy is computed.
        temperature: T > 0, applied to the divergence only.
        direction: "forward" or "reverse".

    Returns:
        (ce, kl): float tensors [K] in nats; `ce` is None without labels. Half-precision logits are
        computed in float32, float64 stays float64.

    Raises:
        ValueError: a temperature that is not a positive number, an unknown direction, or shapes, dtypes or
            devices that do not belong together.
    """
    students = students.unsqueeze(0) if students.dim() == 2 else students
    _check_kd_arguments(students, teacher, labels, temperature, direction)
    students, teacher = _at_least_float32(students), _at_least_float32(teacher)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q = F.log_softmax(students / temperature, dim=-1)
    if direction == "forward":
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    else:
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean(-1)
    return (None if labels is None else _mean_cross_entropy(students, labels)), kl


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [N, C] against class indices [N] int64, in float32 or better.

    Raises ValueError for shapes, dtypes or devices that do not belong together.
    """
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, C], not empty; got {logits.dtype} {_shape(logits)}")
    _check_labels(labels, logits)
    return _mean_cross_entropy(_at_least_float32(logits)[None], labels)[0]


def _mean_cross_entropy(students: Tensor, labels: Tensor) -> Tensor:
    log_q = F.log_softmax(students, dim=-1)
    index = labels.expand(len(students), -1).unsqueeze(-1)
    return -log_q.gather(-1, index).squeeze(-1).mean(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_kd_arguments(students, teacher, labels, temperature, direction) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number; got {temperature}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")
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
    if labels is not None:
        _check_labels(labels, teacher)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{logits.shape[0]}]; got {labels.dtype} {_shape(labels)}")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device} but the logits on {logits.device}")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"
