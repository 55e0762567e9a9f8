"""GTN: one generic teacher for a whole pool of students.

Source: Binici, Wu, Mitra, "Generalizing Teacher Networks for Effective Knowledge Distillation Across Student
Architectures" (arXiv 2407.16040). Branches as in SFTN (Park et al., NeurIPS 2021), gates as in ProxylessNAS
(Cai et al., ICLR 2019). What the paper leaves open is an option here and marked (ours).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from common import UserError, derive_seed
from kernels import cross_entropy, kd_loss
from losses.objective import Average
from models.branches import graft
from models.network import Network, block_shapes, run_blocks
from models.pool import Pool
from models.supernet import Draw
from teachers.gates import Gates
from teachers.grafted import Grafted, branch_places

COLLAPSED = 0.1  # normalised entropy under which a gate is said to have collapsed
STILL_HIGH = 0.9  # share of its peak that the KL must have left behind by the end


@dataclass
class GTNOptions:
    """Options of --method gtn, the first seven also of --method sftn.

    Args:
        alpha: weight of the KL between branches and teacher (the papers: 3 on CIFAR-100, 1 on ImageNet).
        teacher_weight: weight of the teacher's cross-entropy.
        branch_weight: weight of the branches' cross-entropy.
        temperature: softmax temperature of the KL (the papers: 1).
        kl_direction: reverse is KL(branch || teacher), as SFTN prints it; forward is KL(teacher || branch).
        freeze_teacher_epochs: epochs at the start in which only branches train and the teacher stays as it is, its
            BatchNorm statistics included: for pretrained teachers.
        branches: behind which of the teacher's blocks (1, 2, 3) branches are grafted; default: all.
        alpha_phi: weight of that KL in the gates' loss, at most 0; default -alpha.
        gate_every: every how many iterations one updates the gates instead of the weights; 0: never.
        gate_lr: learning rate of the gates' Adam.
        gate_holdout: part of the training split kept for the gates alone; 0: they share the weights' data.
        full_gates: run all candidates in a gate step instead of two.
        share_branches: branches share the supernet's weights where they overlap.
        save_supernet: save teacher, branches and gates beside the teacher, for student search.
        pool: the student pool.
    """

    alpha: float = 3.0
    teacher_weight: float = 1.0
    branch_weight: float = 1.0
    temperature: float = 1.0
    kl_direction: Literal["reverse", "forward"] = "reverse"
    freeze_teacher_epochs: int = 0
    branches: list[int] = field(default_factory=list)
    alpha_phi: float | None = None
    gate_every: int = 2
    gate_lr: float = 1e-3
    gate_holdout: float = 0.0
    full_gates: bool = False
    share_branches: bool = False
    save_supernet: bool = False
    pool: Pool = field(default_factory=Pool)

    def check_gtn(self) -> None:
        """Raise UserError for values outside their range."""
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if self.alpha < 0 or (self.alpha_phi is not None and self.alpha_phi > 0):
            raise UserError(f"--alpha {self.alpha} must be at least 0, --alpha_phi {self.alpha_phi} at most 0")
        if min(self.teacher_weight, self.branch_weight) < 0:
            raise UserError(
                f"--teacher_weight {self.teacher_weight} and --branch_weight {self.branch_weight}: must be at least 0"
            )
        if self.freeze_teacher_epochs < 0:
            raise UserError(f"--freeze_teacher_epochs {self.freeze_teacher_epochs}: must be at least 0")
        if self.gate_every < 0 or self.gate_every == 1:
            raise UserError(f"--gate_every {self.gate_every}: must be 2 or more, or 0 for fixed gates")
        if not 0 <= self.gate_holdout < 1 or (self.gate_holdout and not self.gate_every):
            raise UserError(f"--gate_holdout {self.gate_holdout}: must be in [0, 1), 0 when --gate_every is 0")
        if self.gate_lr <= 0:
            raise UserError(f"--gate_lr {self.gate_lr}: must be above 0")
        self.pool.check()


class GTN(Grafted):
    """Trains `teacher` together with supernet branches, and in turn the gates that sample their paths.

    Even iterations (phase "weights") minimise CE(q_T, y) + mean_i [CE(q_i, y) + alpha KL] over the teacher
    and the drawn candidates; odd ones (phase "gates") minimise mean_i [CE(q_i, y) + alpha_phi KL] over phi
    alone, with alpha_phi < 0: candidates whose outputs are far from the teacher's keep being visited.
    """

    sparse_gradients = True
    recordable = False

    def __init__(self, teacher: Network, options, image_size: int):
        super().__init__()
        self.teacher = teacher
        self.options = options
        num_classes = teacher.fc.out_features
        shapes = block_shapes(teacher, image_size)
        self.places = branch_places(options.branches, len(teacher.blocks))
        self.branches = graft(shapes, options.pool, num_classes, image_size, options.share_branches, self.places)
        layers = [layer for branch in self.branches for layer in branch.supernet.layers]
        self.gates = Gates([len(layer.names) for layer in layers], options.full_gates)
        self._gate_draws: list[Draw] | None = None  # of the gate step under way
        alpha_phi = -options.alpha if options.alpha_phi is None else options.alpha_phi
        self.term_weights = {"teacher_ce": options.teacher_weight, "branch_ce": options.branch_weight}
        self.term_weights |= {"branch_kl": options.alpha}
        self.term_weights |= {"gate_ce": 1.0, "gate_kl": alpha_phi}
        norms = (nn.modules.batchnorm._BatchNorm,)
        self._norms = tuple(module for module in self.modules() if isinstance(module, norms))

    def phase(self, iteration: int) -> str:
        every = self.options.gate_every
        return "gates" if every and iteration % every == every - 1 else "weights"

    def forward(
        self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None, views: Tensor | None = None
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.options.seed, "paths", iteration))
        if self.phase(iteration) == "gates":
            if self._gate_draws is None:  # a batch in several parts is one step
                self._gate_draws = self.gates.draw_gate_step(generator, images)
            return self._gate_terms(images, labels, self._gate_draws)
        return self._weight_terms(images, labels, self.gates.draw(generator))

    def _weight_terms(self, images: Tensor, labels: Tensor, draws: list[Draw]) -> dict[str, Tensor]:
        features, logits = run_blocks(self.teacher, images)
        # The teacher is not detached: every branch's loss reaches it, through its features and the KL.
        branch_ce, branch_kl = self._compare(self._run_branches(features, draws), logits, labels)
        return {"teacher_ce": cross_entropy(logits, labels), "branch_ce": branch_ce, "branch_kl": branch_kl}

    def _gate_terms(self, images: Tensor, labels: Tensor, draws: list[Draw]) -> dict[str, Tensor]:
        with frozen_statistics(self._norms):
            with torch.no_grad():
                features, logits = run_blocks(self.teacher, images)
            gate_ce, gate_kl = self._compare(self._run_branches(features, draws), logits, labels)
        return {"gate_ce": gate_ce, "gate_kl": gate_kl}

    def _run_branches(self, features: list[Tensor], draws: list[Draw]) -> Tensor:
        logits, rest = [], draws
        for branch, place in zip(self.branches, self.places, strict=True):
            layers = len(branch.supernet.layers)
            logits.append(branch(features[place - 1], rest[:layers]))
            rest = rest[layers:]
        return torch.stack(logits)

    def _compare(self, branches: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        ce, kl = kd_loss(branches, teacher, labels, temperature=options.temperature, direction=options.kl_direction)
        return ce.mean(), kl.mean()

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        """Logits of the teacher and of every branch, the latter on a path drawn by the gates.

        The branches normalise by the batch (ours): the running statistics of a layer average over all the
        paths that led to it, and fit none of them.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.options.seed, "evaluate", seed))
        features, logits = run_blocks(self.teacher, images)
        self.branches.train(len(images) > 1)
        with frozen_statistics(self._norms):
            branches = self._run_branches(features, self.gates.draw(generator))
        self.branches.train(self.training)
        return {"teacher": logits} | {f"branch{i}": each for i, each in zip(self.places, branches, strict=True)}

    def weight_parameters(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters(), *self.branches.parameters()]

    def extra_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # beta1 = 0, as in ProxylessNAS: a candidate that is not drawn must not move.
        adam = torch.optim.Adam([self.gates.phi], lr=self.options.gate_lr, betas=(0.0, 0.999), weight_decay=0.0)
        return {"gates": adam}

    def leaves(self, phase: str) -> list[Tensor] | None:
        return [self.gates.leaf()] if phase == "gates" else None

    def before_update(self, phase: str, average: Average) -> None:
        if phase == "gates":
            self.gates.set_gradient(average)

    def after_update(self, phase: str) -> None:
        if phase == "gates":
            self.gates.finish_update()
            self._gate_draws = None

    def record(self) -> dict:
        """Gate probabilities and normalised entropies by branch and layer ("L2" is the pool's second layer)."""
        probabilities = iter(self.gates.probabilities().tolist())
        entropies = iter(self.gates.normalised_entropy())
        gates, entropy = {}, {}
        for index, branch in zip(self.places, self.branches, strict=True):
            layers = branch.supernet.layers
            first = len(self.options.pool.widths) - len(layers) + 1
            gates[f"branch{index}"], entropy[f"branch{index}"] = {}, {}
            for place, layer in enumerate(layers, start=first):
                named = zip(layer.names, next(probabilities), strict=False)
                gates[f"branch{index}"][f"L{place}"] = {name: round(p, 5) for name, p in named}
                entropy[f"branch{index}"][f"L{place}"] = round(next(entropies), 5)
        return {"gates": gates, "gate_entropy": entropy}

    def warnings(self, history: list[dict]) -> list[str]:
        """The method's known ways to fail: collapsed gates, and a KL that does not fall."""
        found = []
        for branch, layers in history[-1]["gate_entropy"].items():
            for layer, entropy in layers.items():
                if entropy < COLLAPSED:
                    chances = history[-1]["gates"][branch][layer]
                    found.append(
                        f"the gate of {branch} {layer} has collapsed onto '{max(chances, key=chances.get)}' "
                        f"(normalised entropy {entropy:.2f}): the teacher no longer meets the rest of the pool "
                        "there. Lower --gate_lr, or raise --gate_every."
                    )
        kl = [row["losses"]["branch_kl"] for row in history]
        if len(kl) >= 5 and kl[-1] > STILL_HIGH * max(kl):
            found.append(
                f"the branches' KL to the teacher is not falling ({kl[-1]:.3f} nats, its peak was {max(kl):.3f}): "
                "teacher and students do not come together. Raise --alpha, or train longer."
            )
        return found


@contextmanager
def frozen_statistics(norms: tuple[nn.Module, ...]) -> Iterator[None]:
    """Within it BatchNorms in training mode normalise by the batch but leave their running statistics."""
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
