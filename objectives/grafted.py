"""What SFTN and GTN have in common: a teacher with branches, which may stay as it is for a while."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from common import UserError
from data.batch import Batch
from engine.objective import Objective
from kernels import cross_entropy, kd_loss
from losses.mixed import with_partners
from models.network import Network
from models.pool import Pool

CAPPED = 0.8  # share of the cross-entropy at which the branches' pull balances the labels'


@dataclass
class PoolOptions:
    """Options of whatever has to do with a pool of students.

    Args:
        pool: the pool of students: of pool:SEED, and of what GTN's supernet stands for.
    """

    title = "pool of students"

    pool: Pool = field(default_factory=Pool)

    def check(self) -> None:
        self.pool.check()


@dataclass
class BranchOptions(PoolOptions):
    """Options of teachers with branches (--method sftn and gtn).

    Not in the papers: teacher_kl_share, freeze_teacher_epochs, teacher_cut.

    Args:
        alpha: weight of the KL between branches and teacher (the papers: 3 on CIFAR-100, 1 on ImageNet).
        teacher_kl_share: share of the KL's gradient that reaches the teacher's logits; 1: the papers' loss, 0: the KL
            trains the branches, and the teacher through its feature maps alone.
        teacher_weight: weight of the teacher's cross-entropy.
        branch_weight: weight of the branches' cross-entropy.
        temperature: softmax temperature of the KL (the papers: 1).
        kl_direction: reverse is KL(branch || teacher), as SFTN prints it; forward is KL(teacher || branch).
        freeze_teacher_epochs: epochs at the start in which only branches train and the teacher stays as it is, its
            BatchNorm statistics included: for trained teachers.
        branches: behind which of the teacher's blocks (1, 2, 3) branches are grafted; default: all.
        teacher_cut: where the teacher is cut into blocks: at its stages (where maps change size), or into parts of
            about as many convolutions each (depth).
        teacher_stages: of a --model of another library or of your own: the submodules that branches are grafted
            behind, in the order in which they run, as named_modules() names them; default: timm's, where it knows some.
    """

    alpha: float = 3.0
    teacher_kl_share: float = 1.0
    teacher_weight: float = 1.0
    branch_weight: float = 1.0
    temperature: float = 1.0
    kl_direction: Literal["reverse", "forward"] = "reverse"
    freeze_teacher_epochs: int = 0
    branches: list[int] = field(default_factory=list)
    teacher_cut: Literal["stages", "depth"] = "stages"
    teacher_stages: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        super().check()
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if not 0 <= self.alpha < float("inf"):
            raise UserError(f"--alpha {self.alpha}: must be at least 0")
        if not 0 <= self.teacher_kl_share <= 1:
            raise UserError(f"--teacher_kl_share {self.teacher_kl_share}: must be in [0, 1]")
        if min(self.teacher_weight, self.branch_weight) < 0:
            raise UserError(
                f"--teacher_weight {self.teacher_weight} and --branch_weight {self.branch_weight}: must be at least 0"
            )
        if self.freeze_teacher_epochs < 0:
            raise UserError(f"--freeze_teacher_epochs {self.freeze_teacher_epochs}: must be at least 0")


def branch_points(wanted: Sequence[int], blocks: int) -> list[int]:
    """Behind which of the teacher's blocks, counted from 1, branches are grafted; none wanted: all but the last.

    Raises:
        UserError: a place that there is not, or one twice.
    """
    every = list(range(1, blocks))
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(every):
        raise UserError(
            f"--branches {' '.join(map(str, wanted))}: must be some of {' '.join(map(str, every))}, each once"
        )
    return sorted(wanted) or every


class Grafted(Objective):
    """Trains `teacher` together with branches; `options.freeze_teacher_epochs` epochs train the branches alone.

    A frozen teacher is in eval mode, without gradients. A subclass sets `teacher`, `options` and `term_weights`.
    """

    teacher: Network
    options: BranchOptions
    frozen = False
    mixable = True

    @property
    def sparse_gradients(self) -> bool:
        return self.options.freeze_teacher_epochs > 0 or super().sparse_gradients

    def begin_epoch(self, epoch: int) -> None:
        self.frozen = epoch < self.options.freeze_teacher_epochs
        self.teacher.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Grafted":
        super().train(mode)
        if self.frozen:
            self.teacher.eval()
        return self

    def trained_model(self) -> Network:
        return self.teacher

    def advice(self, image_size: int) -> list[str]:
        """A warning where the teacher that is frozen was never trained."""
        options = self.options
        trained = getattr(options, "weights", None) is not None or getattr(options, "pretrained", False)
        if not options.freeze_teacher_epochs or trained:
            return []
        return [
            f"warning: --freeze_teacher_epochs {options.freeze_teacher_epochs} keeps a teacher as it is that was never "
            "trained, while branches learn from it; start from a trained one with --weights RUN"
        ]

    def joint_terms(self, branches: Tensor, teacher: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of eq. 3 to 6 of SFTN: branches' logits [K, N, C], teacher's [N, C].

        The teacher is not detached: every branch's loss reaches it through its feature maps, and the KL through its
        logits, too, as far as `teacher_kl_share` lets it.
        """
        reached = scale_gradient(teacher, self.options.teacher_kl_share)
        branch_ce, branch_kl = self._compare(branches, reached, batch)
        teacher_ce = with_partners(cross_entropy(teacher, batch.labels), teacher, batch)
        return {"teacher_ce": teacher_ce, "branch_ce": branch_ce, "branch_kl": branch_kl}

    def _compare(self, branches: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        direction, temperature = self.options.kl_direction, self.options.temperature
        ce, kl = kd_loss(branches, teacher, batch.labels, temperature=temperature, direction=direction)
        if batch.partners is not None:
            each = [with_partners(*pair, batch) for pair in zip(ce, branches, strict=True)]
            ce = torch.stack(each)
        return ce.mean(), kl.mean()

    def warnings(self, history: list[dict]) -> dict[str, str]:
        """A teacher whose confidence its branches cap.

        The KL's gradient on the teacher's logits is a (p - q), a = alpha times the share that reaches it and q the mean
        of the branches' probabilities, and the cross-entropy's is p - y: they balance at p = (y + a q) / (1 + a).
        """
        row, options = history[-1], self.options
        pull = self.term_weights["branch_kl"] * options.teacher_kl_share
        if self.frozen or not pull or not {"teacher_ce", "branch_ce"} <= row["losses"].keys():
            return {}
        branches, teacher = math.exp(-row["losses"]["branch_ce"]), row["losses"]["teacher_ce"]
        balance = -math.log((options.teacher_weight + pull * branches) / (options.teacher_weight + pull))
        if teacher < CAPPED * balance or balance < 0.2 or row["losses"]["branch_ce"] < teacher:
            return {}
        return {
            "capped": f"the branches hold the teacher back: its training cross-entropy is {teacher:.2f} nats, and with "
            f"branches at {row['losses']['branch_ce']:.2f} and a pull of {pull:g} it cannot fall below about "
            f"{balance:.2f}. Lower --teacher_kl_share or --alpha, or start from a trained teacher (--weights RUN "
            "--freeze_teacher_epochs E), so that the branches learn first."
        }


def scale_gradient(x: Tensor, share: float) -> Tensor:
    """`x`, bit for bit, with its gradient times `share`."""
    if share == 1:
        return x
    fixed = x.detach()
    return fixed + share * (x - fixed)
