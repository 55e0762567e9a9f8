"""Losses of peers, networks that train together without a teacher: DML's mutual loss and KDCL's ensembles."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kd_loss
from losses.logits import CrossEntropy
from losses.method import full_precision

STEPS = 14  # of Newton's method for the best combination
BARRIERS = (1.0, 1e-5)  # nats, in the first of them and the last
REACH = 0.95  # share of the way to the border of the simplex that a step may go
HALVINGS = 6  # of the step, that its line search compares


def mutual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [K, N, C] -> cross-entropies [K] and, for each, the mean KL from the others [K], in nats."""
    others, ce = torch.zeros(len(logits), dtype=torch.float32, device=logits.device), None
    for index, teacher in enumerate(logits.detach()):
        ce, kl = kd_loss(logits, teacher, labels)
        others = others + kl * (torch.arange(len(logits), device=logits.device) != index)
    return ce, others / (len(logits) - 1)


@full_precision
def best_peer(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-Naive (Guo et al., section 3.2): logits [K, N, C] -> those [N, C] of the peer with the lowest cross-entropy.

    As the other ensembles' they are float32, or float64 where the peers' are.
    """
    losses = torch.stack([F.cross_entropy(each, labels) for each in logits])
    return logits.index_select(0, losses.argmin()[None])[0]


@full_precision
def best_combination(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-Linear (section 3.2): logits [K, N, C] -> sum_k w_k z_k [N, C] for the w >= 0, sum 1, with the lowest
    cross-entropy, which is convex in w: to about 1e-4 nats, whatever the peers' scales are.
    """
    apart = logits - _at_labels(logits, labels)
    weights = _best_weights(apart)
    return torch.einsum("k,knc->nc", weights, logits)


def _best_weights(apart: Tensor) -> Tensor:
    """The w [K] of `best_combination` for logits less those of the labels, whose log-sum-exp is the cross-entropy.

    Newton's method on the simplex with a logarithmic barrier, weakened from step to step (Boyd and Vandenberghe, Convex
    Optimization, 2004, sections 10.2 and 11.3), in a fixed number of steps: nothing here waits for the device.
    """
    peers, images, _ = apart.shape
    weights = apart.new_full((peers,), 1 / peers)
    sizes = 0.5 ** torch.arange(HALVINGS, device=apart.device)
    for step in range(STEPS):
        first, last = BARRIERS
        barrier = first * (last / first) ** (step / (STEPS - 1))
        p = torch.einsum("k,knc->nc", weights, apart).softmax(1)
        means = torch.einsum("knc,nc->kn", apart, p)
        deviations = ((apart - means[..., None]) * p.sqrt()).flatten(1)
        hessian = deviations @ deviations.T / images + (barrier / weights.square()).diag()
        gradient = means.mean(1) - barrier / weights
        newton, level = _solve(hessian, torch.stack([gradient, torch.ones_like(gradient)], 1)).unbind(1)
        direction = newton.sum() / level.sum() * level - newton  # sums to 0
        reach = REACH / (-direction / weights).amax().clamp(min=REACH)
        candidates = weights + (reach * sizes)[:, None] * direction
        losses = torch.einsum("jk,knc->jnc", candidates, apart).logsumexp(2).mean(1)
        losses = losses - barrier * candidates.log().sum(1)
        weights = candidates.index_select(0, losses.argmin()[None])[0]
        weights = weights / weights.sum()
    return weights


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """X [K, R] with matrix X = right, for a positive definite matrix [K, K], which needs no pivots (Gauss-Jordan).

    K is the number of peers; a library's solver is free to wait for the device.
    """
    rows = torch.cat([matrix, right], 1)
    for k in range(len(matrix)):
        pivot = rows[k] / rows[k, k]
        rows = rows - rows[:, k, None] * pivot
        rows[k] = pivot
    return rows[:, len(matrix) :]


@full_precision
def least_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """KDCL-MinLogit (section 3.2): logits [K, N, C] -> for each class the least over peers of z_c - z_y, [N, C]."""
    return (logits - _at_labels(logits, labels)).min(0).values


def _at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """[K, N, C] -> [K, N, 1]."""
    return logits.gather(2, labels[None, :, None].expand(len(logits), -1, 1))


@full_precision
def shared_logits(logits: Tensor, shares: Tensor) -> Tensor:
    """KDCL-General (section 3.2): sum_k shares_k z_k [N, C] of logits [K, N, C] and shares [K]."""
    return torch.einsum("k,knc->nc", shares.to(logits.dtype), logits)


def error_products(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images of (p_j - y) . (p_k - y) [K, K], float64, p the softmax of logits [K, N, C], y one-hot."""
    index = labels[None, :, None].expand(len(logits), -1, 1)
    # Minus one at the label; F.one_hot would first look at the labels, and wait for them.
    wrong = logits.double().softmax(2).scatter_add(2, index, logits.new_full(index.shape, -1.0, dtype=torch.float64))
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
