"""SFTN: a teacher trained together with branches of the one student it is meant for.

Source: Park et al., "Learning Student-Friendly Teacher Networks for Knowledge Distillation" (NeurIPS 2021,
arXiv 2102.07650), section 3, eq. 3 to 6.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from models import create_model
from models.branches import feature_transform
from models.network import Network, block_shapes, cut, run_blocks
from objectives.grafted import BranchOptions, Grafted, branch_points


@dataclass
class SFTNOptions(BranchOptions):
    """Options of SFTN.

    Args:
        student: the one student that the branches stand for, named as for distill.py.
    """

    student: str | None = None


class SFTN(Grafted):
    """L = teacher_weight CE(q_T, y) + mean_i [branch_weight CE(q_i, y) + alpha KL(q_i || q_T)].

    Branch i is a transform of the teacher's map behind its block i, then fresh copies of the student's blocks
    i + 1 to N. The teacher is not detached. `--student` names the network of the branches; a smaller or a
    larger one than the student to come is the paper's Table 9.
    """

    def __init__(self, teacher: Network, options: SFTNOptions, image_size: int):
        super().__init__()
        if options.student is None:
            raise UserError("--student: --method sftn needs the student that the teacher is for")
        self.teacher, self.options = teacher, options
        cut(teacher, options.teacher_cut)
        num_classes = len(teacher.fc.weight)
        shapes = block_shapes(teacher, image_size)
        self.branch_points = branch_points(options.branches, len(shapes) + 1)
        self.branches = nn.ModuleList()
        for index in self.branch_points:
            student = create_model(options.student, num_classes, options.pool, "--student", image_size)
            if len(student.blocks) != len(shapes) + 1:
                raise UserError(
                    f"--student {options.student}: has {len(student.blocks)} blocks, the teacher {len(shapes) + 1}"
                )
            transform = feature_transform(shapes[index - 1], block_shapes(student, image_size)[index - 1])
            self.branches.append(nn.Sequential(transform, *student.blocks[index:]))
        self.term_weights = {
            "teacher_ce": options.teacher_weight,
            "branch_ce": options.branch_weight,
            "branch_kl": options.alpha,
        }

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        branches, logits = self._run(batch.images)
        return self.joint_terms(torch.stack(branches), logits, batch)

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        branches, logits = self._run(images)
        return {"teacher": logits} | {f"branch{i}": each for i, each in zip(self.branch_points, branches, strict=True)}

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The branches' logits, and the teacher's."""
        features, logits = run_blocks(self.teacher, images)
        return [branch(features[i - 1]) for i, branch in zip(self.branch_points, self.branches, strict=True)], logits
