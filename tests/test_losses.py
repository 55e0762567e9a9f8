"""KD's terms and weights, and a teacher that stays frozen."""

import pytest
import torch
import torch.nn.functional as F

from losses import METHODS
from losses.distillation import Distillation
from models import create_model
from teachers import TEACHERS


def networks():
    torch.manual_seed(0)
    return create_model("resnet8", 5), create_model("resnet14", 5)


def test_kd_is_hintons_loss():
    loss = METHODS["kd"].loss(0.9, 4.0)
    torch.manual_seed(0)
    student, teacher = (torch.randn(8, 5, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 5, (8,))
    terms = loss(student, teacher, labels)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = 0.1 * F.cross_entropy(student, labels) + 0.9 * 16 * (p * (p / q).log()).sum() / 8
    assert sum(loss.term_weights[name] * term for name, term in terms.items()).item() == pytest.approx(expected.item())


def test_labels_only_is_cross_entropy():
    loss = METHODS["none"].loss(0.9, 4.0)
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    assert loss.term_weights == {"ce": 1.0}
    assert loss(logits, None, labels)["ce"].item() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_the_teacher_is_frozen_and_no_part_of_the_objective():
    student, teacher = networks()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = Distillation(student, METHODS["kd"].loss(0.9, 4.0), teacher)
    objective.train()
    terms = objective(torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,)), 0)
    sum(terms.values()).backward()
    assert not teacher.training and student.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(name.startswith("student.") for name in objective.state_dict())
    assert len(objective.weight_parameters()) == len(list(student.parameters()))


def test_the_teacher_follows_the_objective():
    student, teacher = networks()
    Distillation(student, METHODS["kd"].loss(0.9, 4.0), teacher).to(torch.float64)
    assert teacher.conv1.weight.dtype == torch.float64


def test_same_student_and_teacher_have_no_divergence():
    student, _ = networks()
    objective = Distillation(student, METHODS["kd"].loss(0.9, 4.0), student).eval()
    assert objective(torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,)), 0)["kl"].item() == 0


def test_tables_name_a_paper_for_every_method():
    assert {"kd", "none"} <= METHODS.keys() and {"vanilla", "gtn"} <= TEACHERS.keys()
    assert all(row.paper for row in (*METHODS.values(), *TEACHERS.values()))
