"""A batch of one image: ReviewKD says what to change."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import UserError
from data.batch import Batch
from losses.method import MethodContext
from losses.review import ReviewKD, narrowing
from models import create_model
from objectives.distillation import outputs_of, probe


def test_reviewkd_with_one_image():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", 4), create_model("resnet14", 4)
    outputs = probe(student, 16, True), probe(teacher, 16, "preact")
    method = ReviewKD(MethodContext(student, teacher, *outputs, 4, None, SimpleNamespace()))

    def loss(images: int) -> torch.Tensor:
        x = torch.randn(images, 3, 16, 16)
        batch = Batch(x, torch.zeros(images, dtype=torch.int64))
        return method(outputs_of(student, x, True), outputs_of(teacher, x, "preact"), batch)["reviewkd"]

    with pytest.raises(UserError, match=r"^--batch_size: --method reviewkd needs at least 2 images") as raised:
        loss(1)
    assert "\n" not in str(raised.value)
    assert loss(2).isfinite()
    method.eval()  # with the running statistics a single image will do
    assert loss(1).isfinite()


def test_narrowing_of_one_pixel():
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)
    with pytest.raises(UserError, match="--batch_size"):
        narrowing(torch.randn(1, 3, 1, 1), convolution, norm)
    assert norm.running_var.isfinite().all() and norm.num_batches_tracked == 0
    narrowing(torch.randn(1, 3, 1, 2), convolution, norm)
    assert norm.running_var.isfinite().all()
