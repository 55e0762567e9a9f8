"""The losses between students and teacher in plain PyTorch: the formulas, in float32 or better."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 0.25  # |log p - log q| under which `divergence_terms` uses its series


def reference_forward(students, teacher, labels, temperature, form, label_smoothing, ignore_index, mean):
    """(ce, kl, target, nothing kept), as the operator returns them."""
    dtype = _working_dtype(students, teacher, temperature)
    s = students.to(dtype)
    ce, kl, target, kept = (s.new_empty(0, dtype=each) for each in (dtype, dtype, dtype, torch.float32))
    counted = None if labels is None else labels != ignore_index
    if labels is not None:
        log_q = s.log_softmax(-1)
        ce = -(1 - label_smoothing) * _at_label(log_q, labels)
        if label_smoothing:  # not 0 times the infinity of a class that is masked out
            ce = ce - label_smoothing * log_q.mean(-1)
        ce = ce.masked_fill(~counted, 0.0)
    if form != "none":
        t = teacher.to(dtype)
        if form == "decoupled":
            target = _target_divergence(s, t, labels, temperature).masked_fill(~counted, 0.0)
            s, t = _without_target(s, labels), _without_target(t, labels)
        log_p, log_q = (t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
        pair = (log_q, log_p) if form == "reverse" else (log_p, log_q)
        kl = divergence_terms(*pair).sum(-1)
        kl = kl.masked_fill(~counted, 0.0) if form == "decoupled" else kl
    if mean:
        count = None if counted is None else counted.sum().clamp(min=1)
        ce = ce if labels is None else ce.sum(-1) / count
        target = target.sum(-1) / count if form == "decoupled" else target
        kl = kl if form == "none" else kl.sum(-1) / count if form == "decoupled" else kl.mean(-1)
    return *(loss.to(compute_dtype(students, teacher)) for loss in (ce, kl, target)), kept


def reference_backward(
    grad_ce,
    grad_kl,
    grad_target,
    students,
    teacher,
    labels,
    temperature,
    form,
    label_smoothing,
    ignore_index,
    mean,
    for_students,
    for_teacher,
):
    """Gradients of students and teacher, in their dtypes; empty where not wanted."""
    dtype = _working_dtype(students, teacher, temperature)
    s = students.to(dtype)
    counted = None if labels is None else labels != ignore_index
    every = 1 / s.shape[1] if mean else 1.0  # the mean's factor becomes part of the gradients a row, [K, N, 1]
    labelled = every if counted is None else counted.to(dtype) / (counted.sum().clamp(min=1) if mean else 1)
    of_kl = labelled if form == "decoupled" else every
    factors = ((grad_ce, labelled), (grad_kl, of_kl), (grad_target, labelled))
    g_ce, g_kl, g_target = (_by_row(grad, factor, s, mean) for grad, factor in factors)
    ds = torch.zeros_like(s)
    dt = torch.zeros(() if teacher is None else teacher.shape, dtype=dtype, device=s.device)
    if g_ce is not None:
        goal = (1 - label_smoothing) * _onehot(s, labels) + label_smoothing / s.shape[-1]
        known = (labels >= 0) & (labels < s.shape[-1]) | ~counted
        ds += g_ce * (s.softmax(-1) - goal).masked_fill(~known[:, None], math.nan)
        ds = ds.masked_fill(~counted[:, None], 0.0)
    if form == "decoupled":
        t = teacher.to(dtype)
        onehot = _onehot(s, labels)
        z_s, z_t = _target_logit(s, labels, temperature), _target_logit(t, labels, temperature)
        s, t = _without_target(s, labels), _without_target(t, labels)
    elif form != "none":
        t = teacher.to(dtype)
    if form != "none" and not (g_kl is None and g_target is None):
        log_p, log_q = (t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if g_kl is not None and form == "reverse":
            kl = divergence_terms(log_q, log_p).sum(-1, keepdim=True)
            ds += g_kl / temperature * torch.where(q == 0, 0.0, q * (log_q - log_p - kl))
            dt += (g_kl / temperature * (p - q)).sum(0)
        elif g_kl is not None:
            kl = divergence_terms(log_p, log_q).sum(-1, keepdim=True)
            ds += g_kl / temperature * (q - p)
            dt += (g_kl / temperature * torch.where(p == 0, 0.0, p * (log_p - log_q - kl))).sum(0)
        if g_target is not None:
            p_y, q_y = z_t.sigmoid()[..., None], z_s.sigmoid()[..., None]
            slope = (p_y * z_t.neg().sigmoid()[..., None]) * (z_t - z_s)[..., None]
            ds += g_target / temperature * (q_y - p_y) * (onehot - q)
            dt += (g_target / temperature * slope * (onehot - p)).sum(0)
    if form == "decoupled":
        ds, dt = ds.masked_fill(~counted[:, None], 0.0), dt.masked_fill(~counted[:, None], 0.0)
    nothing = students.new_empty(0)
    return ds.to(students.dtype) if for_students else nothing, dt.to(teacher.dtype) if for_teacher else nothing


def _working_dtype(students: Tensor, teacher: Tensor | None, temperature: float) -> torch.dtype:
    """float64 below T = 1, where a finite logit such as finfo.min, for a class that is masked out, overflows."""
    return torch.float64 if temperature < 1 else compute_dtype(students, teacher)


def _by_row(grad: Tensor | None, factor: Tensor | float, students: Tensor, mean: bool) -> Tensor | None:
    return None if grad is None else ((grad[:, None] if mean else grad) * factor).expand(students.shape[:2])[..., None]


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms p (d - 1) + q, with d = log p - log q, that sum to KL(p || q) over the classes.

    As p and q both sum to 1 this is sum p d, but of terms that are never negative: float32 does not lose a
    small divergence in the cancellation of large terms. For |d| < SMALL a series replaces what would
    cancel within the term. Where p = 0 the term is q.
    """
    p, q = log_p.exp(), log_q.exp()
    d = log_p - log_q
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
    if d.dtype == torch.float64:  # the series is good for float32
        series = torch.expm1(-d) + d
    terms = p * torch.where(d.abs() < SMALL, series, d - 1) + torch.where(d.abs() < SMALL, 0.0, q)
    return torch.where(p == 0, q, terms)


def compute_dtype(students: Tensor, teacher: Tensor | None) -> torch.dtype:
    """What the losses are computed in: float32, or the logits' float64."""
    dtypes = [students.dtype] if teacher is None else [students.dtype, teacher.dtype]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _clamped(labels: Tensor, classes: int) -> Tensor:
    return labels.clamp(0, classes - 1)


def _at_label(x: Tensor, labels: Tensor) -> Tensor:
    """x[..., n, labels[n]], NaN for a label that is no class."""
    classes = x.shape[-1]
    index = _clamped(labels, classes).expand(x.shape[:-1])[..., None]
    return x.gather(-1, index)[..., 0].masked_fill((labels < 0) | (labels >= classes), math.nan)


def _onehot(x: Tensor, labels: Tensor) -> Tensor:
    return (torch.arange(x.shape[-1], device=x.device) == labels[:, None]).to(x.dtype)


def _without_target(x: Tensor, labels: Tensor) -> Tensor:
    return x.masked_fill(_onehot(x, labels).bool(), -math.inf)


def _target_logit(x: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log p_y / (1 - p_y) by row: the labelled logit against the log-sum-exp of the others."""
    return _at_label(x, labels) / temperature - (_without_target(x, labels) / temperature).logsumexp(-1)


def _target_divergence(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
    z_s, z_t = _target_logit(s, labels, temperature), _target_logit(t, labels, temperature)
    yes = divergence_terms(F.logsigmoid(z_t), F.logsigmoid(z_s))
    return yes + divergence_terms(F.logsigmoid(-z_t), F.logsigmoid(-z_s))
