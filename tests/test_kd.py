"""kd_loss and cross_entropy against their formulas in float64, and what they imply."""

import math

import numpy as np
import pytest
import torch

from kernels import cross_entropy, kd_loss


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
