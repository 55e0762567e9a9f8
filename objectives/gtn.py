"""GTN: one generic teacher for a whole pool of students.

Source: Binici, Wu, Mitra, "Generalizing Teacher Networks for Effective Knowledge Distillation Across Student
Architectures" (arXiv 2407.16040). Branches as in SFTN (Park et al., NeurIPS 2021), gates as in ProxylessNAS
(Cai et al., ICLR 2019). What the paper leaves open is an option here and marked (not in the paper).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from common import UserError, derive_seed, write_atomically
from data.batch import Batch
from data.splits import AnySplit
from engine.checkpoint import state_tensors
from engine.objective import Phase
from models.branches import graft
from models.network import Network, block_shapes, count_parameters, cut, macs, run_blocks
from models.supernet import Draw
from objectives.gates import Gates
from objectives.grafted import BranchOptions, Grafted, branch_points

COLLAPSED = 0.1  # normalised entropy under which a gate counts as collapsed
LARGE_BRANCHES = 10.0  # times the teacher's multiply-accumulates: a step's price is worth a line
SMALL_BRANCHES = 3.0  # times the teacher's multiply-accumulates: the largest ratio measured
STILL_HIGH = 0.9  # share of its peak that the KL must have left behind by the end


@dataclass
class GTNOptions(BranchOptions):
    """Options of GTN.

    Args:
        alpha_phi: weight of that KL in the gates' loss, at most 0; default -alpha.
        gate_every: every how many iterations one updates the gates instead of the weights; 0: never.
        gate_steps: replace: a gate step takes the place, and the batch, of a step of the weights; add: it comes
            on top, on the batch of the step that follows. With --gate_holdout it always comes on top.
        gate_lr: learning rate of the gates' Adam.
        gate_holdout: part of the training split kept for the gates alone; 0: they share the weights' data.
        full_gates: run all candidates in a gate step instead of two.
        paths: a path of its own for every branch, or one, whose ends all branches run (the paper leaves it open).
        share_branches: branches share the supernet's weights where they overlap.
        save_supernet: save teacher, branches and gates beside the teacher, for student search.
        pool_students: students of the pool, named as for distill.py (pool:SEED, specs as .json): the supernet offers
            in each layer what these take there, and nothing else. Their specs are kept in students/.
    """

    alpha_phi: float | None = None
    gate_every: int = 2
    gate_steps: Literal["replace", "add"] = "replace"
    gate_lr: float = 1e-3
    gate_holdout: float = 0.0
    full_gates: bool = False
    paths: Literal["own", "one"] = "own"
    share_branches: bool = False
    save_supernet: bool = False
    pool_students: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        super().check()
        if self.alpha_phi is not None and self.alpha_phi > 0:
            raise UserError(f"--alpha_phi {self.alpha_phi}: must be at most 0")
        if self.gate_every < 0 or self.gate_every == 1:
            raise UserError(f"--gate_every {self.gate_every}: must be 2 or more, or 0 for fixed gates")
        if not 0 <= self.gate_holdout < 1 or (self.gate_holdout and not self.gate_every):
            raise UserError(f"--gate_holdout {self.gate_holdout}: must be in [0, 1), 0 when --gate_every is 0")
        if self.gate_lr <= 0:
            raise UserError(f"--gate_lr {self.gate_lr}: must be above 0")


class GTN(Grafted):
    """Trains `teacher` together with supernet branches, and in turn the gates that sample their paths.

    Even iterations minimise CE(q_T, y) + mean_i [CE(q_i, y) + alpha KL] over the teacher
    and the drawn candidates; odd ones, of the phase "gates", minimise mean_i [CE(q_i, y) + alpha_phi KL] over phi
    alone, with alpha_phi < 0: candidates whose outputs are far from the teacher's keep being visited.
    """

    sparse_gradients = True
    capturable = False  # paths change from step to step

    def __init__(self, teacher: Network, options: GTNOptions, image_size: int, gate_split: AnySplit | None = None):
        super().__init__()
        self.teacher = teacher
        self.options, self.pool = options, options.pool
        cut(teacher, options.teacher_cut)
        num_classes = len(teacher.fc.weight)
        shapes = block_shapes(teacher, image_size)
        self.branch_points = branch_points(options.branches, len(shapes) + 1)
        self.branches = graft(shapes, options.pool, num_classes, image_size, options.share_branches, self.branch_points)
        branches = self.branches[:1] if options.paths == "one" else self.branches  # the first has the most layers
        layers = [layer for branch in branches for layer in branch.supernet.layers]
        self.gates = Gates([len(layer.names) for layer in layers], options.full_gates)
        self._gate_draws: list[Draw] | None = None  # of the gate step under way
        alpha_phi = -options.alpha if options.alpha_phi is None else options.alpha_phi
        self.term_weights = {"teacher_ce": options.teacher_weight, "branch_ce": options.branch_weight}
        self.term_weights |= {"branch_kl": options.alpha}
        self.term_weights |= {"gate_ce": 1.0, "gate_kl": alpha_phi}
        self.phases = (self._gate_phase(gate_split),)
        norms = (nn.modules.batchnorm._BatchNorm,)
        self._norms = tuple(module for module in self.modules() if isinstance(module, norms))

    def phase(self, iteration: int) -> Phase | None:
        every = self.options.gate_every
        return self.phases[0] if every and iteration % every == every - 1 else None

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.options.seed, "paths", iteration))
        if self.phase(iteration) is not None:
            if self._gate_draws is None:  # a batch in several parts is one step
                self._gate_draws = self.gates.draw_gate_step(generator, batch.images)
            return self._gate_terms(batch, self._gate_draws)
        return self._weight_terms(batch, self.gates.draw(generator))

    def _weight_terms(self, batch: Batch, draws: list[Draw]) -> dict[str, Tensor]:
        features, logits = run_blocks(self.teacher, batch.images)
        return self.joint_terms(self._run_branches(features, draws), logits, batch)

    def _gate_terms(self, batch: Batch, draws: list[Draw]) -> dict[str, Tensor]:
        with frozen_statistics(self._norms):
            with torch.no_grad():
                features, logits = run_blocks(self.teacher, batch.images)
            gate_ce, gate_kl = self._compare(self._run_branches(features, draws), logits, batch)
        return {"gate_ce": gate_ce, "gate_kl": gate_kl}

    def _run_branches(self, features: list[Tensor], draws: list[Draw]) -> Tensor:
        """Logits [K, N, C]."""
        rows = self._by_branch(draws)
        at = [features[place - 1] for place in self.branch_points]
        return torch.stack([branch(x, row) for branch, x, row in zip(self.branches, at, rows, strict=True)])

    def _by_branch(self, rows: Sequence) -> list[Sequence]:
        """What there is of each gated layer, parted by branch; of one path each branch has the end."""
        sizes = [len(branch.supernet.layers) for branch in self.branches]
        if self.options.paths == "one":
            return [rows[len(rows) - size :] for size in sizes]
        return [rows[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        """Logits of the teacher and of every branch, the latter on a path drawn by the gates.

        The branches normalise by the batch (not in the paper): the running statistics of a layer average over all the
        paths that led to it, and fit none of them.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.options.seed, "evaluate", seed))
        features, logits = run_blocks(self.teacher, images)
        self.branches.train(len(images) > 1)
        with frozen_statistics(self._norms):
            branches = self._run_branches(features, self.gates.draw(generator))
        self.branches.train(self.training)
        return {"teacher": logits} | {f"branch{i}": each for i, each in zip(self.branch_points, branches, strict=True)}

    def weight_parameters(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters(), *self.branches.parameters()]

    def pieces(self) -> list[list[nn.Module]]:
        """The teacher's blocks and, of every branch, its transform, its layers' candidates and its head."""
        cuttable = type(self.teacher).run_blocks is Network.run_blocks
        places = [[block] for block in self.teacher.blocks] if cuttable else []
        shared = self.options.share_branches  # of those the first has all that the others have but their transforms
        for branch in self.branches[:1] if shared else self.branches:
            supernet = branch.supernet
            places += [
                [supernet.stem],
                *(list(layer.candidates.values()) for layer in supernet.layers),
                [supernet.head],
            ]
        return places + [[branch.transform] for branch in self.branches]

    def _gate_phase(self, split: AnySplit | None) -> Phase:
        # beta1 = 0, as in ProxylessNAS: a candidate that is not drawn must not move.
        adam = torch.optim.Adam([self.gates.phi], lr=self.options.gate_lr, betas=(0.0, 0.999), weight_decay=0.0)
        return Phase(
            "gates",
            adam,
            grad_inputs=lambda: [self.gates.leaf()],
            before_update=self.gates.set_gradient,
            after_update=self._end_gate_step,
            additional=self.options.gate_steps == "add" or split is not None,
            split=split,
        )

    def _end_gate_step(self) -> None:
        self.gates.finish_update()
        self._gate_draws = None

    def record(self) -> dict:
        """Gate probabilities and normalised entropies by branch and layer ("L2" is the pool's second layer)."""
        probabilities = self._by_branch(self.gates.probabilities().tolist())
        entropies = self._by_branch(self.gates.normalised_entropy())
        gates, entropy = {}, {}
        for i, index in enumerate(self.branch_points):
            layers = self.branches[i].supernet.layers
            first = len(self.options.pool.widths) - len(layers) + 1
            gates[f"branch{index}"], entropy[f"branch{index}"] = {}, {}
            for place, layer in enumerate(layers):
                named = zip(layer.names, probabilities[i][place], strict=False)
                gates[f"branch{index}"][f"L{first + place}"] = {name: round(p, 5) for name, p in named}
                entropy[f"branch{index}"][f"L{first + place}"] = round(entropies[i][place], 5)
        return {"gates": gates, "gate_entropy": entropy}

    def save_beside(self, folder: Path) -> None:
        """With --save_supernet branches and gates, the pool and the gates' probabilities as JSON in the metadata."""
        if not self.options.save_supernet:
            return
        names = ("branches.", "gates.phi")
        tensors = {name: tensor for name, tensor in state_tensors(self).items() if name.startswith(names)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"pool": json.dumps(asdict(self.pool)), "gates": json.dumps(self.record()["gates"])}
        write_atomically(folder / "supernet.safetensors", safetensors.torch.save(tensors, metadata))

    def warnings(self, history: list[dict]) -> dict[str, str]:
        """The method's known ways to fail: collapsed gates, a KL that does not fall, a teacher that is held back."""
        found = super().warnings(history)
        for branch, layers in history[-1].get("gate_entropy", {}).items():
            for layer, entropy in layers.items():
                if entropy < COLLAPSED:
                    chances = history[-1]["gates"][branch][layer]
                    found[f"collapsed {branch} {layer}"] = (
                        f"the gate of {branch} {layer} has collapsed onto '{max(chances, key=chances.get)}' "
                        f"(normalised entropy {entropy:.2f}): the teacher no longer meets the rest of the pool "
                        "there. Lower --gate_lr, or raise --gate_every."
                    )
        kl = [row["losses"]["branch_kl"] for row in history if "branch_kl" in row["losses"]]
        if len(kl) >= 5 and kl[-1] > STILL_HIGH * max(kl):
            found["kl"] = (
                f"the branches' KL to the teacher is not falling ({kl[-1]:.3f} nats, its peak was {max(kl):.3f}): "
                "teacher and branches do not come together. Train longer, or help the branches: --share_branches, a "
                "narrower --pool, a trained teacher to start from (--weights RUN --freeze_teacher_epochs E)."
            )
        return found

    def advice(self, image_size: int) -> list[str]:
        """What the branches cost and, by the measurements of docs/results.md, whether they are likely to help."""
        options, probe = self.options, self.teacher.fc.weight.new_zeros(1, 3, image_size, image_size)
        teacher, branches = macs(self.teacher, probe)[0], self.branch_macs(image_size)
        weights = count_parameters(self.branches)
        lines = [
            *super().advice(image_size),
            f"branches: {weights / 1e6:,.1f} million parameters, {branches / 1e6:,.1f} million multiply-accumulates an "
            f"image (mean path), {branches / teacher:.1f} times the teacher's {teacher / 1e6:,.1f}",
        ]
        if branches > LARGE_BRANCHES * teacher:
            lines.append(
                f"a step computes about {1 + branches / teacher:.0f} times what a vanilla teacher's does, with the "
                "narrow pool of recipes/make_generic.yaml a few times"
            )
        pull = options.alpha * options.teacher_kl_share
        if branches < SMALL_BRANCHES * teacher and pull >= 1 and not options.freeze_teacher_epochs:
            lines.append(
                f"warning: with branches this small a pull of {pull:g} (alpha times teacher_kl_share) has cost the "
                "teacher accuracy wherever it was measured (docs/results.md). --teacher_kl_share 0.1, or a trained "
                "teacher to start from (--weights RUN --freeze_teacher_epochs E), keeps it."
            )
        return lines

    def branch_macs(self, image_size: int, uniform: bool = False) -> float:
        """Multiply-accumulates of one image in all branches together, averaged over the gates' paths.

        `uniform`: over all paths alike, as before training; this needs no values, and works on the `meta` device.
        """
        shapes = block_shapes(self.teacher, image_size)
        if uniform:
            layers = [branch.supernet.layers for branch in self.branches]
            rows = [[[1 / len(layer.names)] * len(layer.names) for layer in each] for each in layers]
        else:
            rows = self._by_branch(self.gates.probabilities().tolist())
        return sum(
            branch.macs(shapes[place - 1], chances)
            for branch, place, chances in zip(self.branches, self.branch_points, rows, strict=True)
        )


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
