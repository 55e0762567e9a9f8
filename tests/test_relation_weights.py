"""The weights of losses between images: at each the gradient is of the size of the others'."""

import pytest
import torch
import torch.nn.functional as F

from data.batch import Batch
from losses.method import Outputs
from losses.registry import METHODS
from models import create_model
from objectives.distillation import outputs_of


@pytest.mark.parametrize("name", ["sp", "cc", "rkd", "pkt"])
def test_gradients_are_of_the_size_of_the_cross_entropys(name):
    """On the body of a resnet8 at its start, with a teacher whose maps tell the classes: 1 to 50 times its norm."""
    torch.manual_seed(0)
    student, images, labels = create_model("resnet8", 10), torch.randn(64, 3, 16, 16), torch.arange(64) % 10
    maps = (torch.randn(10, 64, 1, 1)[labels] + 0.3 * torch.randn(64, 64, 4, 4)).relu()
    learned = outputs_of(student, images, True)
    row = METHODS[name]
    terms = row(None)(learned, Outputs(None, maps=[maps], embedding=maps.mean((2, 3))), Batch(images, labels))
    loss = row.weight * sum(row.terms[term] * value for term, value in terms.items())
    body = [parameter for key, parameter in student.named_parameters() if not key.startswith("fc")]

    def size(value: torch.Tensor) -> float:
        return torch.cat([each.flatten() for each in torch.autograd.grad(value, body, retain_graph=True)]).norm().item()

    assert 1 < size(loss) / size(F.cross_entropy(learned.logits, labels)) < 50
