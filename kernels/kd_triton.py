"""Triton kernels of the losses between students and teacher: two launches forward, one backward.

Bytes: the forward pass reads every logit once, the backward pass reads it again and writes its gradient:
3 (K + 1) N C elements, the least there is without keeping probabilities. Rows of up to TILE classes stay in
registers; longer ones are read twice in the forward pass, once for the softmax statistics (online, so in one
sweep) and once for the divergence. All arithmetic is float32. Formulas: kernels/kd_reference.py.

With half-precision logits a modern GPU has time for some fifteen instructions an element, so they are
counted: exponentials are powers of 2, which are one instruction where e^x is five, and the series that a
small divergence needs is only summed for rows that have one. The softmax of a row is kept as two numbers,
(maximum, log2 of the sum of powers below it), instead of as their sum, so that large logits lose nothing.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device_of

TILE = 4096  # classes that a program holds in registers
LOOP_TILE = 2048  # classes that it takes at a time when there are more
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(-3.0e38)  # finite: a maximum of -inf would turn 2^(x - max) into NaN
NEAR = tl.constexpr(1 / 32)  # nats of divergence below which a row is summed by the series

# The planes [K, N] of `rows`: the first three always, the next five with a teacher, the last when decoupled. There
# MAX and LOG_SUM are of the classes but the target.
CE = tl.constexpr(0)
MAX_1 = tl.constexpr(1)  # of the student's logits, over all classes
LOG_SUM_1 = tl.constexpr(2)  # log2 of sum exp(s - MAX_1)
KL = tl.constexpr(3)
MAX = tl.constexpr(4)  # of the student's logits
LOG_SUM = tl.constexpr(5)  # log2 of sum exp((s - MAX) / T)
TEACHER_MAX = tl.constexpr(6)  # the same of the teacher's, repeated for every student
TEACHER_LOG_SUM = tl.constexpr(7)
TARGET = tl.constexpr(8)


@triton.jit
def _load(base, offsets, columns, C: tl.constexpr):
    """Tile [rows, columns] in float32, -inf past the last class."""
    return tl.load(base + offsets[:, None] + columns, mask=columns < C, other=-float("inf")).to(tl.float32)


@triton.jit
def _terms(p, q, d):
    """Terms of KL(p || q), d = log p - log q in nats, that are never negative: p (d - 1) + q."""
    return tl.where(p == 0, q, p * (d - 1) + q)


@triton.jit
def _series_terms(p, q, d):
    """The same where p and q are close: a series in d, as p (d - 1) + q would cancel."""
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
    return tl.where((tl.abs(d) < 0.25) & (p != 0), p * series, _terms(p, q, d))


@triton.jit
def _log_ratio(below_p, below_q, p_log_sum, q_log_sum):
    """log p - log q in nats, from log2 of what is summed: where p and q are close their difference is exact."""
    return (below_p - below_q) * LN2 + ((q_log_sum - p_log_sum) * LN2)[:, None]


@triton.jit
def _power(e, POWER: tl.constexpr):
    """exp(x) from e = exp(x / POWER): saves the second exponential at the usual temperatures."""
    if POWER >= 2:
        e = e * e
    if POWER == 4:
        e = e * e
    return e


@triton.jit
def _log_sigmoid(z):
    """In nats."""
    x = tl.exp(-tl.abs(z))
    u = 1 + x  # log(1 + x) without losing a small x
    return tl.minimum(z, 0.0) - tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def _target_divergence(z_s, z_t):
    """KL between two Bernoulli distributions, in nats, from their log odds."""
    yes_s, yes_t, no_s, no_t = _log_sigmoid(z_s), _log_sigmoid(z_t), _log_sigmoid(-z_s), _log_sigmoid(-z_t)
    yes = _series_terms(tl.exp(yes_t), tl.exp(yes_s), yes_t - yes_s)
    return yes + _series_terms(tl.exp(no_t), tl.exp(no_s), no_t - no_s)


@triton.jit
def _load_labels(labels, row, ignore_index, C: tl.constexpr):
    """(label, whether the row counts, whether the label is a class)."""
    label = tl.load(labels + row)
    return label, label != ignore_index, (label >= 0) & (label < C)


@triton.jit
def _load_at_label(base, offsets, label, known):
    return tl.where(known, tl.load(base + offsets + tl.where(known, label, 0)).to(tl.float32), float("nan"))


@triton.jit
def _store_row(rows, PLANE: tl.constexpr, k, n, K, N, value):
    tl.store(rows + (PLANE * K + k) * tl.cast(N, tl.int64) + n, value, mask=n < N)


@triton.jit
def _store_no_labels(rows, k, n, K, N):
    """What an operator returns it has written, used or not."""
    zeros = (n * 0).to(tl.float32)
    _store_row(rows, CE, k, n, K, N, zeros)
    _store_row(rows, MAX_1, k, n, K, N, zeros)
    _store_row(rows, LOG_SUM_1, k, n, K, N, zeros)


@triton.jit
def _load_row(rows, PLANE: tl.constexpr, k, row, K, N):
    return tl.load(rows + (PLANE * K + k) * tl.cast(N, tl.int64) + row)


@triton.jit
def _log_odds(x_y, largest, log_sum, scale):
    """In nats: the labelled logit against the softmax statistics of the other classes, `scale` = log2(e) / T."""
    return ((x_y - largest) * scale - log_sum) * LN2


@triton.jit
def _cross_entropy(s_y, mean, largest, log_sum, smoothing, counted):
    """From the labelled logit, the mean logit less the largest, and the softmax statistics at temperature 1."""
    log_sum *= LN2
    loss = (1 - smoothing) * (log_sum - (s_y - largest)) + smoothing * (log_sum - mean)
    return tl.where(counted, loss, 0.0)


@triton.jit
def forward_tile(
    students,  # [K, N, C]
    teacher,  # [N, C] or None
    labels,  # [N] or None
    rows,  # [PLANES, K, N]
    N,
    stride_k,
    stride_n,
    stride_t,
    scale,  # log2(e) / temperature
    smoothing,
    ignore_index,
    K: tl.constexpr,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,  # the temperature if it is 1, 2 or 4, else 0
    ALIGN: tl.constexpr,  # strides are in units of it, so that the compiler sees how wide it may load
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Losses and softmax statistics of BLOCK_N rows, all students, with whole rows in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)  # past the end: the last row again, not stored
    columns = tl.arange(0, BLOCK_C)[None, :]
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
    if teacher is not None:
        t = _load(teacher, row * stride_t * ALIGN, columns, C)
        if DECOUPLED:
            t_y = _load_at_label(teacher, row * stride_t * ALIGN, label, known)
            t = tl.where(columns == label[:, None], -float("inf"), t)
        t_max = tl.maximum(tl.max(t, 1), LOWEST)
        below_t = (t - t_max[:, None]) * scale
        p = tl.exp2(below_t)
        t_sum = tl.sum(p, 1)
        t_log_sum = tl.log2(t_sum)
        p *= (1 / t_sum)[:, None]
    for k in range(K):
        offsets = (tl.cast(k, tl.int64) * stride_k + row * stride_n) * ALIGN
        s = _load(students, offsets, columns, C)
        if labels is not None:
            s_y = _load_at_label(students, offsets, label, known)
        x = s
        if DECOUPLED:
            x = tl.where(columns == label[:, None], -float("inf"), s)
        largest = tl.maximum(tl.max(x, 1), LOWEST)
        below_s = (x - largest[:, None]) * scale
        e = tl.exp2(below_s)
        if teacher is not None:
            s_sum = tl.sum(e, 1)
            log_sum = tl.log2(s_sum)
            q = e * (1 / s_sum)[:, None]
            d = _log_ratio(below_t, below_s, t_log_sum, log_sum)
            if REVERSE:
                kl = tl.sum(_terms(q, p, -d), 1)
                if tl.min(kl, 0) < NEAR:
                    kl = tl.sum(_series_terms(q, p, -d), 1)
            else:
                kl = tl.sum(_terms(p, q, d), 1)
                if tl.min(kl, 0) < NEAR:
                    kl = tl.sum(_series_terms(p, q, d), 1)
            if DECOUPLED:
                z_s, z_t = _log_odds(s_y, largest, log_sum, scale), _log_odds(t_y, t_max, t_log_sum, scale)
                target = tl.where(counted, _target_divergence(z_s, z_t), 0.0)
                kl = tl.where(counted, kl, 0.0)
                _store_row(rows, TARGET, k, n, K, N, target)
            _store_row(rows, KL, k, n, K, N, kl)
            _store_row(rows, MAX, k, n, K, N, largest)
            _store_row(rows, LOG_SUM, k, n, K, N, log_sum)
            _store_row(rows, TEACHER_MAX, k, n, K, N, t_max)
            _store_row(rows, TEACHER_LOG_SUM, k, n, K, N, t_log_sum)
        if labels is None:
            _store_no_labels(rows, k, n, K, N)
        else:
            largest_1 = largest
            if DECOUPLED:
                largest_1 = tl.maximum(largest, s_y)
            if POWER == 0:
                e = tl.exp2((s - largest_1[:, None]) * LOG2E)
            else:
                e = _power(e, POWER)
            log_sum_1 = tl.log2(tl.sum(e, 1))
            mean = largest
            if SMOOTH:
                mean = tl.sum(tl.where(columns < C, s - largest_1[:, None], 0.0), 1) / C
            ce = _cross_entropy(s_y, mean, largest_1, log_sum_1, smoothing, counted)
            _store_row(rows, CE, k, n, K, N, ce)
            _store_row(rows, MAX_1, k, n, K, N, largest_1)
            _store_row(rows, LOG_SUM_1, k, n, K, N, log_sum_1)


@triton.jit
def _online(largest, total, x, scale):
    """Every lane's running (maximum, sum of powers below it) with x taken in."""
    new = tl.maximum(largest, x)
    return new, total * tl.exp2((largest - new) * scale) + tl.exp2((x - new) * scale)


@triton.jit
def _finish(largest, total, scale):
    """(maximum, log2 of the sum) of a row from those of its lanes."""
    overall = tl.max(largest, 1)
    return overall, tl.log2(tl.sum(total * tl.exp2((largest - overall[:, None]) * scale), 1))


@triton.jit
def _sum_divergence(
    students,
    teacher,
    s_offsets,
    t_offsets,
    label,
    largest,
    log_sum,
    t_max,
    t_log_sum,
    scale,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The divergence of whole rows whose softmax statistics are known, in one sweep over both."""
    terms = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)[None, :]
        t = _load(teacher, t_offsets, columns, C)
        s = _load(students, s_offsets, columns, C)
        if DECOUPLED:
            t = tl.where(columns == label[:, None], -float("inf"), t)
            s = tl.where(columns == label[:, None], -float("inf"), s)
        below_t, below_s = (t - t_max[:, None]) * scale, (s - largest[:, None]) * scale
        p, q = tl.exp2(below_t - t_log_sum[:, None]), tl.exp2(below_s - log_sum[:, None])
        d = _log_ratio(below_t, below_s, t_log_sum, log_sum)
        if REVERSE:
            p, q, d = q, p, -d
        if SERIES:
            terms += _series_terms(p, q, d)
        else:
            terms += _terms(p, q, d)
    return tl.sum(terms, 1)


@triton.jit
def forward_loop(
    students,
    teacher,
    labels,
    rows,
    N,
    stride_k,
    stride_n,
    stride_t,
    scale,
    smoothing,
    ignore_index,
    K: tl.constexpr,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 1
    BLOCK_C: tl.constexpr,
):
    """What forward_tile does, for rows that do not fit in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    lanes = tl.arange(0, BLOCK_C)[None, :]
    lowest = tl.full([BLOCK_N, BLOCK_C], LOWEST, tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    label = None
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
    if teacher is not None:
        t_offsets = row * stride_t * ALIGN
        if DECOUPLED:
            t_y = _load_at_label(teacher, t_offsets, label, known)
        largest, total = lowest, zeros
        for start in range(0, C, BLOCK_C):
            t = _load(teacher, t_offsets, start + lanes, C)
            if DECOUPLED:
                t = tl.where(start + lanes == label[:, None], -float("inf"), t)
            largest, total = _online(largest, total, t, scale)
        t_max, t_log_sum = _finish(largest, total, scale)
    for k in range(K):
        offsets = (tl.cast(k, tl.int64) * stride_k + row * stride_n) * ALIGN
        largest, total, largest_1, total_1, above = lowest, zeros, lowest, zeros, zeros
        if labels is not None:
            s_y = _load_at_label(students, offsets, label, known)
            pivot = tl.where(s_y == -float("inf"), 0.0, s_y)
        for start in range(0, C, BLOCK_C):
            columns = start + lanes
            s = _load(students, offsets, columns, C)
            if SMOOTH:
                above += tl.where(columns < C, s - pivot[:, None], 0.0)
            if teacher is None or labels is None or POWER == 0:
                if labels is not None:
                    largest_1, total_1 = _online(largest_1, total_1, s, LOG2E)
                if teacher is not None:
                    if DECOUPLED:
                        s = tl.where(columns == label[:, None], -float("inf"), s)
                    largest, total = _online(largest, total, s, scale)
            else:  # both temperatures from one exponential
                largest_1 = tl.maximum(largest, s)
                shrink = tl.exp2((largest - largest_1) * scale)
                e = tl.exp2((s - largest_1) * scale)
                largest, total = largest_1, total * shrink + e
                total_1 = total_1 * _power(shrink, POWER) + _power(e, POWER)
        if teacher is not None:
            s_max, log_sum = _finish(largest, total, scale)
            kl = _sum_divergence(
                students, teacher, offsets, t_offsets, label, s_max, log_sum, t_max, t_log_sum, scale,
                C, DECOUPLED, REVERSE, False, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            if tl.min(kl, 0) < NEAR:
                kl = _sum_divergence(
                    students, teacher, offsets, t_offsets, label, s_max, log_sum, t_max, t_log_sum, scale,
                    C, DECOUPLED, REVERSE, True, BLOCK_N, BLOCK_C,
                )  # fmt: skip
            if DECOUPLED:
                z_s, z_t = _log_odds(s_y, s_max, log_sum, scale), _log_odds(t_y, t_max, t_log_sum, scale)
                target = tl.where(counted, _target_divergence(z_s, z_t), 0.0)
                kl = tl.where(counted, kl, 0.0)
                _store_row(rows, TARGET, k, n, K, N, target)
            _store_row(rows, KL, k, n, K, N, kl)
            _store_row(rows, MAX, k, n, K, N, s_max)
            _store_row(rows, LOG_SUM, k, n, K, N, log_sum)
            _store_row(rows, TEACHER_MAX, k, n, K, N, t_max)
            _store_row(rows, TEACHER_LOG_SUM, k, n, K, N, t_log_sum)
        if labels is None:
            _store_no_labels(rows, k, n, K, N)
        else:
            max_1, log_sum_1 = _finish(largest_1, total_1, LOG2E)
            mean = tl.sum(above, 1) / C + pivot - max_1
            ce = _cross_entropy(s_y, mean, max_1, log_sum_1, smoothing, counted)
            _store_row(rows, CE, k, n, K, N, ce)
            _store_row(rows, MAX_1, k, n, K, N, max_1)
            _store_row(rows, LOG_SUM_1, k, n, K, N, log_sum_1)


@triton.jit
def mean_rows(
    rows, labels, ce, kl, target, N, ignore_index, K: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Batch means [K] of the losses, one program a student; the last number of `rows` is how many rows count."""
    k = tl.program_id(0)
    zeros = tl.zeros([BLOCK], tl.float32)
    ce_sum, kl_sum, target_sum, counted = zeros, zeros, zeros, zeros
    start = 0
    while start < N:  # and not range: the interpreter takes no range of a tensor with NumPy 2.4
        n = start + tl.arange(0, BLOCK)
        start += BLOCK
        inside = n < N
        at = k * tl.cast(N, tl.int64) + n
        if ce is not None:
            label = tl.load(labels + n, mask=inside, other=ignore_index)
            counted += (label != ignore_index).to(tl.float32)
            ce_sum += tl.load(rows + CE * K * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
        if kl is not None:
            kl_sum += tl.load(rows + KL * K * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
        if target is not None:
            target_sum += tl.load(rows + TARGET * K * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
    count = N * 1.0
    if ce is not None:
        count = tl.maximum(tl.sum(counted, 0), 1.0)
        tl.store(ce + k, tl.sum(ce_sum, 0) / count)
    if k == 0:
        tl.store(rows + PLANES * K * tl.cast(N, tl.int64), count)
    if target is not None:
        tl.store(target + k, tl.sum(target_sum, 0) / count)
    else:
        count = N * 1.0
    if kl is not None:
        tl.store(kl + k, tl.sum(kl_sum, 0) / count)


@triton.jit
def _upstream(grad, k, row, stride_k, stride_n, share):
    return tl.load(grad + k * stride_k + row * stride_n).to(tl.float32) * share


@triton.jit
def gradients(
    grad_ce,  # [K] for a mean, [K, N] otherwise (by its strides); or None
    grad_kl,
    grad_target,
    students,
    teacher,
    labels,
    rows,
    d_students,  # [K, N, C] contiguous, or None
    d_teacher,  # [N, C] contiguous, or None
    N,
    stride_k,
    stride_n,
    stride_t,
    ce_stride_k,
    ce_stride_n,
    kl_stride_k,
    kl_stride_n,
    target_stride_k,
    target_stride_n,
    scale,
    smoothing,
    ignore_index,
    K: tl.constexpr,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    MEAN: tl.constexpr,
    PLANES: tl.constexpr,
    POWER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of a tile of classes, all students; the teacher's is summed over them in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    stored = (n < N)[:, None] & (columns < C)
    of_kl = scale * LN2  # 1 / T, and the factor of the mean
    of_labelled = 1.0
    if MEAN:
        of_kl /= N
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
        at_label = columns == label[:, None]
        if MEAN:
            of_labelled /= tl.load(rows + PLANES * K * tl.cast(N, tl.int64))
    of_target = scale * LN2 * of_labelled
    if DECOUPLED:
        of_kl = of_target
    if teacher is not None:
        t = _load(teacher, row * stride_t * ALIGN, columns, C)
        if DECOUPLED:
            t_y = _load_at_label(teacher, row * stride_t * ALIGN, label, known)
            t = tl.where(at_label, -float("inf"), t)
        t_max = _load_row(rows, TEACHER_MAX, 0, row, K, N)
        t_log_sum = _load_row(rows, TEACHER_LOG_SUM, 0, row, K, N)
        below_t = (t - t_max[:, None]) * scale
        p = tl.exp2(below_t - t_log_sum[:, None])
    dt = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for k in range(K):
        offsets = (tl.cast(k, tl.int64) * stride_k + row * stride_n) * ALIGN
        s = _load(students, offsets, columns, C)
        ds = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if grad_kl is not None or grad_target is not None:
            largest = _load_row(rows, MAX, k, row, K, N)
            log_sum = _load_row(rows, LOG_SUM, k, row, K, N)
            x = s
            if DECOUPLED:
                x = tl.where(at_label, -float("inf"), s)
            below_s = (x - largest[:, None]) * scale
            q = tl.exp2(below_s - log_sum[:, None])
        if grad_kl is not None:
            g = (tl.load(grad_kl + k * kl_stride_k + row * kl_stride_n).to(tl.float32) * of_kl)[:, None]
            kl = _load_row(rows, KL, k, row, K, N)[:, None]
            d = _log_ratio(below_t, below_s, t_log_sum, log_sum)
            if REVERSE:
                ds -= tl.where(q == 0, 0.0, g * q * (d + kl))
                dt += g * (p - q)
            else:
                ds += g * (q - p)
                dt += tl.where(p == 0, 0.0, g * p * (d - kl))
        if grad_target is not None:
            g = tl.load(grad_target + k * target_stride_k + row * target_stride_n).to(tl.float32) * of_target
            s_y = _load_at_label(students, offsets, label, known)
            z_s, z_t = _log_odds(s_y, largest, log_sum, scale), _log_odds(t_y, t_max, t_log_sum, scale)
            onehot = tl.where(at_label, 1.0, 0.0)
            ds += (g * (tl.sigmoid(z_s) - tl.sigmoid(z_t)))[:, None] * (onehot - q)
            dt += (g * tl.sigmoid(z_t) * tl.sigmoid(-z_t) * (z_t - z_s))[:, None] * (onehot - p)
        if grad_ce is not None:
            g = tl.load(grad_ce + k * ce_stride_k + row * ce_stride_n).to(tl.float32) * of_labelled
            g = tl.where(known, g, float("nan"))[:, None]
            log_sum_1 = _load_row(rows, LOG_SUM_1, k, row, K, N)
            if POWER == 0 or (grad_kl is None and grad_target is None):
                largest_1 = _load_row(rows, MAX_1, k, row, K, N)
                q_1 = tl.exp2((s - largest_1[:, None]) * LOG2E - log_sum_1[:, None])
            else:  # q^T is it but for a factor of the row
                q_1 = _power(q, POWER) * tl.exp2(POWER * log_sum - log_sum_1)[:, None]
            of_ce = g * (q_1 - smoothing / C) - tl.where(at_label, g * (1 - smoothing), 0.0)
            ds += tl.where(counted[:, None], of_ce, 0.0)
        if DECOUPLED:
            ds = tl.where(counted[:, None], ds, 0.0)
        if d_students is not None:
            start = (tl.cast(k, tl.int64) * N + row) * C
            tl.store(d_students + start[:, None] + columns, ds, mask=stored)
    if d_teacher is not None:
        if DECOUPLED:
            dt = tl.where(counted[:, None], dt, 0.0)
        tl.store(d_teacher + (row * C)[:, None] + columns, dt, mask=stored)


def forward(
    students: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    form: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ce, kl, target, rows), as the operator in kernels/kd.py returns them."""
    count, batch, classes = students.shape
    students, teacher, labels = _rows_contiguous(students), _rows_contiguous(teacher), _contiguous(labels)
    planes = planes_of(form)
    rows = students.new_empty(planes * count * batch + int(mean), dtype=torch.float32)
    block_n, block_c, warps = forward_shape(classes)
    align, strides = _layout(students, teacher)
    kernel = forward_tile if classes <= TILE else forward_loop
    with on_device_of(students):
        kernel[(-(-batch // block_n),)](
            students,
            teacher,
            labels,
            rows,
            batch,
            *strides,
            LOG2E.value / temperature,
            label_smoothing,
            ignore_index,
            **_constants(students, temperature, form),
            ALIGN=align,
            SMOOTH=label_smoothing > 0 and labels is not None,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=warps,
        )
        wanted = (labels is not None, form != "none", form == "decoupled")
        if mean:
            losses = [rows.new_empty(count if there else 0) for there in wanted]
            given = [loss if there else None for loss, there in zip(losses, wanted, strict=True)]
            block = min(1 << (batch - 1).bit_length(), 4096)
            mean_rows[(count,)](
                rows, labels, *given, batch, ignore_index, K=count, PLANES=planes, BLOCK=block, num_warps=8
            )
        else:
            parts = zip((CE.value, KL.value, TARGET.value), wanted, strict=True)
            by_plane = rows.view(planes, count, batch)
            losses = [by_plane[plane].clone() if there else rows.new_empty(0) for plane, there in parts]
    return *losses, rows


def backward(
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
    """Gradients of students and teacher, contiguous and in their dtypes; empty where not wanted."""
    _, batch, classes = students.shape
    students, teacher, labels = _rows_contiguous(students), _rows_contiguous(teacher), _contiguous(labels)
    d_students = students.new_empty(students.shape if for_students else 0)
    d_teacher = teacher.new_empty(teacher.shape) if for_teacher else students.new_empty(0)
    block_n, block_c, warps = backward_shape(classes)
    align, strides = _layout(students, teacher)
    for grad in (grad_ce, grad_kl, grad_target):
        strides += (0, 0) if grad is None else (grad.stride(0), 0 if mean else grad.stride(1))
    with on_device_of(students):
        gradients[(-(-batch // block_n), -(-classes // block_c))](
            grad_ce,
            grad_kl,
            grad_target,
            students,
            teacher,
            labels,
            rows,
            d_students if for_students else None,
            d_teacher if for_teacher else None,
            batch,
            *strides,
            LOG2E.value / temperature,
            label_smoothing,
            ignore_index,
            **_constants(students, temperature, form),
            ALIGN=align,
            MEAN=mean,
            PLANES=planes_of(form),
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=warps,
        )
    return d_students, d_teacher


def planes_of(form: str) -> int:
    """How many planes [K, N] the forward pass keeps; after them, for a mean, stands how many rows count."""
    return 3 if form == "none" else 9 if form == "decoupled" else 8


@functools.cache
def forward_shape(classes: int) -> tuple[int, int, int]:
    """(rows, classes, warps) of a program: 16 elements a thread, few warps a row, as its sums have to meet."""
    block_c = triton.next_power_of_2(classes) if classes <= TILE else LOOP_TILE
    block_n = max(1, min(32, 512 // block_c))
    return block_n, block_c, max(1, block_n * block_c // 512)


@functools.cache
def backward_shape(classes: int) -> tuple[int, int, int]:
    """The same for the backward pass, where the classes of a row need not meet."""
    block_c = min(triton.next_power_of_2(classes), 1024)
    block_n = max(1, min(32, 512 // block_c))
    return block_n, block_c, max(1, block_n * block_c // 256)


def _layout(students: Tensor, teacher: Tensor | None) -> tuple[int, list[int]]:
    """The largest power of two up to 16 that divides all row strides, and those strides in units of it."""
    strides = [*students.stride()[:-1], 0 if teacher is None else teacher.stride(0)]
    align = math.gcd(16, *strides)
    return align, [stride // align for stride in strides]


def _constants(students: Tensor, temperature: float, form: str) -> dict:
    """What the kernels are compiled for."""
    decoupled = form == "decoupled"  # its two temperatures have different maxima
    return {
        "K": students.shape[0],
        "C": students.shape[-1],
        "DECOUPLED": decoupled,
        "REVERSE": form == "reverse",
        "POWER": int(temperature) if temperature in (1, 2, 4) and not decoupled else 0,
    }


def _rows_contiguous(logits: Tensor | None) -> Tensor | None:
    if logits is None or logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return logits
    return logits.contiguous()


def _contiguous(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.contiguous()
