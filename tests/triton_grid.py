"""The Triton kernels against float64 formulas: on the GPU where there is one, else in Triton's interpreter.

Not collected by name: tests/test_triton.py runs it, with TRITON_INTERPRET=1 where there is no GPU (a sample of
the grid then, as the interpreter is slow), and `make gpu-check` runs it on a GPU, the whole grid.
"""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from data.batch import Batch
from engine.objective import weighted_sum
from kernels import decoupled_kd_loss, gated_mix, kd_loss, kd_triton
from kernels import kd as kd_module
from kernels.gates import _mix, _mix_backward
from models import create_model
from models.pool import Pool
from objectives.gates import Gates
from objectives.gtn import GTN, GTNOptions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Rounding of the result's own type; losses are float32 whatever the logits are.
LOSS_LIMIT = 5e-6
LOSS_FLOOR = 4 * 2**-23  # absolute: a KL is a difference of logarithms, themselves of size 1 and more
GRADIENT_LIMIT = {F32: 3e-5, F16: 1e-3, BF16: 8e-3}
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def triton_and_poison():
    """Triton for every call; memory that a kernel leaves unwritten holds NaN."""
    assert kernels.use("triton", DEVICE) == "triton"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(*shape, dtype=F32, seed=0, sigma=3.0):
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * sigma
    return values.to(dtype).to(DEVICE).requires_grad_()


def labels_of(n, c, seed=0):
    return torch.randint(0, c, (n,), generator=generator(seed)).to(DEVICE)


def error(found, expected) -> float:
    """||found - expected|| / ||expected||, by elements that should be finite; infinite unless the others agree."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found[~finite].nan_to_num(9), expected[~finite].nan_to_num(9)):
        return math.inf
    size = expected[finite].norm().item()
    distance = (found - expected)[finite].norm().item()
    return distance if size == 0 else distance / size


def oracle(students, teacher, labels, form, T, smoothing=0.0, ignore=-100, reduction="mean"):
    """The losses by PyTorch's own functions and the papers' definitions, in float64."""
    K, n, _ = students.shape
    counted = torch.ones(n, dtype=torch.bool, device=students.device) if labels is None else labels != ignore
    losses = []
    if labels is not None:
        flat = students.flatten(0, 1)
        options = {"label_smoothing": smoothing, "ignore_index": ignore, "reduction": "none"}
        losses.append(F.cross_entropy(flat, labels.repeat(K), **options).view(K, n))
    t = teacher.expand(K, n, -1)
    if form == "decoupled":
        y = labels.where(counted, 0).expand(K, n)[..., None]
        p, q = (t / T).softmax(-1), (students / T).softmax(-1)
        p_y, q_y = p.gather(-1, y)[..., 0], q.gather(-1, y)[..., 0]
        target = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
        others = torch.ones_like(p).scatter(-1, y, 0.0).bool()
        p_hat, q_hat = (x[others].view(K, n, -1) / x[others].view(K, n, -1).sum(-1, keepdim=True) for x in (p, q))
        non_target = (p_hat * (p_hat / q_hat).log()).sum(-1)
        losses += [target.where(counted, 0.0), non_target.where(counted, 0.0)]
    else:
        log_p, log_q = (t / T).log_softmax(-1), (students / T).log_softmax(-1)
        first, second = (log_p, log_q) if form == "forward" else (log_q, log_p)
        losses.append(F.kl_div(second, first, reduction="none", log_target=True).sum(-1))
    if reduction == "none":
        return losses
    some = counted.sum().clamp(min=1)
    means = [row.sum(-1) / some for row in losses]
    if form != "decoupled":
        means[-1] = losses[-1].mean(-1)
    return means


def ours(students, teacher, labels, form, T, smoothing=0.0, ignore=-100, reduction="mean"):
    options = {"temperature": T, "label_smoothing": smoothing, "ignore_index": ignore, "reduction": reduction}
    if form == "decoupled":
        return list(decoupled_kd_loss(students, teacher, labels, **options))
    losses = kd_loss(students, teacher, labels, direction=form, **options)
    return [loss for loss in losses if loss is not None]


def compare(students, teacher, labels, form, T, limit=None, **options):
    """Losses and both gradients, for an upstream gradient of random numbers, against the oracle: within the limit,
    or within twice the error of the same formulas in float32 where the problem itself is that ill-conditioned."""

    def evaluate(function, dtype):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (students, teacher)]
        losses = function(*inputs, labels, form, T, **options)
        upstream = [torch.randn(loss.shape, generator=generator(9)).to(loss) for loss in losses]
        return losses, torch.autograd.grad(losses, inputs, upstream)

    (losses, gradients), exact, eager = evaluate(ours, None), evaluate(oracle, torch.float64), evaluate(oracle, F32)
    for a, b, c in zip(losses, exact[0], eager[0], strict=True):
        near = (a.double() - b).abs().max() < LOSS_FLOOR  # not so for infinite losses, which `error` compares
        assert a.dtype == F32 and (near or error(a, b) < max(LOSS_LIMIT, 2 * error(c.to(a.dtype), b)))
    for a, b, c, x in zip(gradients, exact[1], eager[1], (students, teacher), strict=True):
        assert a.dtype == x.dtype and error(a, b) < max(limit or GRADIENT_LIMIT[x.dtype], 2 * error(c.to(a.dtype), b))


@settings(max_examples=60 if GPU else 15, deadline=None, derandomize=True)
@given(
    K=st.integers(1, 4),
    n=st.integers(1, 70 if GPU else 6),
    c=st.integers(2, 6000 if GPU else 150),
    form=st.sampled_from(["forward", "reverse", "decoupled"]),
    T=st.floats(0.3, 30),
)
def test_any_shape_and_temperature(K, n, c, form, T):
    compare(logits(K, n, c, seed=c), logits(n, c, seed=1000 + n), labels_of(n, c, K), form, T)


@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_a_single_class_has_no_loss(form):
    ce, kl = kd_loss(logits(1, 1, 1), logits(1, 1), labels_of(1, 1), direction=form)
    assert ce.item() == kl.item() == 0


@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled"])
@pytest.mark.parametrize("sigma", [1e-1, 1e-2, 1e-3])
def test_small_divergences_keep_their_digits(form, sigma):
    """KL from 5e-3 down to 5e-7 between distributions with logits of size 8: terms of size 1 cancel."""
    teacher = logits(4, 300, sigma=8.0)
    students = (teacher + logits(2, 4, 300, seed=1, sigma=sigma)).detach().requires_grad_()
    wide = students.detach().double(), teacher.detach().double()
    found, exact = ours(students, teacher, labels_of(4, 300), form, 4.0), oracle(*wide, labels_of(4, 300), form, 4.0)
    for a, b in zip(found, exact, strict=True):
        assert error(a, b) < 1e-5 / sigma


@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(3, 7), (2, 1000), (1, 5001)])
def test_identical_distributions_have_exactly_no_divergence_and_no_gradient(form, dtype, shape):
    teacher = logits(*shape, dtype=dtype, sigma=8.0)
    students = teacher.detach().clone()[None].repeat(2, 1, 1).requires_grad_()
    divergences = ours(students, teacher, labels_of(*shape), form, 3.0)[1:]
    for gradient in torch.autograd.grad(sum(d.sum() for d in divergences), [students, teacher]):
        assert not gradient.any()
    assert all(not divergence.any() for divergence in divergences)


@pytest.mark.parametrize("form", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_huge_logits(form, dtype):
    students, teacher = logits(2, 4, 50, dtype=dtype, sigma=1e4), logits(4, 50, dtype=dtype, seed=1, sigma=1e4)
    # sigma / T is 2500: nearly every probability is 0 or 1, and sums of a few exact numbers remain
    compare(students, teacher, labels_of(4, 50), form, 4.0, limit=1e-2)


@pytest.mark.parametrize("c", [50, 5001])
def test_a_class_that_is_masked_out_everywhere_is_as_if_it_were_not_there(c):
    students, teacher, labels = logits(2, 3, c), logits(3, c, seed=1), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    keep = torch.arange(c, device=DEVICE) % 5 != 1
    masked = [x.detach().masked_fill(~keep, -math.inf).requires_grad_() for x in (students, teacher)]
    fewer = [x.detach()[..., keep].contiguous().requires_grad_() for x in (students, teacher)]
    for form in ("forward", "reverse"):
        found, expected = ours(*masked, labels, form, 2.0), ours(*fewer, labels, form, 2.0)
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) < 1e-6
        gradients = torch.autograd.grad(sum(x.sum() for x in found), masked)
        for a, b in zip(gradients, torch.autograd.grad(sum(x.sum() for x in expected), fewer), strict=True):
            assert error(a[..., keep], b) < 1e-6 and not a[..., ~keep].any()


def test_a_teacher_that_excludes_a_class_pushes_the_student_off_it():
    students, teacher = logits(2, 3, 20), logits(3, 20, seed=1)
    teacher = teacher.detach().index_fill(1, torch.tensor([4], device=DEVICE), -math.inf).requires_grad_()
    _, kl = kd_loss(students, teacher)
    p, q = teacher.double().softmax(-1), students.double().softmax(-1)
    expected = torch.special.xlogy(p, p) - p * q.log()
    assert error(kl, expected.sum(-1).mean(-1)) < LOSS_LIMIT
    ds, dt = torch.autograd.grad(kl.sum(), [students, teacher])
    assert error(ds, (q - p) / 3) < 1e-5 and dt.isfinite().all() and not dt[:, 4].any()


@pytest.mark.parametrize("c", [50, 5001])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_a_number_stays_alone(c, bad):
    students, teacher = logits(1, 4, c), logits(4, c, seed=1)
    spoilt = students.detach().clone()
    spoilt[0, 2, 3] = bad
    spoilt.requires_grad_()
    ce, kl = kd_loss(spoilt, teacher, labels_of(4, c), temperature=2.0, reduction="none")
    clean = kd_loss(students, teacher, labels_of(4, c), temperature=2.0, reduction="none")
    (gradient,) = torch.autograd.grad(kl.sum() + ce.sum(), spoilt)
    rest = [0, 1, 3]
    assert ce[0, 2].isnan() and kl[0, 2].isnan() and gradient[0, 2].isnan().any()
    assert torch.equal(ce[:, rest], clean[0][:, rest]) and torch.equal(kl[:, rest], clean[1][:, rest])
    assert gradient[:, rest].isfinite().all()


@pytest.mark.parametrize("c", [10, 5001])
@pytest.mark.parametrize(("form", "T"), [("forward", 0.5), ("reverse", 0.5), ("forward", 1.0)])
def test_classes_masked_out_by_the_lowest_number(form, T, c):
    """A row of nothing else is uniform, and finfo.min / T, which overflows for T < 1, is never formed."""
    low = torch.finfo(F32).min
    students, teacher = logits(2, 4, c).detach(), logits(4, c, seed=1).detach()
    teacher[1], students[:, 1, 2:] = low, low if form == "reverse" else 0.0
    students[0, 2], teacher[3, 3], students[:, 3, 3] = low, low, low
    if form == "forward":
        teacher[0, 4] = teacher[0].max() - 2  # a divergence of 1e35 and more: the student alone masks it out
        students[1, 0, 4] = low
    losses = ours(students, teacher, labels_of(4, c), form, T)
    assert all(loss.isfinite().all() for loss in losses)
    compare(students.requires_grad_(), teacher.requires_grad_(), labels_of(4, c), form, T)


@pytest.mark.parametrize("c", [10, 9000])
def test_a_rows_bits_are_its_own(c):
    """Rows far from their teacher and near it, which are summed in another way, in one program or in several."""
    students, teacher = logits(1, 3, c, sigma=1.0).detach(), logits(3, c, seed=1, sigma=1.0).detach()
    students[0, 1] = teacher[1] + 1e-3 * students[0, 1]
    _, together = kd_loss(students, teacher, reduction="none")
    # Clones, since a GPU loads rows that lie elsewhere in other pieces, which it sums in another order.
    rows = [(students[:, n : n + 1].clone(), teacher[n : n + 1].clone()) for n in range(3)]
    alone = [kd_loss(*row, reduction="none")[1] for row in rows]
    assert torch.equal(together, torch.cat(alone, 1)) and together[0, 1] < 1e-5 < together[0, 0]


@pytest.mark.parametrize("c", [1000, 9000])
@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_a_divergence_keeps_its_digits_on_either_side_of_the_switch(form, c):
    """KL from 0.01 to 1, with logits of size 8: below a bound the rows are summed by terms that do not cancel."""
    n = 12 if c == 1000 else 4
    teacher = logits(n, c, sigma=8.0, seed=1)
    noise = torch.linspace(0.15, 2.5, n, device=DEVICE)[:, None] * logits(n, c, sigma=1.0, seed=2)
    students = (teacher + 20 + noise).detach()[None].requires_grad_()
    (found,) = ours(students, teacher, None, form, 1.0, reduction="none")
    (exact,) = oracle(students.double(), teacher.double(), None, form, 1.0, reduction="none")
    assert exact.min() < 0.05 and exact.max() > 0.5
    assert ((found.double() - exact).abs() / exact).max() < LOSS_LIMIT


@pytest.mark.parametrize("c", [9, 5001])
def test_labels_that_are_no_class_show_and_ignored_ones_do_not(c):
    students, teacher, labels = logits(2, 3, c), logits(3, c, seed=1), labels_of(3, c)
    for wrong in (-1, c):
        labels[1] = wrong
        ce, kl = kd_loss(students, teacher, labels, reduction="none")
        assert ce.isnan().tolist() == [[False, True, False]] * 2 and kl.isfinite().all()
        (gradient,) = torch.autograd.grad(ce.sum(), students)
        assert gradient[:, 1].isnan().all() and gradient[:, [0, 2]].isfinite().all()
        ce, _ = kd_loss(students, teacher, labels, ignore_index=wrong)
        assert torch.autograd.grad(ce.sum(), students)[0][:, 1].eq(0).all()
    ce, kl = kd_loss(students, teacher, torch.full_like(labels, -100))
    assert ce.tolist() == [0, 0] and kl.isfinite().all()
    assert not torch.autograd.grad(ce.sum(), students)[0].any()


def test_strided_logits():
    base = logits(100, 5, 3).detach()
    students = base.permute(2, 1, 0)  # the classes are not adjacent in memory
    padded = logits(2, 5, 131, seed=2).detach()[..., :100]  # rows do not begin at multiples of their length
    expanded = logits(5, 100, seed=3).detach().expand(2, 5, 100)  # one student twice, in the same memory
    every_other = logits(3, 10, 100, seed=4).detach()[:, ::2]
    teachers = [logits(5, 100, seed=1).detach(), logits(100, 5, seed=5).detach().T, logits(5, 107).detach()[:, 7:]]
    for s, t in itertools.product((students, padded, expanded, every_other), teachers):
        compare(s.requires_grad_(), t.requires_grad_(), labels_of(5, 100), "forward", 4.0)


@pytest.mark.parametrize(("n", "c"), [(3, 7), (3, 9), (3, 1271), (2, 4097), (1, 32001)])
@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled"] if GPU else ["decoupled"])
def test_rows_that_begin_anywhere(form, n, c):
    """Rows begin where no wide load could, in the middle of what is not a number and must not be read."""
    around = torch.full((3 * n * c + 16,), math.nan, dtype=BF16, device=DEVICE)
    students, teacher = around[: 2 * n * c].view(2, n, c), around[2 * n * c + 9 : 3 * n * c + 9].view(n, c)
    students.copy_(logits(2, n, c, seed=c).detach()), teacher.copy_(logits(n, c, seed=1).detach())
    compare(students, teacher, labels_of(n, c), form, 4.0, smoothing=0.1)


@pytest.mark.parametrize("form", ["forward", "decoupled", "none"])
def test_means_over_several_blocks(form, monkeypatch):
    """Eleven blocks of sums, which are themselves more than a block; some rows do not count."""
    monkeypatch.setattr(kd_triton, "MEAN_BLOCK", 4)
    students, teacher, labels = logits(2, 41, 6), logits(41, 6, seed=1), labels_of(41, 6)
    if form != "none":
        compare(students, teacher, labels, form, 2.0, ignore=3)
        compare(students, teacher, labels.fill_(3), form, 2.0, ignore=3)
        if form == "forward":
            compare(students, teacher, None, form, 2.0)
    else:
        assert error(kernels.cross_entropy(teacher, labels), F.cross_entropy(teacher.double(), labels)) < LOSS_LIMIT


def test_students_and_teacher_may_differ_in_type():
    compare(logits(2, 5, 30, dtype=F16), logits(5, 30, seed=1), labels_of(5, 30), "forward", 2.0)
    compare(logits(2, 5, 30), logits(5, 30, dtype=BF16, seed=1), labels_of(5, 30), "reverse", 2.0)


def test_gradients_scaled_for_half_precision_are_scaled_before_they_are_rounded():
    students, teacher = logits(1, 64, 100, dtype=F16), logits(64, 100, seed=1, dtype=F16)
    _, kl = kd_loss(students, teacher, temperature=4.0)
    (scaled,) = torch.autograd.grad(kl.sum() * 2.0**10, students)
    exact = ((students.double() / 4).softmax(-1) - (teacher.double() / 4).softmax(-1)) / (4 * 64)
    assert error(scaled.double() / 2.0**10, exact) < 4e-4


@pytest.mark.parametrize("c", [30, 5001])
def test_without_labels_there_is_only_the_divergence(c):
    compare(logits(2, 3, c), logits(3, c, seed=1), None, "forward", 4.0, smoothing=0.1)
    compare(logits(2, 3, c), logits(3, c, seed=1), None, "reverse", 3.0, reduction="none")


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_that_is_not_used_has_no_part_in_the_gradient(used):
    students, teacher, labels = logits(2, 5, 30), logits(5, 30, seed=1), labels_of(5, 30)
    wide = [x.detach().double().requires_grad_() for x in (students, teacher)]
    found = ours(students, teacher, labels, "forward", 4.0)[used].sum()
    expected = oracle(*wide, labels, "forward", 4.0)[used].sum()
    ds, dt = torch.autograd.grad(found, [students, teacher])
    exact = torch.autograd.grad(expected, wide, allow_unused=True, materialize_grads=True)
    assert error(ds, exact[0]) < 1e-5 and error(dt, exact[1]) < 1e-5


def test_a_teacher_without_gradient_gets_none():
    students, teacher = logits(2, 5, 30), logits(5, 30, seed=1).detach()
    (_, kl), ds = (out := kd_loss(students, teacher, labels_of(5, 30))), torch.autograd.grad(sum(out).sum(), students)
    assert ds[0].isfinite().all() and not teacher.requires_grad and kl.requires_grad


def test_cross_entropy_alone():
    for c in (30, 5001):
        x, y = logits(6, c), labels_of(6, c)
        wide = x.detach().double().requires_grad_()
        found = kernels.cross_entropy(x, y, label_smoothing=0.1)
        expected = F.cross_entropy(wide, y, label_smoothing=0.1)
        assert error(found, expected) < LOSS_LIMIT
        assert error(*(torch.autograd.grad(z, w)[0] for z, w in ((found, x), (expected, wide)))) < 1e-5


def test_losses_behind_classifiers_are_those_of_the_logits():
    embedding, weight, labels = logits(7, 5), logits(30, 5, seed=1), labels_of(7, 30)
    teacher = logits(7, 30, seed=2).detach()
    identity = torch.eye(30, device=DEVICE)
    options = {"temperature": 4.0, "direction": "reverse"}
    ce, kl = kernels.linear_kd_loss(embedding, weight, None, teacher, identity, None, labels, rows=3, **options)
    expected = kd_loss(embedding @ weight.T, teacher, labels, **options)
    assert error(ce, expected[0][0]) < 1e-5 and error(kl, expected[1][0]) < 1e-5
    grads = (torch.autograd.grad(a + b, (embedding, weight)) for a, b in ((ce, kl), (expected[0][0], expected[1][0])))
    assert all(error(*pair) < 1e-5 for pair in zip(*grads, strict=True))


def test_invariants():
    students, teacher, labels = logits(3, 6, 40), logits(6, 40, seed=1), labels_of(6, 40)
    (ce, kl), (first, second) = kd_loss(students, teacher, labels), kd_loss(students[:1], teacher, labels)
    assert torch.equal(ce[:1], first) and torch.equal(kl[:1], second) and (kl > 0).all()
    ds, dt = torch.autograd.grad(ce.sum() + kl.sum(), [students, teacher])
    assert ds.sum(-1).abs().max() < 1e-6 and dt.sum(-1).abs().max() < 1e-6
    again = torch.autograd.grad(sum(x.sum() for x in kd_loss(students, teacher, labels)), [students, teacher])
    assert torch.equal(ds, again[0]) and torch.equal(dt, again[1])  # the same bits every time


# The gated mix.

MIXES = list(
    itertools.product(
        [(1, 1, 1, 1), (3, 7, 9, 11), (2, 64, 8, 8), (5, 3)] + ([(128, 64, 32, 32)] if GPU else []),
        [False, True],  # soft
        [False, True],  # relu
        [False, True],  # shortcut
        [None, 2],  # which output is zero
        [F32, F16, BF16],
        [False, True],  # channels_last
    )
)


def explicit_mix(outputs, gates, shortcut, relu):
    total = sum(g * o for g, o in zip(gates, outputs, strict=True) if o is not None)
    total = total if shortcut is None else total + shortcut
    return total.relu() if relu else total


@pytest.mark.parametrize(("shape", "soft", "relu", "with_shortcut", "zero", "dtype", "last"), MIXES)
def test_mix_and_all_its_gradients(shape, soft, relu, with_shortcut, zero, dtype, last):
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format

    def tensor(seed):
        return logits(*shape, dtype=dtype, seed=seed).detach().contiguous(memory_format=layout).requires_grad_()

    outputs = [None if j == zero else tensor(j) for j in range(4)]
    shortcut, active = tensor(9) if with_shortcut else None, None if soft else 1
    gates = torch.randn(4, generator=generator(5)) if soft else torch.eye(4)[1]
    gates = gates.to(DEVICE).requires_grad_()
    leaves = [gates, *(o for j, o in enumerate(outputs) if o is not None and (soft or j == 1))]
    leaves += [shortcut] if with_shortcut else []
    y = gated_mix(outputs, gates, active, shortcut, relu)
    wide = {id(x): x.detach().double().requires_grad_() for x in (*outputs, shortcut, gates) if x is not None}
    exact = explicit_mix(
        [None if o is None else wide[id(o)] for o in outputs], wide[id(gates)], wide.get(id(shortcut)), relu
    )
    limit = {F32: 1e-6, F16: 1e-3, BF16: 8e-3}[dtype]
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout) and error(y, exact) < limit
    upstream = tensor(7).detach()
    found = torch.autograd.grad(y, leaves, upstream)
    expected = torch.autograd.grad(exact, [wide[id(x)] for x in leaves], upstream.double())
    for a, b, x in zip(found, expected, leaves, strict=True):
        assert a.dtype == x.dtype and error(a, b) < limit


def test_mix_of_mixed_layouts_and_types():
    a = logits(2, 3, 4, 5, dtype=F16).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    b, s = logits(2, 3, 4, 5, dtype=F16, seed=1), logits(2, 3, 4, 5, seed=2)
    gates = torch.tensor([0.0, 1.0], device=DEVICE, requires_grad=True)
    y = gated_mix([a, b], gates, 1, s, relu=True)
    assert y.dtype == F32 and torch.equal(y, (b.float() + s).clamp(min=0))
    dg, db, ds = torch.autograd.grad(y, [gates, b, s], torch.ones_like(y))
    mask = (y > 0).double()
    assert db.dtype == F16 and ds.dtype == F32 and torch.equal(ds.double(), mask)
    assert error(dg, torch.stack([(mask * x.double()).sum() for x in (a, b)])) < 1e-6


def test_soft_gates_need_not_lie_next_to_each_other():
    outputs = [logits(2, 3, seed=seed).detach() for seed in range(3)]
    every_other = torch.tensor([0.3, 9.0, 0.7, 9.0, -0.2], device=DEVICE)[::2]
    for gates in (every_other, torch.tensor(0.5, device=DEVICE).expand(3)):
        y = gated_mix([x.requires_grad_() for x in outputs], gates)
        assert error(y, explicit_mix(outputs, gates, None, False)) < 1e-6
        slopes = torch.autograd.grad(y.sum(), outputs)
        assert [slope.unique().item() for slope in slopes] == gates.tolist()


def test_mix_shows_what_is_not_a_number():
    x = torch.tensor([1.0, math.nan, -1.0], device=DEVICE, requires_grad=True)
    y = gated_mix([x], torch.ones(1, device=DEVICE), 0, torch.zeros(3, device=DEVICE), relu=True)
    assert y.isnan().tolist() == [False, True, False]


def test_dots_of_half_precision_do_not_overflow():
    x = torch.full((1 << 16,), 4.0, dtype=F16, device=DEVICE, requires_grad=True)
    gates = torch.ones(1, device=DEVICE, requires_grad=True)
    gated_mix([x], gates, 0).backward(torch.full_like(x, 4.0))
    assert gates.grad.item() == 16 * (1 << 16)


# As PyTorch sees them.


@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled", "none"])
@pytest.mark.parametrize("mean", [True, False])
def test_operators_keep_the_rules_of_custom_operators(form, mean):
    students, teacher, labels = logits(2, 3, 7), None if form == "none" else logits(3, 7, seed=1), labels_of(3, 7)
    arguments = (students, teacher, labels, 2.0, form, 0.1, -100, mean)
    torch.library.opcheck(kd_module._forward, arguments)
    ce, kl, target, rows = kd_module._forward(*(x.detach() if torch.is_tensor(x) else x for x in arguments))
    grads = [torch.ones_like(x) if x.numel() else None for x in (ce, kl, target)]
    tensors = [x if x is None else x.detach() for x in (students, teacher, labels)]
    torch.library.opcheck(kd_module._backward, (*grads, *tensors, rows, *arguments[3:], True, teacher is not None))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_mix_operators_keep_the_rules_of_custom_operators(soft, relu):
    a, b, s = (logits(2, 3, 4, 4, seed=seed).detach() for seed in range(3))
    gates = torch.tensor([0.3, 0.7, 0.1], device=DEVICE) if soft else None
    torch.library.opcheck(_mix, ([a, None, b] if soft else [a], gates, s, relu))
    torch.library.opcheck(_mix_backward, (s, [a, None, b], gates, b if relu else None, True, relu, [soft] * 3))


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if GPU else [])])
def test_compiles_without_a_break(backend):
    def step(students, teacher, labels, outputs, gates, shortcut):
        ce, kl = kd_loss(students, teacher, labels, temperature=4.0)
        parts = decoupled_kd_loss(students, teacher, labels, temperature=4.0)
        mixed = gated_mix(outputs, gates, 0, shortcut, relu=True) + gated_mix(outputs, gates, None, shortcut)
        return ce.sum() + 16 * kl.sum() + parts.target.sum() + 8 * parts.non_target.sum() + mixed.square().mean()

    students, teacher, labels = logits(2, 5, 30), logits(5, 30, seed=1), labels_of(5, 30)
    outputs, shortcut = [logits(2, 3, 4, 4, seed=2), logits(2, 3, 4, 4, seed=3)], logits(2, 3, 4, 4, seed=4)
    gates = torch.tensor([1.0, 0.0], device=DEVICE, requires_grad=True)
    leaves = [students, teacher, *outputs, gates, shortcut]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    arguments = (students, teacher, labels, outputs, gates, shortcut)
    plain, fast = step(*arguments), compiled(*arguments)
    assert error(fast, plain) < 1e-6
    for a, b in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert error(a, b) < 1e-5


def test_autocast_leaves_the_losses_in_float32():
    linear = torch.nn.Linear(8, 5).to(DEVICE)
    with torch.autocast(DEVICE, dtype=BF16):
        out = linear(torch.ones(4, 8, device=DEVICE))
        ce, kl = kd_loss(out, out.detach() + 1, labels_of(4, 5))
    assert out.dtype == BF16 and ce.dtype == kl.dtype == F32
    (ce.sum() + kl.sum()).backward()
    assert linear.weight.grad.dtype == F32 and linear.weight.grad.isfinite().all()


class Options(GTNOptions):
    seed = 0


def test_a_training_step_has_the_same_losses_and_gradients_with_either_implementation():
    pool = Pool(stem=4, head=8, widths=[4, 4, 4, 8, 8, 8], candidates=["res3x2", "identity", "zero"])
    torch.manual_seed(0)
    objective = GTN(create_model("resnet8", 10), Options(pool=pool), 16).to(DEVICE)
    batch = Batch(torch.randn(6, 3, 16, 16, generator=generator()).to(DEVICE), labels_of(6, 10))
    for iteration in range(4):
        results = []
        for choice in ("triton", "reference"):
            kernels.use(choice, DEVICE)
            objective.zero_grad()
            terms, phase = objective(batch, iteration), objective.phase(iteration)
            weighted_sum(objective, terms).backward(inputs=phase.grad_inputs() if phase else None)
            wanted = phase.grad_inputs() if phase else [p for p in objective.parameters() if p.grad is not None]
            results.append(({name: term.item() for name, term in terms.items()}, [p.grad.clone() for p in wanted]))
            phase.after_update() if phase else objective.after_step()
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        fused, plain = (torch.cat([gradient.flatten() for gradient in gradients]) for _, gradients in results)
        assert error(fused, plain) < 1e-5


# What only a GPU can show.


@on_gpu
@pytest.mark.parametrize("c", [100, 32000])
def test_nothing_waits_for_the_device(c):
    students, teacher, labels = logits(3, 64, c), logits(64, c, seed=1), labels_of(64, c)
    outputs, gates = [logits(8, 4, 4, 4), logits(8, 4, 4, 4, seed=1)], torch.eye(2, device=DEVICE)[0].requires_grad_()

    def step():
        losses = [*kd_loss(students, teacher, labels), *decoupled_kd_loss(students, teacher, labels)]
        y = gated_mix(outputs, gates, 0, outputs[1], relu=True)
        torch.autograd.grad(sum(x.sum() for x in losses) + y.sum(), [students, teacher, gates])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_cuda_graph_replays_both_passes():
    students, teacher, labels = logits(3, 64, 100, dtype=F16), logits(64, 100, dtype=F16, seed=1), labels_of(64, 100)

    def step():
        ce, kl = kd_loss(students, teacher, labels, temperature=4.0)
        return ce, kl, *torch.autograd.grad(ce.sum() + kl.sum(), [students, teacher])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        students.copy_(logits(3, 64, 100, dtype=F16, seed=7))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@on_gpu
def test_launches_and_memory():
    students, teacher, labels = logits(3, 128, 32000, dtype=F16), logits(128, 32000, dtype=F16), labels_of(128, 32000)

    def fused():
        return torch.autograd.grad(sum(kd_loss(students, teacher, labels)), [students, teacher], torch.ones(3).cuda())

    def eager():
        log_p, log_q = (teacher.float() / 4).log_softmax(-1), (students.float() / 4).log_softmax(-1)
        kl = F.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True).sum((1, 2)) / 128
        ce = F.cross_entropy(students.float().flatten(0, 1), labels.repeat(3))
        return torch.autograd.grad(kl.sum() + ce, [students, teacher])

    def peak(function):
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    assert peak(fused) <= peak(eager) / 2
    upstream = torch.ones(3, device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(kd_loss(students, teacher, labels), [students, teacher], [upstream, upstream])
        torch.cuda.synchronize()
    launched = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) <= 4, [event.name for event in launched]


@on_gpu
def test_a_whole_gate_update_is_a_few_copies_and_one_wait():
    """Sampling, the gradient of all gates and the rescaling, for 18 layers of 12 candidates."""
    gates = Gates([12] * 18)
    optimizer = torch.optim.Adam([gates.phi], lr=1e-3, betas=(0.0, 0.999))
    like = torch.empty(0, device=DEVICE)

    def update(seed):
        draws = gates.draw_gate_step(generator(seed), like)
        torch.stack([draw.gates.sum() for draw in draws]).sum().backward()  # what the layers would do
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gates.set_gradient(lambda gradient: gradient)
            optimizer.step()
            gates.finish_update()
            gates.draw_gate_step(generator(seed), like)
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    update(0)
    launched = update(1)
    assert len(launched) <= 10 and sum("DtoH" in name for name in launched) == 1, launched


# Last, since on a GPU it is thousands of cases, which a short time there may not be enough for.
SHAPES = [(1, 1, 2), (1, 3, 7), (3, 5, 100), (2, 41 if GPU else 13, 1271), (1, 64, 10), (1, 2, 5001)]
GRID = list(
    itertools.product(
        SHAPES + ([(3, 8, 32000), (1, 3, 128256), (3, 256, 1000)] if GPU else []),
        ["forward", "reverse", "decoupled"],
        [0.5, 1.0, 2.0, 4.0, 20.0],
        [F32, F16, BF16],
        [0.0, 0.1],
        [-100, 2],
        ["mean", "none"],
    )
)


@pytest.mark.parametrize(
    ("shape", "form", "T", "dtype", "smoothing", "ignore", "reduction"),
    GRID if GPU else random.Random(0).sample(GRID, 100),
)
def test_losses_and_gradients(shape, form, T, dtype, smoothing, ignore, reduction):
    K, n, c = shape
    students, teacher = logits(K, n, c, dtype=dtype), logits(n, c, dtype=dtype, seed=1)
    compare(students, teacher, labels_of(n, c), form, T, smoothing=smoothing, ignore=ignore, reduction=reduction)
