"""How alike a student and its teacher are, and how sure a network is of itself: from logits and embeddings.

Source of the measures: Park et al., SFTN (arXiv 2102.07650), Table 8, which reports KL and CKA between teachers and
students; linear CKA by Kornblith et al. (arXiv 1905.00414).
"""

import torch
from torch import Tensor


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """Mean over images of KL(p || q) in nats, p and q the softmax of logits [N, C] at temperature 1, in float64."""
    p, q = p_logits.double().log_softmax(1), q_logits.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def agreement(one: Tensor, other: Tensor) -> float:
    """Percent of images whose most likely class is the same by both logits [N, C]."""
    return 100 * float((one.argmax(1) == other.argmax(1)).double().mean())


def confidence(logits: Tensor) -> float:
    """Mean probability of the most likely class, of logits [N, C]."""
    return float(logits.double().softmax(1).amax(1).mean())


def entropy(logits: Tensor) -> float:
    """Mean entropy in nats of the softmax of logits [N, C]."""
    return float(torch.special.entr(logits.double().softmax(1)).sum(1).mean())


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats of logits [N, C] and labels [N]."""
    return float(-logits.double().log_softmax(1).gather(1, labels[:, None]).mean())


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two embeddings [N, D] and [N, E] of the same images, in [0, 1].

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of the centred X and Y (Kornblith et al., eq. 5), in float64.
    """
    x, y = (each.double() - each.double().mean(0) for each in (one, other))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
