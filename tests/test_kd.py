"""kd_loss and cross_entropy against their formulas in float64, and what they imply."""

import itertools
import math

import numpy as np
import pytest
import torch

import kernels
from kernels import cross_entropy, decoupled_kd_loss, dispatch, kd, kd_loss
from tests.triton_grid import oracle, ours


def formulas(students, teacher, labels, temperature, direction):
    """(ce [K], kl [K], d(sum ce + 2 sum kl)/d students, .../d teacher) by the closed forms, in float64."""
    s, t = students.astype(np.float64), teacher.astype(np.float64)
    count = t.shape[0]

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q, q1 = softmax(t / temperature), softmax(s / temperature), softmax(s)
    onehot = np.eye(t.shape[1])[labels]
    ce = -(onehot * np.log(q1)).sum(-1).mean(-1)
    if direction == "forward":
        rows = (p * np.log(p / q)).sum(-1)
        ds, dt = q - p, p * (np.log(p / q) - rows[..., None])
    else:
        rows = (q * np.log(q / p)).sum(-1)
        ds, dt = q * (np.log(q / p) - rows[..., None]), p - q
    scale = 1 / (temperature * count)
    return ce, rows.mean(-1), (q1 - onehot) / count + 2 * scale * ds, 2 * scale * dt.sum(0)


def logits(k, n, c, dtype=torch.float64):
    source = torch.Generator().manual_seed(k * 1000 + n * 10 + c)
    students = torch.randn(k, n, c, generator=source, dtype=torch.float64).mul(3).to(dtype)
    teacher = torch.randn(n, c, generator=source, dtype=torch.float64).mul(3).to(dtype)
    return students.requires_grad_(), teacher.requires_grad_(), torch.randint(0, c, (n,), generator=source)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 7, 10), (3, 5, 100), (4, 3, 41)])
def test_values_and_gradients_of_both_sides(shape, temperature, direction):
    students, teacher, labels = logits(*shape)
    ce, kl = kd_loss(students, teacher, labels, temperature=temperature, direction=direction)
    found = torch.autograd.grad(ce.sum() + 2 * kl.sum(), [students, teacher])
    expected = formulas(students.detach().numpy(), teacher.detach().numpy(), labels.numpy(), temperature, direction)
    for value, wanted in zip((ce, kl, *found), expected, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_low_precision_logits_are_computed_in_float32(dtype, rtol):
    students, teacher, labels = logits(3, 16, 100, dtype)
    ce, kl = kd_loss(students, teacher, labels, temperature=4.0)
    found = torch.autograd.grad(ce.sum() + 2 * kl.sum(), [students, teacher])
    rounded = (students.detach().double().numpy(), teacher.detach().double().numpy())
    expected = formulas(*rounded, labels.numpy(), 4.0, "forward")
    assert ce.dtype == kl.dtype == torch.float32 and found[0].dtype == dtype
    np.testing.assert_allclose(ce.detach().numpy(), expected[0], rtol=2e-6)
    np.testing.assert_allclose(kl.detach().numpy(), expected[1], rtol=2e-6)
    for gradient, wanted in zip(found, expected[2:], strict=True):
        error = np.abs(gradient.double().numpy() - wanted).max() / np.abs(wanted).max()
        assert error < rtol


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck(direction):
    students, teacher, labels = logits(2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda s, t: kd_loss(s, t, labels, temperature=2.0, direction=direction), (students, teacher)
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_identical_distributions_have_no_divergence_and_no_gradient(direction):
    _, teacher, _ = logits(1, 6, 10, torch.float32)
    student = teacher.detach().clone().requires_grad_()
    _, kl = kd_loss(student, teacher, direction=direction, temperature=4.0)
    gradients = torch.autograd.grad(kl.sum(), [student, teacher])
    assert kl.item() == 0
    assert max(gradient.abs().max() for gradient in gradients) < 1e-8


def test_adding_a_constant_to_logits_changes_nothing():
    students, teacher, labels = logits(3, 6, 10)
    shifted = kd_loss(students + 7, teacher - 3, labels, temperature=4.0)
    for a, b in zip(shifted, kd_loss(students, teacher, labels, temperature=4.0), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_single_student_is_one_branch_and_labels_are_optional():
    students, teacher, labels = logits(1, 6, 10)
    for a, b in zip(kd_loss(students[0], teacher, labels), kd_loss(students, teacher, labels), strict=True):
        assert torch.equal(a, b)
    assert kd_loss(students, teacher)[0] is None


def test_huge_logits_stay_finite():
    students, teacher, labels = (x * 1e4 if x.is_floating_point() else x for x in logits(2, 4, 10, torch.float32))
    ce, kl = kd_loss(students, teacher, labels)
    assert torch.isfinite(ce).all() and torch.isfinite(kl).all()


def test_cross_entropy_is_the_mean_negative_log_likelihood():
    students, _, labels = logits(1, 9, 10)
    rows = [
        math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(students[0].tolist(), labels, strict=True)
    ]
    assert cross_entropy(students[0], labels).item() == pytest.approx(sum(rows) / 9, rel=1e-12)


GOOD = {"students": torch.zeros(2, 3, 4), "teacher": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"direction": "sideways"}, "direction"),
        ({"teacher": torch.zeros(3, 5)}, "teacher"),
        ({"students": torch.zeros(3)}, "students"),
        ({"students": torch.zeros(0, 3, 4)}, "students"),
        ({"students": torch.zeros(2, 3, 4, dtype=torch.int64)}, "floating"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(3)}, "labels"),
        ({"teacher": torch.zeros(3, 4, device="meta")}, "meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(wrong, named):
    arguments = GOOD | wrong
    tensors = [arguments.pop(name) for name in ("students", "teacher", "labels")]
    with pytest.raises(ValueError, match=named):
        kd_loss(*tensors, **arguments)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_precision_in_both_directions(count, dtype, rtol, temperature, direction):
    students, teacher, labels = logits(count, 8, 10, dtype)
    ce, kl = kd_loss(students, teacher, labels, temperature=temperature, direction=direction)
    found = torch.autograd.grad(ce.sum() + 2 * kl.sum(), [students, teacher])
    rounded = (students.detach().double().numpy(), teacher.detach().double().numpy())
    expected = formulas(*rounded, labels.numpy(), temperature, direction)
    for value, wanted in zip((ce, kl), expected, strict=False):
        assert value.dtype == torch.float32 and value.shape == (count,)
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-5)
    for gradient, wanted in zip(found, expected[2:], strict=True):
        assert gradient.dtype == dtype
        assert np.abs(gradient.double().numpy() - wanted).max() <= rtol * np.abs(wanted).max()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_is_never_negative_and_positive_where_distributions_differ(direction):
    source = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0, 10.0):
        teacher = torch.randn(4, 10, generator=source, dtype=torch.float64)
        students = teacher + scale * torch.randn(50, 4, 10, generator=source, dtype=torch.float64)
        assert (kd_loss(students, teacher, direction=direction)[1] > 0).all()


def test_the_divergence_of_a_worked_example():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log(4 / 3) / 2, KL(q || p) = 3/4 log 3 - log 2."""
    student, teacher = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert kd_loss(student, teacher, direction="forward")[1].item() == pytest.approx(math.log(4 / 3) / 2)
    assert kd_loss(student, teacher, direction="reverse")[1].item() == pytest.approx(0.75 * math.log(3) - math.log(2))


def test_temperature_leaves_the_cross_entropy_alone():
    students, teacher, labels = logits(3, 6, 10)
    (cold, _), (hot, _) = (kd_loss(students, teacher, labels, temperature=t) for t in (1.0, 8.0))
    assert torch.equal(cold, hot)


def test_a_constant_added_to_the_logits_leaves_the_gradients_alone():
    students, teacher, labels = logits(3, 6, 10)
    plain, shifted = (
        torch.autograd.grad(
            sum(term.sum() for term in kd_loss(students + c, teacher - c, labels, temperature=2.0)),
            [students, teacher],
        )
        for c in (0.0, 5.0)
    )
    for a, b in zip(plain, shifted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)
        assert a.sum(-1).abs().max() < 1e-14  # no direction that a softmax cannot see


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_and_its_gradient_in_every_precision(dtype):
    students, _, labels = logits(1, 9, 10, dtype)
    value = cross_entropy(students[0], labels)
    (gradient,) = torch.autograd.grad(value, students)
    z = students[0].detach().double().numpy()
    q = np.exp(z - z.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(-np.log(q[range(9), labels.numpy()]).mean(), rel=1e-6)
    wanted = (q - np.eye(10)[labels.numpy()]) / 9
    error = np.abs(gradient[0].double().numpy() - wanted).max() / np.abs(wanted).max()
    assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3, 4), (3,)), ((4,), (4,)), ((3, 4), (4,)), ((3, 4), (3, 1)), ((3, 4), ())]
)
def test_cross_entropy_names_shapes_that_do_not_fit(shape, labels):
    with pytest.raises(ValueError, match=r"logits must be .*\[N, C\]|labels must be int64 \[\d\]"):
        cross_entropy(torch.zeros(shape), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("logits", "labels", "named"),
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "not empty"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "floating point"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), "labels must be int64"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64, device="meta"), "labels are on meta"),
    ],
)
def test_cross_entropy_refuses_what_does_not_fit(logits, labels, named):
    with pytest.raises(ValueError, match=named):
        cross_entropy(logits, labels)


def test_labels_on_another_device_are_refused():
    with pytest.raises(ValueError, match="labels are on meta"):
        kd_loss(GOOD["students"], GOOD["teacher"], GOOD["labels"].to("meta"))


# What both implementations offer beyond that. tests/triton_grid.py holds the Triton kernels to the same oracle.


@pytest.fixture
def reference():
    kernels.use("reference", "cpu")
    yield
    kernels.use("auto", "cpu")


OPTIONS = list(itertools.product([0.0, 0.1, 1.0], [-100, 2], ["mean", "none"]))


@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled"])
@pytest.mark.parametrize(("smoothing", "ignore", "reduction"), OPTIONS)
def test_every_option_against_pytorchs_own_functions(form, smoothing, ignore, reduction):
    students, teacher, _ = logits(3, 6, 7)
    labels = torch.tensor([0, 2, 6, 2, 3, 1])
    options = {"smoothing": smoothing, "ignore": ignore, "reduction": reduction}
    found = ours(students, teacher, labels, form, 3.0, **options)
    expected = oracle(students, teacher, labels, form, 3.0, **options)
    upstream = [torch.randn(loss.shape, dtype=torch.float64) for loss in found]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == ((3,) if reduction == "mean" else (3, 6)) and torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    exact = torch.autograd.grad(expected, [students, teacher], upstream)
    for a, b in zip(torch.autograd.grad(found, [students, teacher], upstream), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_decoupled_form_and_of_every_option(reduction):
    students, teacher, labels = logits(2, 3, 5)
    options = {"temperature": 2.0, "label_smoothing": 0.1, "ignore_index": int(labels[0]), "reduction": reduction}
    assert torch.autograd.gradcheck(lambda s, t: tuple(decoupled_kd_loss(s, t, labels, **options)), (students, teacher))
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, labels, **options), (students, teacher))


def test_the_decoupled_parts_add_up_to_the_divergence():
    """KL(p || q) = target + (1 - p_y) non_target, row by row (DKD, eq. 7)."""
    students, teacher, labels = logits(3, 8, 10)
    parts = decoupled_kd_loss(students, teacher, labels, temperature=4.0, reduction="none")
    ce, kl = kd_loss(students, teacher, labels, temperature=4.0, reduction="none")
    p_y = (teacher / 4).softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(parts.target + (1 - p_y) * parts.non_target, kl, rtol=1e-10)
    assert torch.equal(parts.ce, ce)


def test_the_decoupled_loss_of_a_certain_student_is_finite():
    """In probabilities 1 - q_y underflows to 0 here, and its logarithm with it."""
    teacher = torch.tensor([[60.0, 0.0, 1.0]], requires_grad=True)
    students = torch.tensor([[80.0, 1.0, 0.0]], requires_grad=True)
    parts = decoupled_kd_loss(students, teacher, torch.tensor([0]))
    gradients = torch.autograd.grad(parts.target.sum() + parts.non_target.sum(), [students, teacher])
    assert all(x.isfinite().all() for x in (*parts, *gradients)) and parts.target > 0


def test_a_class_masked_out_by_the_teacher_is_a_class_of_probability_zero():
    students, teacher, _ = logits(2, 3, 5)
    masked = teacher.detach().index_fill(1, torch.tensor([4]), -math.inf).requires_grad_()
    _, kl = kd_loss(students, masked)
    q = students.softmax(-1)
    p = masked.detach().softmax(-1)
    assert torch.allclose(kl, (torch.special.xlogy(p, p) - p * q.log()).sum(-1).mean(-1), rtol=1e-12)
    ds, dt = torch.autograd.grad(kl.sum(), [students, masked])
    assert torch.allclose(ds, (q - p) / 3, rtol=1e-10, atol=1e-15) and dt.isfinite().all() and not dt[:, 4].any()


@pytest.mark.parametrize("sigma", [1e-1, 1e-2, 1e-3])
def test_float32_keeps_the_digits_of_a_small_divergence(sigma):
    source = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 300, generator=source) * 8
    students = teacher + sigma * torch.randn(2, 8, 300, generator=source)
    for direction in ("forward", "reverse"):
        _, kl = kd_loss(students, teacher, temperature=4.0, direction=direction)
        _, exact = kd_loss(students.double(), teacher.double(), temperature=4.0, direction=direction)
        assert ((kl - exact).abs() <= 1e-6 / sigma * exact).all()


def test_labels_that_are_no_class_show_and_ignored_ones_do_not():
    students, teacher, labels = logits(2, 3, 5)
    labels = torch.tensor([1, 5, 2])
    ce, kl = kd_loss(students, teacher, labels, reduction="none")
    assert ce.isnan().tolist() == [[False, True, False]] * 2 and kl.isfinite().all()
    assert torch.autograd.grad(ce.sum(), students)[0].isnan().any(-1).tolist() == [[False, True, False]] * 2
    ce, _ = kd_loss(students, teacher, labels, ignore_index=5)
    gradient = torch.autograd.grad(ce.sum(), students)[0]
    assert ce.isfinite().all() and not gradient[:, 1].any() and gradient[:, 0].all()
    ce, kl = kd_loss(students, teacher, torch.full((3,), -100))
    assert ce.tolist() == [0, 0] and kl.isfinite().all()


def test_a_second_derivative_is_refused():
    """A gradient penalty beside the loss, which would otherwise have no part in the gradient and not say so."""
    students, teacher, _ = logits(1, 3, 5)
    kl = kd_loss(students, teacher)[1].sum()
    (first,) = torch.autograd.grad(kl, students, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        (kl + first.square().sum()).backward()


def test_numbers_of_any_library_are_numbers():
    students, teacher, labels = logits(2, 3, 5)
    plain = kd_loss(students, teacher, labels, temperature=2.0, label_smoothing=0.0, ignore_index=1)
    given = {"temperature": np.float32(2), "label_smoothing": 0, "ignore_index": np.int64(1)}
    assert all(map(torch.equal, plain, kd_loss(students, teacher, labels, **given)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_classes_masked_out_by_the_lowest_number_leave_all_finite(direction, temperature):
    """finfo.min / T overflows for T < 1; a row of nothing else is uniform."""
    low = torch.finfo(torch.float32).min
    students, teacher, labels = logits(2, 4, 5, torch.float32)
    students, teacher = students.detach(), teacher.detach()
    teacher[1], students[:, 1, 2:] = low, low if direction == "reverse" else 0.0
    students[0, 2], teacher[3, 3], students[:, 3, 3] = low, low, low
    inputs = [students.requires_grad_(), teacher.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, exact = ours(*inputs, labels, direction, temperature), oracle(*wide, labels, direction, temperature)
    for a, b in zip(found, exact, strict=True):
        assert a.isfinite().all() and torch.allclose(a.double(), b, rtol=1e-5)
    slopes = torch.autograd.grad(sum(x.sum() for x in found), inputs)
    for a, b in zip(slopes, torch.autograd.grad(sum(x.sum() for x in exact), wide), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "wrong", "named"),
    [
        (kd_loss, {"label_smoothing": -0.1}, "label_smoothing"),
        (kd_loss, {"label_smoothing": "0.1"}, "label_smoothing must be a number; got '0.1'"),
        (kd_loss, {"temperature": torch.nn.Parameter(torch.ones(()))}, "temperature must be a number; got a Parameter"),
        (kd_loss, {"temperature": True}, "temperature must be a number; got True"),
        (kd_loss, {"ignore_index": 2.5}, "ignore_index must be a whole number; got 2.5"),
        (kd_loss, {"direction": "decoupled"}, "direction must be"),
        (kd_loss, {"label_smoothing": math.nan}, "label_smoothing"),
        (kd_loss, {"reduction": "sum"}, "reduction"),
        (decoupled_kd_loss, {"temperature": 0.0}, "temperature"),
        (decoupled_kd_loss, {"label_smoothing": 2.0}, "label_smoothing"),
    ],
)
def test_options_out_of_range_are_named(function, wrong, named):
    with pytest.raises(ValueError, match=named):
        function(*GOOD.values(), **wrong)


def test_one_class_has_no_non_target_ones():
    with pytest.raises(ValueError, match="2 classes"):
        decoupled_kd_loss(torch.zeros(1, 3, 1), torch.zeros(3, 1), GOOD["labels"])


@pytest.mark.parametrize("form", ["forward", "reverse", "decoupled", "none"])
def test_operators_keep_the_rules_of_custom_operators(form, reference):
    students, teacher, labels = logits(2, 3, 7, torch.float32)
    teacher = None if form == "none" else teacher
    arguments = (students, teacher, labels, 2.0, form, 0.1, -100, True)
    torch.library.opcheck(kd._forward, arguments)
    ce, kl, target, rows = (x.detach() for x in kd._forward(*arguments))
    grads = [torch.ones_like(x) if x.numel() else None for x in (ce, kl, target)]
    tensors = [x if x is None else x.detach() for x in (students, teacher, labels)]
    torch.library.opcheck(kd._backward, (*grads, *tensors, rows, *arguments[3:], True, teacher is not None))


def test_the_choice_of_implementation_says_what_it_did():
    assert kernels.use("auto", "cpu") == "reference: no GPU"
    assert kernels.use("reference", "cpu") == "reference, as asked"
    with pytest.raises(ValueError, match="no GPU"):
        kernels.use("triton", "cpu")
    with pytest.raises(ValueError, match="kernels must be one of auto, triton, reference; got 'cuda'"):
        kernels.use("cuda", "cpu")
    with pytest.raises(ValueError, match="meta is no NVIDIA GPU"):
        kernels.use("triton", "meta")
    kernels.use("auto", "cpu")


@pytest.mark.parametrize(
    ("capability", "dtype", "runs"),
    [
        ((6, 1), torch.float16, False),
        ((7, 0), torch.float16, True),
        ((7, 0), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, True),
        ((9, 0), torch.float64, False),
    ],
)
def test_what_the_kernels_take_on_a_gpu(monkeypatch, capability, dtype, runs):
    """What a GPU of that compute capability would run; no GPU is asked."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    class OnGPU:
        device = torch.device("cuda", 0)

        def __init__(self, dtype):
            self.dtype = dtype

    dispatch._runs_triton.cache_clear()
    kernels.use("auto", "cpu")
    assert dispatch.runs_triton(OnGPU(dtype), None) is runs
    monkeypatch.setattr(dispatch, "_choice", "triton")
    if runs or dtype == torch.float64:
        assert dispatch.runs_triton(OnGPU(dtype)) is runs
    else:
        with pytest.raises(ValueError, match=r"bfloat16: use float16|6\.1 is below 7\.0"):
            dispatch.runs_triton(OnGPU(dtype))
    dispatch._runs_triton.cache_clear()


def test_a_class_masked_out_by_the_student_is_left_out_of_its_cross_entropy():
    students, teacher, _ = logits(2, 3, 5)
    labels = torch.tensor([0, 2, 1])
    masked = students.detach().index_fill(2, torch.tensor([4]), -math.inf).requires_grad_()
    ce, _ = kd_loss(masked, teacher, labels)
    expected = torch.stack([torch.nn.functional.cross_entropy(row[:, :4], labels) for row in students])
    assert torch.allclose(ce, expected, rtol=1e-12)
    (gradient,) = torch.autograd.grad(ce.sum(), masked)
    assert gradient.isfinite().all() and not gradient[..., 4].any()
    assert kd_loss(masked, teacher, labels, label_smoothing=0.1)[0].isposinf().all()  # some target is on class 4
