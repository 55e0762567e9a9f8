"""What a method's class need not say: its usual weight in words, and what its warm-up trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses.method import Method, Outputs
from losses.registry import METHODS


class Weighted(Method):
    """As a user's own."""

    paper, weight = "mine", 0.25


class Named(Weighted):
    """The same, in words."""

    usual = "a quarter"


class WithWarmup(Method):
    """Trains a layer in a warm-up."""

    paper = "mine"
    warmup_epochs, warmup_terms = 2, {"fit": 1.0}

    def __init__(self, context):
        super().__init__(context)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def warmup(self, student, teacher, batch):
        return {"fit": self.first(teacher.embedding).sum()}

    def warmup_only(self):
        return [self.first, self.second]


class Cosine(Method):
    """The README's."""

    paper, usual = "mine", "1"
    terms = {"cosine": 1.0}  # noqa: RUF012
    student_features = teacher_features = "maps"

    def forward(self, student, teacher, batch):
        a, b = (outputs.maps[-1].mean(1).flatten(1).float() for outputs in (student, teacher))
        return {"cosine": (1 - F.cosine_similarity(a, b)).mean()}


def test_the_usual_weight_is_the_weight():
    assert [each.usual for each in (Weighted, Named, WithWarmup, Cosine)] == ["0.25", "a quarter", "1", "1"]
    found = {name: METHODS[name].usual for name in ("at", "pkt", "oh", "crd", "vid", "sckd", "rkd", "none")}
    assert list(found.values()) == ["1000", "30000", "0.001", "0.8", "1", "1", "25 distance, 50 angle", ""]


def test_a_warmup_trains_its_own_modules():
    method = WithWarmup(None)
    expected = [*method.first.parameters(), *method.second.parameters()]
    assert [id(each) for each in method.warmup_parameters()] == [id(each) for each in expected]
    assert Cosine(None).warmup_parameters() == []
    with pytest.raises(TypeError, match="Without: a method with warmup_epochs needs"):
        type("Without", (Method,), {"warmup_epochs": 1})


def test_a_users_own_method():
    maps = [torch.rand(2, 3, 4, 4)]
    assert Cosine(None)(Outputs(None, maps), Outputs(None, maps), None)["cosine"].item() == pytest.approx(0, abs=1e-6)
