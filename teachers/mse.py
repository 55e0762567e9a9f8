"""A teacher trained to be a posterior, not only to be right.

Source: Hamidi et al., "How to Train the Teacher Model for Effective Knowledge Distillation" (ECCV 2024, arXiv
2407.18041), eq. 1: the minimiser of the mean squared error is the Bayes posterior.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.objective import Objective
from models.network import Network


class MSE(Objective):
    """L = mean over images of sum_c (y_c - p_c)^2, p = softmax(z), y one-hot; in float32 whatever z is."""

    def __init__(self, teacher: Network, options: object, image_size: int):
        super().__init__()
        self.teacher = teacher
        self.term_weights = {"mse": 1.0}

    def forward(self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        return {"mse": squared_error(self.teacher(images), labels)}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"teacher": self.teacher(images)}

    def product(self) -> Network:
        return self.teacher


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [N, C] and labels [N]."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    wrong = wide.softmax(1) - F.one_hot(labels, logits.shape[1])
    return wrong.square().sum(1).mean()
