"""A teacher trained to be a posterior, not only to be right.

Source: Hamidi et al., "How to Train the Teacher Model for Effective Knowledge Distillation" (ECCV 2024, arXiv
2407.18041), eq. 1: the minimiser of the mean squared error is the Bayes posterior.
"""

import torch
from torch import Tensor

from data.batch import Batch
from models.network import Network
from objectives.vanilla import Vanilla


class MSE(Vanilla):
    """L = mean over images of sum_c (y_c - p_c)^2, p = softmax(z), y one-hot; in float32 whatever z is."""

    mixable = False

    def __init__(self, teacher: Network, options: object, image_size: int):
        super().__init__(teacher, options, image_size)
        self.term_weights = {"mse": 1.0}

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        return {"mse": squared_error(self.teacher(batch.images), batch.labels)}


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [N, C] and labels [N]."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    # Minus one at the label; F.one_hot would first look at the labels, and wait for them.
    wrong = wide.softmax(1).scatter_add(1, labels[:, None], wide.new_full((len(labels), 1), -1.0))
    return wrong.square().sum(1).mean()
