"""Labels that are no class: the same losses and gradients from the reference and from the Triton kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import decoupled_kd_loss, use

ROOT = Path(__file__).parents[1]


def check_a_label_that_is_no_class(kernels: str) -> None:
    """By row of labels [a class, none, ignored]: `non_target` of the second is KL(p || q), the rest of it is NaN."""
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    assert use(kernels, device).startswith(kernels)
    generator = torch.Generator().manual_seed(0)
    students, teacher = (torch.randn(3, 5, generator=generator).to(device).requires_grad_() for _ in range(2))
    log_q, log_p = (x.detach().double().cpu().div(2).log_softmax(1) for x in (students, teacher))
    plain = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    slope = (log_q.exp() - log_p.exp()) / 2
    for label in (5, -1, 7):
        labels = torch.tensor([2, label, -100], device=device)
        losses = decoupled_kd_loss(students, teacher, labels, temperature=2.0, reduction="none")
        for loss in (losses.ce, losses.target):
            assert loss[0].isnan().tolist() == [False, True, False]
            assert loss[0, 2] == 0 and loss[0, 0] > 0
            (gradient,) = torch.autograd.grad(loss.sum(), students, retain_graph=True)
            assert gradient.isnan().all(1).tolist() == [False, True, False]
        assert losses.non_target[0, 1].item() == pytest.approx(plain[1].item(), rel=1e-5)
        assert losses.non_target[0, 2] == 0
        (gradient,) = torch.autograd.grad(losses.non_target.sum(), students)
        assert torch.allclose(gradient[1].double().cpu(), slope[1], atol=1e-6) and not gradient[2].any()
        means = decoupled_kd_loss(students, teacher, labels, temperature=2.0)
        assert means.ce.isnan().all() and means.target.isnan().all()
        assert means.non_target.item() == pytest.approx(losses.non_target[0, :2].mean().item(), rel=1e-5)


def test_reference():
    try:
        check_a_label_that_is_no_class("reference")
    finally:
        use("auto", "cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    call = "from tests.test_kernel_labels import *; check_a_label_that_is_no_class('triton')"
    command = [sys.executable, "-W", "ignore", "-c", call]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | interpreter, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["kd", "gates"])
def test_imports_go_one_way(name):
    """A file of Triton kernels knows nothing of the operations that call it."""
    assert f"from kernels.{name} import" not in (ROOT / "kernels" / f"{name}_triton.py").read_text()
