"""SCKD compares gradients that float16 cannot hold as they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.batch import Batch
from losses.logits import SCKD
from losses.method import Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_sckd_sees_small_gradients(dtype, agree, size):
    """A last block in `dtype` whose inputs, and so its gradients, are small: transfer if the float64 cosine > 0."""
    generator = torch.Generator().manual_seed(0)
    block = nn.Linear(6, 5, bias=False).to(dtype)
    nn.init.uniform_(block.weight, -0.1, 0.1, generator=generator)
    images, labels = (size * torch.randn(64, 6, generator=generator)).to(dtype), torch.arange(64) % 5
    sure = (4.0 if agree else -4.0) * nn.functional.one_hot(labels, 5)
    student = Outputs(block(images))
    weight = block.weight.detach().double().requires_grad_()
    logits = images.double() @ weight.T
    ce = nn.functional.cross_entropy(logits, labels)
    kl = nn.functional.kl_div((logits / 4).log_softmax(1), (sure.double() / 4).softmax(1), reduction="batchmean")
    first, second = (torch.autograd.grad(each, weight, retain_graph=True)[0].flatten() for each in (ce, kl))
    assert ((first @ second).item() > 0) is agree and (size == 1.0 or second.abs().max() < 5e-8)
    method = SCKD(SimpleNamespace(student=SimpleNamespace(last_block=block), options=SimpleNamespace(temperature=4.0)))
    found = method(student, Outputs(sure.float()), Batch(images, labels))["sckd"].item()
    assert found == pytest.approx(kl.item() if agree else 0.0, rel=1e-2)
