"""Triton kernels of the losses between students and teacher: two or three launches forward, one backward.

Bytes: the forward pass reads every logit once, the backward pass reads it again and writes its gradient:
3 (K + 1) N C elements, the least there is without keeping probabilities. Rows of up to TILE classes stay in
registers; longer ones are read in one sweep a student, with the teacher's beside it, which comes from the cache from
the second student on. All arithmetic is float32. Formulas: kernels/kd_reference.py.

With half-precision logits a modern GPU has time for some fifteen instructions an element, so they are
counted (benchmarks/instructions.py): exponentials are powers of 2, which are one instruction where e^x is five, and
what is common to a row is done once a row. The softmax of a row is kept as two numbers, (maximum, log2 of the sum of
powers below it), instead of as their sum, so that large logits lose nothing; and log p - log q is computed from the
logits' distances to their maxima before those are divided by the temperature, so that no finite logit overflows.

A divergence is sum p (log p - log q) where it is large; where it is small the terms cancel, and such rows, each by its
own divergence, are summed again by terms that do not (kernels/kd_reference.py, divergence_terms).
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device_of

TILE = 4096  # classes that a program holds in registers
LOOP_TILE = 2048  # classes that it takes at a time when there are more
MEAN_BLOCK = 8192  # rows whose losses a program sums; of more there are several programs
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: below a maximum of -inf there is only NaN
NEAR = tl.constexpr(1 / 4)  # nats of divergence below which a row is summed again, by terms that do not cancel

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


# Arguments whose values kernels are not compiled for: else the last batch of an epoch, which is smaller, would stop
# the training to compile.
VARYING = ["N", "stride_k", "stride_n", "stride_t", "ignore_index"]
VARYING_GRADS = [f"{loss}_stride_{of}" for loss in ("ce", "kl", "target") for of in ("k", "n")]


@triton.jit
def _load(base, offsets, columns, C: tl.constexpr):
    """Tile [rows, columns] in float32, -inf past the last class."""
    return tl.load(base + offsets[:, None] + columns, mask=columns < C, other=-float("inf")).to(tl.float32)


@triton.jit
def _terms(p, q, d):
    """Terms of KL(p || q), d = log p - log q in nats, that are never negative: p (d - 1) + q, or a series in d where
    p and q are close and these two would cancel."""
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
    terms = tl.where(tl.abs(d) < 0.25, p * series, p * (d - 1) + q)
    return tl.where(p == 0, q, terms)


@triton.jit
def _expected(e, d):
    """Sum of e d over the classes; nothing of a class of weight 0, whose d may be infinite or NaN."""
    return tl.sum(tl.where(e == 0, 0.0, e * d), 1)


@triton.jit
def _divergence(tilted, s_sum, t_sum, temperature, REVERSE: tl.constexpr):
    """In nats, from the sum of T (log p - log q) but for the normalisers, weighted as the direction is, and these."""
    ratio = tl.log2(s_sum / t_sum) * LN2
    if REVERSE:
        kl = -(tilted / s_sum / temperature + ratio)
    else:
        kl = tilted / t_sum / temperature + ratio
    return kl


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
    """KL between two Bernoulli distributions, in nats, from their log odds in bits."""
    z_s, z_t = z_s * LN2, z_t * LN2
    yes_s, yes_t, no_s, no_t = _log_sigmoid(z_s), _log_sigmoid(z_t), _log_sigmoid(-z_s), _log_sigmoid(-z_t)
    yes = _terms(tl.exp(yes_t), tl.exp(yes_s), yes_t - yes_s)
    return yes + _terms(tl.exp(no_t), tl.exp(no_s), no_t - no_s)


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
    """In bits: the labelled logit against the softmax statistics of the other classes, `scale` = log2(e) / T."""
    return (x_y - largest) * scale - log_sum


@triton.jit
def _cross_entropy(s_y, mean, largest, log_sum, smoothing, counted):
    """From the labelled logit, the mean logit less the largest, and the softmax statistics at temperature 1."""
    log_sum *= LN2
    loss = (1 - smoothing) * (log_sum - (s_y - largest)) + smoothing * (log_sum - mean)
    return tl.where(counted, loss, 0.0)


@triton.jit(do_not_specialize=VARYING)
def forward_tile(
    students,  # [K, N, C]
    teacher,  # [N, C] or None
    labels,  # [N] or None
    rows,  # [PLANES, K, N]
    N,
    stride_k,
    stride_n,
    stride_t,
    temperature,
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
    scale = LOG2E / temperature
    label = None
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
    if teacher is not None:
        t_offsets = row * stride_t * ALIGN
        t = _load(teacher, t_offsets, columns, C)
        if DECOUPLED:
            t_y = _load_at_label(teacher, t_offsets, label, known)
            t = tl.where(columns == label[:, None], -float("inf"), t)
        t_max = tl.maximum(tl.max(t, 1), LOWEST)
        below_t = t - t_max[:, None]
        e_t = tl.exp2(below_t * scale)
        t_sum = tl.sum(e_t, 1)
        t_log_sum = tl.log2(t_sum)
    any_near = tl.program_id(0) < 0
    UNROLL: tl.constexpr = min(K, 4)  # the rows of several students are on their way at once
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        offsets = (tl.cast(k, tl.int64) * stride_k + row * stride_n) * ALIGN
        s = _load(students, offsets, columns, C)
        if labels is not None:
            s_y = _load_at_label(students, offsets, label, known)
        x = s
        if DECOUPLED:
            x = tl.where(columns == label[:, None], -float("inf"), s)
        largest = tl.maximum(tl.max(x, 1), LOWEST)
        below_s = x - largest[:, None]
        e = tl.exp2(below_s * scale)
        if teacher is not None:
            s_sum = tl.sum(e, 1)
            d = below_t - below_s
            if REVERSE:
                tilted = _expected(e, d)
            else:
                tilted = _expected(e_t, d)
        if labels is not None:
            largest_1 = largest
            if DECOUPLED:
                largest_1 = tl.maximum(largest, s_y)
            if POWER == 0:
                e_1 = tl.exp2((s - largest_1[:, None]) * LOG2E)
            else:
                e_1 = _power(e, POWER)
            sum_1 = tl.sum(e_1, 1)
        if teacher is not None:
            log_sum = tl.log2(s_sum)
            kl = _divergence(tilted, s_sum, t_sum, temperature, REVERSE)
            any_near = any_near | (tl.min((kl >= NEAR).to(tl.int32), 0) == 0)
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
            log_sum_1 = tl.log2(sum_1)
            mean = largest
            if SMOOTH:
                mean = tl.sum(tl.where(columns < C, s - largest_1[:, None], 0.0), 1) / C
            ce = _cross_entropy(s_y, mean, largest_1, log_sum_1, smoothing, counted)
            _store_row(rows, CE, k, n, K, N, ce)
            _store_row(rows, MAX_1, k, n, K, N, largest_1)
            _store_row(rows, LOG_SUM_1, k, n, K, N, log_sum_1)
    if teacher is not None:  # noqa: SIM102 - which is known when it is compiled, the other not
        if any_near:  # after all students, so that they share the registers
            tl.debug_barrier()  # what is loaded from `rows` has been stored by other threads
            for j in range(K):
                x = _load(students, (tl.cast(j, tl.int64) * stride_k + row * stride_n) * ALIGN, columns, C)
                if DECOUPLED:
                    x = tl.where(columns == label[:, None], -float("inf"), x)
                below_s = x - _load_row(rows, MAX, j, row, K, N)[:, None]
                e = tl.exp2(below_s * scale)
                s_sum = tl.sum(e, 1)
                shift = tl.log2(tl.div_rn(s_sum, t_sum)) * (LN2 * temperature)  # 0 where they are equal
                d = (below_t - below_s + shift[:, None]) * (1 / temperature)
                p, q = e_t * (1 / t_sum)[:, None], e * (1 / s_sum)[:, None]
                if REVERSE:
                    near = tl.sum(_terms(q, p, -d), 1)
                else:
                    near = tl.sum(_terms(p, q, d), 1)
                kl = _load_row(rows, KL, j, row, K, N)
                is_near = tl.where(kl >= NEAR, False, n < N)
                if DECOUPLED:
                    is_near = is_near & counted
                tl.store(rows + (KL * K + j) * tl.cast(N, tl.int64) + n, near, mask=is_near)


@triton.jit
def _sum_divergence(
    students,
    teacher,
    s_offsets,
    t_offsets,
    label,
    largest,
    s_sum,
    t_max,
    t_sum,
    temperature,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The divergences of whole rows whose softmax statistics are known, in a sweep, by terms that do not
    cancel."""
    scale = LOG2E / temperature
    shift = tl.log2(tl.div_rn(s_sum, t_sum)) * LN2  # 0 where they are equal: a fast division gives almost 1 there
    kl = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)[None, :]
        t = _load(teacher, t_offsets, columns, C)
        s = _load(students, s_offsets, columns, C)
        if DECOUPLED:
            t = tl.where(columns == label[:, None], -float("inf"), t)
            s = tl.where(columns == label[:, None], -float("inf"), s)
        below_t, below_s = t - t_max[:, None], s - largest[:, None]
        p = tl.exp2(below_t * scale) * (1 / t_sum)[:, None]
        q = tl.exp2(below_s * scale) * (1 / s_sum)[:, None]
        d = (below_t - below_s) * (1 / temperature) + shift[:, None]
        if REVERSE:
            kl += tl.sum(_terms(q, p, -d), 1)
        else:
            kl += tl.sum(_terms(p, q, d), 1)
    return kl


@triton.jit
def _take_in(largest, total, x, scale):
    """A row's running (maximum, sum of powers below it) with a tile taken in; of the tile what lies below that maximum,
    and its powers; and by how much the maximum rose, and sums below it shrink."""
    new = tl.maximum(largest, tl.max(x, 1))
    below = x - new[:, None]
    e = tl.exp2(below * scale)
    shrink = tl.exp2((largest - new) * scale)
    return new, total * shrink + tl.sum(e, 1), below, e, new - largest, shrink


@triton.jit(do_not_specialize=VARYING)
def forward_loop(
    students,
    teacher,
    labels,
    rows,
    N,
    stride_k,
    stride_n,
    stride_t,
    temperature,
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
    """What forward_tile does, for rows that do not fit in registers: one sweep a student.

    Until it ends neither maxima nor normalisers are known: what is summed of the divergence follows the maxima.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    t_offsets = row * stride_t * ALIGN
    lanes = tl.arange(0, BLOCK_C)[None, :]
    scale = LOG2E / temperature
    zeros = tl.zeros([BLOCK_N], tl.float32)
    label = None
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
    for k in range(K):
        offsets = (tl.cast(k, tl.int64) * stride_k + row * stride_n) * ALIGN
        largest, total, total_1, above = zeros + LOWEST, zeros, zeros, zeros
        t_max, t_sum, tilted = zeros + LOWEST, zeros, zeros
        if labels is not None:
            s_y = _load_at_label(students, offsets, label, known)
            middle = tl.where(s_y == -float("inf"), 0.0, s_y)
        for start in range(0, C, BLOCK_C):
            columns = start + lanes
            s = _load(students, offsets, columns, C)
            if SMOOTH:
                above += tl.sum(tl.where(columns < C, s - middle[:, None], 0.0), 1)
            if DECOUPLED:
                s = tl.where(columns == label[:, None], -float("inf"), s)
            s_sum = total
            largest, total, below_s, e, s_rise, shrink = _take_in(largest, total, s, scale)
            if labels is not None:
                if POWER == 0:
                    total_1 = total_1 * tl.exp2(s_rise * -LOG2E) + tl.sum(tl.exp2(below_s * LOG2E), 1)
                else:
                    total_1 = total_1 * _power(shrink, POWER) + tl.sum(_power(e, POWER), 1)
            if teacher is not None:
                t = _load(teacher, t_offsets, columns, C)
                if DECOUPLED:
                    t = tl.where(columns == label[:, None], -float("inf"), t)
                p_sum = t_sum
                t_max, t_sum, below_t, e_t, t_rise, t_shrink = _take_in(t_max, t_sum, t, scale)
                d = below_t - below_s
                if REVERSE:
                    tilted = (tilted + s_sum * (s_rise - t_rise)) * shrink + _expected(e, d)
                else:
                    tilted = (tilted + p_sum * (s_rise - t_rise)) * t_shrink + _expected(e_t, d)
        log_sum = tl.log2(total)
        if teacher is not None:
            t_log_sum = tl.log2(t_sum)
            kl = _divergence(tilted, total, t_sum, temperature, REVERSE)
            far = kl >= NEAR
            if tl.min(far.to(tl.int32), 0) == 0:
                near = _sum_divergence(
                    students, teacher, offsets, t_offsets, label, largest, total, t_max, t_sum, temperature,
                    C, DECOUPLED, REVERSE, BLOCK_N, BLOCK_C,
                )  # fmt: skip
                kl = tl.where(far, kl, near)
            if DECOUPLED:
                t_y = _load_at_label(teacher, t_offsets, label, known)
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
            if DECOUPLED:  # the labelled class comes on top
                largest_1 = tl.maximum(largest, s_y)
                total_1 = total_1 * tl.exp2((largest - largest_1) * LOG2E) + tl.exp2((s_y - largest_1) * LOG2E)
            log_sum_1 = tl.log2(total_1)
            ce = _cross_entropy(s_y, above / C + middle - largest_1, largest_1, log_sum_1, smoothing, counted)
            _store_row(rows, CE, k, n, K, N, ce)
            _store_row(rows, MAX_1, k, n, K, N, largest_1)
            _store_row(rows, LOG_SUM_1, k, n, K, N, log_sum_1)


@triton.jit
def _plane_of(part):
    """Of the losses 0: ce, 1: kl, 2: target."""
    return tl.where(part == 0, CE, tl.where(part == 1, KL, TARGET))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def sum_rows(rows, labels, sums, counts, N, ignore_index, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the losses of BLOCK rows, a program a student, loss and block, and how many of the rows count: for
    mean_rows, which finds them where it would find N losses and labels."""
    k, part, block, blocks = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    n = block * BLOCK + tl.arange(0, BLOCK)
    row = _plane_of(part) * K + k
    total = tl.sum(tl.load(rows + row * tl.cast(N, tl.int64) + n, mask=n < N, other=0.0), 0)
    tl.store(sums + row * blocks + block, total)
    if labels is not None:
        counted = tl.load(labels + n, mask=n < N, other=ignore_index) != ignore_index
        tl.store(counts + block, tl.sum(counted.to(tl.int64), 0), mask=k + part == 0)


@triton.jit(do_not_specialize=["N", "length", "summed", "ignore_index"])
def mean_rows(
    losses,  # [PLANES, K, length]: N losses, or their sums by block
    labels,  # [length]: labels, or with `summed` numbers of rows that count; or None
    rows,
    ce,
    kl,
    target,
    N,
    length,
    summed,
    ignore_index,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Batch means [K] of the losses, a program a student and loss; the last number of `rows` is how many rows count."""
    k, part = tl.program_id(0), tl.program_id(1)
    losses += (_plane_of(part) * K + k) * tl.cast(length, tl.int64)
    total, counted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < length:  # and not range: the interpreter takes no range of a tensor with NumPy 2.4
        n = start + tl.arange(0, BLOCK)
        start += BLOCK
        inside = n < length
        if labels is not None:
            label = tl.load(labels + n, mask=inside, other=0)
            counts = tl.where(summed != 0, label.to(tl.float32), (label != ignore_index).to(tl.float32))
            counted += tl.where(inside, counts, 0.0)
        total += tl.load(losses + n, mask=inside, other=0.0)
    of_all = N * 1.0
    count = of_all
    if labels is not None:
        count = tl.maximum(tl.sum(counted, 0), 1.0)
    if k + part == 0:
        tl.store(rows + PLANES * K * tl.cast(N, tl.int64), count)
    total = tl.sum(total, 0)
    if ce is not None:
        tl.store(ce + k, total / count, mask=part == 0)
    if kl is not None:
        tl.store(kl + k, total / (of_all if target is None else count), mask=part == 1)
    if target is not None:
        tl.store(target + k, total / count, mask=part == 2)


@triton.jit(do_not_specialize=[*VARYING, *VARYING_GRADS])
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
    temperature,
    smoothing,
    ignore_index,
    K: tl.constexpr,
    C: tl.constexpr,
    DECOUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALIGN: tl.constexpr,
    MEAN: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of a tile of classes, all students; the teacher's is summed over them in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    stored = (n < N)[:, None] & (columns < C)
    scale, by_temperature = LOG2E / temperature, 1 / temperature
    of_kl = by_temperature  # and the factor of the mean
    of_labelled = 1.0
    if MEAN:
        of_kl /= N
    if labels is not None:
        label, counted, known = _load_labels(labels, row, ignore_index, C)
        at_label = columns == label[:, None]
        if MEAN:
            of_labelled /= tl.load(rows + PLANES * K * tl.cast(N, tl.int64))
    of_target = by_temperature * of_labelled
    if DECOUPLED:
        of_kl = of_target
    if teacher is not None:
        t = _load(teacher, row * stride_t * ALIGN, columns, C)
        if DECOUPLED:
            t_y = _load_at_label(teacher, row * stride_t * ALIGN, label, known)
            t = tl.where(at_label, -float("inf"), t)
        t_max = _load_row(rows, TEACHER_MAX, 0, row, K, N)
        t_log_sum = _load_row(rows, TEACHER_LOG_SUM, 0, row, K, N)
        below_t = t - t_max[:, None]
        p = tl.exp2(below_t * scale - t_log_sum[:, None])
    dt = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    tilt = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)  # what is to be multiplied by p
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
            below_s = x - largest[:, None]
            q = tl.exp2(below_s * scale - log_sum[:, None])
        if grad_kl is not None:
            g = tl.load(grad_kl + k * kl_stride_k + row * kl_stride_n).to(tl.float32) * of_kl
            kl = _load_row(rows, KL, k, row, K, N)
            ratio = (log_sum - t_log_sum) * LN2
            if REVERSE:  # T (log p - log q + KL), and T (log p - log q - KL)
                d = below_t - below_s + ((ratio + kl) * temperature)[:, None]
                ds += tl.where(q == 0, 0.0, (g * -by_temperature)[:, None] * (q * d))
                dt += g[:, None] * (p - q)
            else:
                d = below_t - below_s + ((ratio - kl) * temperature)[:, None]
                ds += g[:, None] * (q - p)
                tilt += g[:, None] * d
        if grad_target is not None:
            g = tl.load(grad_target + k * target_stride_k + row * target_stride_n).to(tl.float32) * of_target
            s_y = _load_at_label(students, offsets, label, known)
            z_s, z_t = _log_odds(s_y, largest, log_sum, scale), _log_odds(t_y, t_max, t_log_sum, scale)
            onehot = tl.where(at_label, 1.0, 0.0)
            # Scaled after the subtraction: a multiply-add rounds only one of two products, and equal odds would differ.
            further = (z_t - z_s) * LN2
            yes_s, yes_t, no_t = tl.sigmoid(z_s * LN2), tl.sigmoid(z_t * LN2), tl.sigmoid(z_t * -LN2)
            ds += (g * (yes_s - yes_t))[:, None] * (onehot - q)
            dt += (g * yes_t * no_t * further)[:, None] * (onehot - p)
        if grad_ce is not None:
            g = tl.load(grad_ce + k * ce_stride_k + row * ce_stride_n).to(tl.float32) * of_labelled
            g = tl.where(known, g, float("nan"))
            log_sum_1 = _load_row(rows, LOG_SUM_1, k, row, K, N)
            if POWER == 0 or (grad_kl is None and grad_target is None):
                largest_1 = _load_row(rows, MAX_1, k, row, K, N)
                of_ce = g[:, None] * tl.exp2((s - largest_1[:, None]) * LOG2E - log_sum_1[:, None])
            else:  # q^T is it but for a factor of the row
                of_ce = (g * tl.exp2(POWER * log_sum - log_sum_1))[:, None] * _power(q, POWER)
            if SMOOTH:
                of_ce -= (g * (smoothing / C))[:, None]
            of_ce = tl.where(at_label, of_ce - (g * (1 - smoothing))[:, None], of_ce)
            ds += tl.where(counted[:, None], of_ce, 0.0)
        if DECOUPLED:
            ds = tl.where(counted[:, None], ds, 0.0)
        if d_students is not None:
            start = (tl.cast(k, tl.int64) * N + row) * C
            tl.store(d_students + start[:, None] + columns, ds, mask=stored)
    if d_teacher is not None:
        if grad_kl is not None and not REVERSE:
            dt += tl.where(p == 0, 0.0, p * tilt * by_temperature)
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
    students, teacher, labels = _rows_contiguous(students), _rows_contiguous(teacher), _contiguous(labels)
    count, batch, classes = students.shape
    plan = _plan(*_places(students, teacher), temperature, form, label_smoothing > 0 and labels is not None)
    rows = students.new_empty(plan.planes * count * batch + mean, dtype=torch.float32)
    wanted = (labels is not None, form != "none", form == "decoupled")
    with on_device_of(students):
        (forward_tile if classes <= TILE else forward_loop)[plan.forward_grid](
            students,
            teacher,
            labels,
            rows,
            batch,
            *plan.strides,
            temperature,
            label_smoothing,
            ignore_index,
            **plan.forward,
        )
        if mean:
            losses = [rows.new_empty(count if there else 0) for there in wanted]
            given = [loss if there else None for loss, there in zip(losses, wanted, strict=True)]
            _launch_means(rows, labels, given, batch, ignore_index, plan)
        else:
            parts = zip((CE.value, KL.value, TARGET.value), wanted, strict=True)
            by_plane = rows.view(plan.planes, count, batch)
            losses = [by_plane[plane].clone() if there else rows.new_empty(0) for plane, there in parts]
    return *losses, rows


def _launch_means(rows, labels, losses, batch: int, ignore_index: int, plan: "_Plan") -> None:
    """One launch, or for more than a block two, in which the order of the sums does not change either."""
    constants = {"K": plan.mean_grid[0], "BLOCK": MEAN_BLOCK, "num_warps": 16}
    blocks = -(-batch // MEAN_BLOCK)
    values, counted, length = rows, labels, batch
    if blocks > 1:
        length = blocks
        values = rows.new_empty(plan.planes * plan.mean_grid[0] * blocks)
        counted = None if labels is None else labels.new_empty(blocks)
        sum_rows[(*plan.mean_grid, blocks)](rows, labels, values, counted, batch, ignore_index, **constants)
    mean_rows[plan.mean_grid](
        values, counted, rows, *losses, batch, length, int(blocks > 1), ignore_index, PLANES=plan.planes, **constants
    )


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
    students, teacher, labels = _rows_contiguous(students), _rows_contiguous(teacher), _contiguous(labels)
    plan = _plan(*_places(students, teacher), temperature, form, label_smoothing > 0 and labels is not None)
    d_students = students.new_empty(students.shape if for_students else 0)
    d_teacher = teacher.new_empty(teacher.shape) if for_teacher else students.new_empty(0)
    strides = list(plan.strides)
    for grad in (grad_ce, grad_kl, grad_target):
        strides += (0, 0) if grad is None else (*grad.stride(), 0)[:2]
    with on_device_of(students):
        gradients[plan.backward_grid](
            grad_ce,
            grad_kl,
            grad_target,
            students,
            teacher,
            labels,
            rows,
            d_students if for_students else None,
            d_teacher if for_teacher else None,
            students.shape[1],
            *strides,
            temperature,
            label_smoothing,
            ignore_index,
            **plan.backward,
            MEAN=mean,
        )
    return d_students, d_teacher


class _Plan(NamedTuple):
    """What launches need to know of the shapes, found once for each."""

    planes: int
    strides: tuple[int, ...]  # of students and teacher, in units of what they are all multiples of
    forward_grid: tuple[int, ...]
    mean_grid: tuple[int, ...]
    backward_grid: tuple[int, ...]
    forward: dict[str, int | bool]  # what the kernels are compiled for
    backward: dict[str, int | bool]


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    teacher_stride: int,
    temperature: float,
    form: str,
    smooth: bool,
) -> _Plan:
    count, batch, classes = shape
    planes = planes_of(form)
    # The stride of a dimension of one is anything. A row alone gets that of many, and so their machine code and bits.
    rows = (each if batch > 1 else classes for each in (strides[1], teacher_stride))
    strides = [strides[0] if count > 1 else 0, *rows]
    align = math.gcd(16, *strides)
    constants = {
        "K": count,
        "C": classes,
        "DECOUPLED": form == "decoupled",
        "REVERSE": form == "reverse",
        "SMOOTH": smooth,
        # With "decoupled" the two temperatures have different maxima.
        "POWER": int(temperature) if temperature in (1, 2, 4) and form != "decoupled" else 0,
        "ALIGN": align,
    }
    names = ("BLOCK_N", "BLOCK_C", "num_warps", "maxnreg")
    forward, backward = (dict(zip(names, f(classes), strict=True)) for f in (forward_shape, backward_shape))
    return _Plan(
        planes,
        tuple(stride // align for stride in strides),
        (-(-batch // forward["BLOCK_N"]),),
        (count, {"none": 1, "decoupled": 3}.get(form, 2)),
        (-(-batch // backward["BLOCK_N"]), -(-classes // backward["BLOCK_C"])),
        constants | forward,
        constants | backward | {"PLANES": planes},
    )


def _places(students: Tensor, teacher: Tensor | None) -> tuple[torch.Size, tuple[int, ...], int]:
    return students.shape, students.stride(), 0 if teacher is None else teacher.stride(0)


def planes_of(form: str) -> int:
    """How many planes [K, N] the forward pass keeps; after them, for a mean, stands how many rows count."""
    return 3 if form == "none" else 9 if form == "decoupled" else 8


def forward_shape(classes: int) -> tuple[int, int, int, int | None]:
    """(rows, classes, warps, registers a thread at most) of a program: few warps a row, as its sums have to meet.

    As measured on an H200 (benchmarks/NOTES.md), for C = 100, 1,000, 4,096 and 32,000.
    """
    if classes > TILE:
        return 1, LOOP_TILE, 2, 80
    block_c = triton.next_power_of_2(classes)
    block_n = max(1, min(32, 256 // block_c))
    return block_n, block_c, max(1, block_n * block_c // 1024), 128


def backward_shape(classes: int) -> tuple[int, int, int, int | None]:
    """The same for the backward pass, where the classes of a row need not meet: few elements a thread."""
    block_c = min(triton.next_power_of_2(classes), 512)
    return min(32, 512 // block_c), block_c, 4, None


def _rows_contiguous(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _contiguous(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.contiguous()
