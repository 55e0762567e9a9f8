"""Losses of peers, networks that train together without a teacher: DML's mutual loss and KDCL's ensembles."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kd_loss
from losses.logits import CrossEntropy

STEPS = 30  # of the search for the best combination


def mutual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [K, N, C] -> cross-entropies [K] and, for each, the mean KL from the others [K]."""
    others, ce = torch.zeros(len(logits), dtype=torch.float32, device=logits.device), None
    for index, teacher in enumerate(logits.detach()):
        ce, kl = kd_loss(logits, teacher, labels)
        others = others + kl * (torch.arange(len(logits), device=logits.device) != index)
    return ce, others / (len(logits) - 1)


def best_peer(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-Naive: logits [K, N, C] -> those [N, C] of the network with the lowest cross-entropy."""
    losses = torch.stack([F.cross_entropy(each.float(), labels) for each in logits])
    return logits.index_select(0, losses.argmin()[None])[0]


def best_combination(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-Linear: sum_k w_k z_k for the w >= 0, sum 1, with the lowest cross-entropy, by exponentiated gradient."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    scores = wide.new_zeros(len(wide))  # w = softmax(scores)
    target = F.one_hot(labels, wide.shape[2])
    scale = 1 / (wide - wide.mean(0)).square().sum(2).mean().clamp(min=1e-6)
    for _ in range(STEPS):
        mixed = torch.einsum("k,knc->nc", scores.softmax(0), wide)
        gradient = torch.einsum("knc,nc->k", wide, mixed.softmax(1) - target) / len(labels)
        scores = scores - 8 * scale * gradient
    return torch.einsum("k,knc->nc", scores.softmax(0), wide)


def least_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-MinLogit: for each class the least over peers of z_c - z_y."""
    own = logits.gather(2, labels[None, :, None].expand(len(logits), -1, 1))
    return (logits - own).min(0).values


def shared_logits(logits: Tensor, shares: Tensor) -> Tensor:
    """KDCL-General: sum_k shares_k z_k."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return torch.einsum("k,knc->nc", shares.to(wide.dtype), wide)


def error_products(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images of (p_j - y) . (p_k - y) [K, K], float64, p the softmax of logits [K, N, C], y one-hot."""
    wrong = logits.double().softmax(2) - F.one_hot(labels, logits.shape[2])
    return torch.einsum("jnc,knc->jk", wrong, wrong)


def least_error_shares(errors: Tensor) -> Tensor:
    """The w [K], sum 1, with the least w^T E w: E^-1 1 over its sum (Perrone and Cooper, 1993).

    A thousandth of E's mean diagonal is added to its own: peers that err alike get like shares.
    """
    peers = len(errors)
    ridge = 1e-3 * errors.diagonal().mean().clamp(min=1e-12)
    shares = torch.linalg.solve(errors + ridge * torch.eye(peers).to(errors), torch.ones(peers).to(errors))
    return shares / shares.sum()


class DML(CrossEntropy):
    """The row of `objectives.peers.Peers` for mutual learning.

    Attributes of all such rows:
        temperature: of the KL.
        own_copies: whether every peer sees a copy of the batch that is augmented for itself.
        ensemble: the teacher's logits [N, C] of the peers' [K, N, C] and labels [N]; None: each peer learns from the
            others, or with `needs_validation`, from the combination with the least error there.
    """

    paper = "Zhang et al.: Deep Mutual Learning (2018)"
    usual, peers = "1", True
    temperature, own_copies = 1.0, False
    ensemble: Callable[[Tensor, Tensor], Tensor] | None = None


class KDCL(DML):
    """The row for the ensemble that is the best peer."""

    paper = "Guo et al.: Online Knowledge Distillation via Collaborative Learning (2020)"
    temperature, own_copies = 2.0, True
    ensemble = staticmethod(best_peer)


class KDCLLinear(KDCL):
    """The row for the best convex combination."""

    paper = f"{KDCL.paper}, linear"
    ensemble = staticmethod(best_combination)


class KDCLMinLogit(KDCL):
    """The row for the least logits."""

    paper = f"{KDCL.paper}, min-logit"
    ensemble = staticmethod(least_logits)


class KDCLGeneral(KDCL):
    """The row for the combination with the least error on a validation split."""

    paper = f"{KDCL.paper}, general"
    ensemble, needs_validation = None, True
