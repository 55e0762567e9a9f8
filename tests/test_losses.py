"""KD's terms and weights, and a teacher that stays frozen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.batch import Batch
from engine.objective import weighted_sum
from losses.logits import KD, CrossEntropy, with_labels
from losses.method import MethodContext
from losses.registry import METHODS
from models import create_model
from objectives.distillation import Distillation
from objectives.registry import TEACHERS


def networks():
    torch.manual_seed(0)
    return create_model("resnet8", 5), create_model("resnet14", 5)


class Fixed(nn.Module):
    """A network of constant logits."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def kd(student: nn.Module, teacher: nn.Module, alpha: float = 0.9, temperature: float = 4.0) -> Distillation:
    options = SimpleNamespace(alpha=alpha, temperature=temperature)
    context = MethodContext(student, teacher, None, None, 5, None, options)
    return Distillation(student, [teacher], with_labels([KD(context)], context, 1 - alpha, alpha), [1.0])


def labels_only(student: nn.Module) -> Distillation:
    return Distillation(student, (), [CrossEntropy(None)], [1.0])


def batch(count: int = 4) -> Batch:
    return Batch(torch.randn(count, 3, 16, 16), torch.randint(0, 5, (count,)))


def test_the_teacher_is_frozen_and_no_part_of_the_objective():
    student, teacher = networks()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = kd(student, teacher)
    objective.train()
    terms = objective(batch(), 0)
    sum(terms.values()).backward()
    assert not teacher.training and student.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(name.startswith("student.") for name in objective.state_dict())
    assert len(objective.weight_parameters()) == len(list(student.parameters()))


def test_same_student_and_teacher_have_no_divergence():
    student, _ = networks()
    objective = kd(student, student).eval()
    assert objective(batch(), 0)["kl"].item() == 0


def test_tables_name_a_paper_for_every_method():
    assert {"kd", "none"} <= METHODS.keys() and {"vanilla", "gtn"} <= TEACHERS.keys()
    assert all(row.paper for row in (*METHODS.values(), *TEACHERS.values()))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_kd_terms_weights_and_gradient(alpha, temperature):
    source = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 5, generator=source, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 5, (6,), generator=source)
    objective = kd(Fixed(student), Fixed(teacher), alpha, temperature)
    terms, weights = objective(Batch(torch.zeros(6), labels), 0), objective.term_weights
    (gradient,) = torch.autograd.grad(weighted_sum(objective, terms), objective.student.logits)

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    z, t, y = student.detach().numpy(), teacher.numpy(), np.eye(5)[labels.numpy()]
    p, q = softmax(t / temperature), softmax(z / temperature)
    assert weights == pytest.approx({"ce": 1 - alpha} | ({"kl": alpha * temperature**2} if alpha else {}))
    assert terms["ce"].item() == pytest.approx(-(y * np.log(softmax(z))).sum() / 6)
    assert not alpha or terms["kl"].item() == pytest.approx((p * np.log(p / q)).sum() / 6)
    expected = ((1 - alpha) * (softmax(z) - y) + alpha * temperature * (q - p)) / 6
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-14)


def test_labels_only_needs_no_teacher():
    student, _ = networks()
    objective = labels_only(student).eval()
    images, labels = (given := batch())[:2]
    terms = objective(given, 0)
    assert terms.keys() == {"ce"} == objective.term_weights.keys()
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(student(images), labels).item())
    assert not METHODS["none"].needs_teacher and METHODS["kd"].needs_teacher


def test_the_objectives_terms_are_the_loss_of_both_networks_logits():
    student, teacher = networks()
    objective = kd(student, teacher, 0.3, 2.0).eval()
    images, labels = (given := batch())[:2]
    p, q = (teacher(images) / 2).softmax(1), (student(images) / 2).softmax(1)
    terms = objective(given, 0)
    assert terms["kl"].item() == pytest.approx(((p * (p / q).log()).sum() / 4).item(), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(student(images), labels).item(), rel=1e-5)
    assert objective.term_weights == pytest.approx({"ce": 0.7, "kl": 1.2})
    answers = objective.predict(images, 0)
    assert answers.keys() == {"student"} and torch.equal(answers["student"], student(images))
    assert objective.trained_model() is student


def test_a_teacher_in_training_mode_is_frozen_before_it_predicts():
    student, teacher = networks()
    teacher.train()
    objective = kd(student, teacher)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    objective.eval()
    objective.train()
    assert not any(module.training for module in teacher.modules())
    own = {id(parameter) for parameter in objective.parameters()}
    assert own.isdisjoint({id(parameter) for parameter in teacher.parameters()})
    assert teacher not in list(objective.modules())


def test_the_teacher_follows_to_another_device():
    student, teacher = networks()
    kd(student, teacher).to("meta")
    tensors = [*teacher.parameters(), *teacher.buffers(), *student.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
