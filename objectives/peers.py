"""Peers that learn from each other while they train, without a teacher: DML and KDCL."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from engine.objective import Objective
from kernels import kd_loss
from losses.peers import DML, error_products, least_error_shares, mutual, shared_logits


class Peers(Objective):
    """L = sum_k [CE(q_k, y) + kl_weight T^2 KL_k] over K peers; the first is the one that is kept.

    DML (Zhang et al., eq. 5 and its form for more networks): KL_k is the mean over the other peers j of
    KL(p_j || p_k), at T = 1, each p_j without gradient.
    KDCL (Guo et al., section 3): the peers get differently augmented copies of the batch, and KL_k is
    KL(p_e || p_k) to an ensemble e of all logits (section 3.2): those of the peer with the lowest
    cross-entropy on the batch, the convex combination with the lowest, the least of each logit over the target's,
    or (general) the combination whose error on the validation split was the least after the epoch before.

    Args:
        students: the networks, at least two.
        method: the row of losses.registry.METHODS: a class of losses.peers.
        kl_weight: as above.
    """

    def __init__(self, students: Sequence[nn.Module], method: type[DML], kl_weight: float = 1.0):
        super().__init__()
        self.peers, self.method = nn.ModuleList(students), method
        self.term_weights = {"ce": 1.0, "kl": kl_weight * method.temperature**2}
        self.copies = len(students) if method.own_copies else 1
        self.general, count = method.needs_validation, len(students)
        self.register_buffer("shares", torch.full((count,), 1 / count, dtype=torch.float64) if self.general else None)
        self.register_buffer("errors", torch.zeros(count, count, dtype=torch.float64) if self.general else None)

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """`batch.images` [copies x N, ...]: a copy of the batch for each peer, or one for all."""
        images, labels = batch.images, batch.labels
        copies = images.chunk(len(self.peers)) if self.copies > 1 else [images] * len(self.peers)
        logits = torch.stack([peer(each) for peer, each in zip(self.peers, copies, strict=True)])
        fixed, method = logits.detach(), self.method
        if self.general or method.ensemble:
            teacher = shared_logits(fixed, self.shares) if self.general else method.ensemble(fixed, labels)
            ce, kl = kd_loss(logits, teacher, labels, temperature=method.temperature)
        else:
            ce, kl = mutual(logits, labels)
        return {"ce": ce.sum(), "kl": kl.sum()}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        first, *others = self.peers
        return {"student": first(images)} | {f"peer{i}": peer(images) for i, peer in enumerate(others, start=2)}

    def trained_model(self) -> nn.Module:
        return self.peers[0]

    def observe_validation(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        if self.general:
            errors = error_products(torch.stack(list(logits.values())), labels)
            if dist.is_initialized():  # summed here, so that a checkpoint holds the errors of all processes
                dist.all_reduce(errors)
            self.errors += errors

    def begin_epoch(self, epoch: int) -> None:
        """The combination of the epoch is the one with the least error on the validation split after the last."""
        if self.general and self.errors.any():
            self.shares.copy_(least_error_shares(self.errors))
            self.errors.zero_()
