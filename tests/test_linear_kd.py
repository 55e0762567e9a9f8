"""linear_kd_loss: the unfused losses and gradients, and no tensor as large as the logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import kd_loss, linear_kd_loss


def tensors(n: int, c: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[list, list, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    student = [torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((n, d), (c, d), (c,))]
    teacher = [torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((n, d + 3), (c, d + 3), (c,))]
    student, teacher = ([each.to(dtype) for each in part] for part in (student, teacher))
    return [each.requires_grad_() for each in student], teacher, torch.randint(0, c, (n,), generator=source)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("rows", "smoothing", "ignored"), [(1, 0.0, 0), (4, 0.1, 3), (11, 0.0, 11), (None, 0.2, 2)])
def test_values_and_gradients_are_those_of_the_unfused_loss(direction, rows, smoothing, ignored):
    student, teacher, labels = tensors(11, 30, 5)
    labels[:ignored] = -100
    options = {"temperature": 2.0, "direction": direction, "label_smoothing": smoothing}
    embedding, weight, bias = student
    both = embedding @ weight.T + bias, teacher[0] @ teacher[1].T + teacher[2]
    ce, kl = kd_loss(*both, labels, **options)
    expected = torch.autograd.grad(0.3 * ce.sum() + 1.7 * kl.sum(), student)
    found_ce, found_kl = linear_kd_loss(*student, *teacher, labels, rows=rows, **options)
    found = torch.autograd.grad(0.3 * found_ce + 1.7 * found_kl, student)
    torch.testing.assert_close((found_ce, found_kl), (ce[0], kl[0]))
    torch.testing.assert_close(found, expected)


def test_what_gets_no_gradient_and_what_has_no_bias():
    (embedding, weight, _), teacher, labels = tensors(6, 7, 4)
    embedding.requires_grad_(False)
    ce, kl = linear_kd_loss(embedding, weight, None, *teacher, labels, rows=4)
    (ce + kl).backward()
    logits = (embedding @ weight.T).detach().requires_grad_()
    pair = kd_loss(logits, teacher[0] @ teacher[1].T + teacher[2], labels)
    (pair[0] + pair[1]).sum().backward()
    torch.testing.assert_close(weight.grad, logits.grad.T @ embedding)


def test_under_autocast_products_are_in_its_type_and_gradients_in_the_weights():
    student, teacher, labels = tensors(64, 50, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ce, kl = linear_kd_loss(*student, *teacher, labels, temperature=4.0, rows=16)
        logits = torch.nn.functional.linear(*student), torch.nn.functional.linear(*teacher)
        pair = kd_loss(*logits, labels, temperature=4.0)
    assert ce.dtype == torch.float32 and ce.item() == pytest.approx(pair[0].item(), rel=1e-6)
    assert kl.item() == pytest.approx(pair[1].item(), rel=1e-6)
    found = torch.autograd.grad(ce + kl, student)
    expected = torch.autograd.grad((pair[0] + pair[1]).sum(), student)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # bfloat16 has 8 bits


def test_a_second_derivative_is_refused():
    student, teacher, labels = tensors(6, 7, 4)
    gradients = torch.autograd.grad(linear_kd_loss(*student, *teacher, labels)[1], student, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
            gradient.square().sum().backward(retain_graph=True)


class Largest(TorchDispatchMode):
    """The most numbers that any result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits():
    student, teacher, labels = tensors(256, 3000, 8, torch.float32)
    with Largest() as seen:
        ce, kl = linear_kd_loss(*student, *teacher, labels, rows=16)
        (ce + kl).backward()
    assert seen.numbers == 16 * 3000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s[0][:, 1:], s[1], s[2], *t), "embedding must be"),
        (lambda s, t: (s[0], s[1], s[2][1:], *t), "bias must be"),
        (lambda s, t: (*s, t[0][1:], *t[1:]), "in common"),
        (lambda s, t: (*s, t[0], t[1].requires_grad_(), t[2]), "no gradient"),
    ],
)
def test_what_does_not_belong_together_is_named(change, message):
    student, teacher, labels = tensors(6, 7, 4)
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(*change(student, teacher), labels)
    with pytest.raises(ValueError, match="rows must be"):
        linear_kd_loss(*student, *[each.detach() for each in teacher], labels, rows=0)
