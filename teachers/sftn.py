"""SFTN: a teacher trained together with branches of the one student it is meant for.

Source: Park et al., "Learning Student-Friendly Teacher Networks for Knowledge Distillation" (NeurIPS 2021,
arXiv 2102.07650), section 3, eq. 3 to 6.
"""

import torch
from torch import Tensor, nn

from common import UserError
from kernels import cross_entropy, kd_loss
from models import create_model
from models.branches import feature_transform
from models.network import Network, block_shapes, run_blocks
from teachers.grafted import Grafted


class SFTN(Grafted):
    """L = teacher_weight CE(q_T, y) + mean_i [branch_weight CE(q_i, y) + alpha KL(q_i || q_T)].

    Branch i is a transform of the teacher's map behind its block i, then fresh copies of the student's blocks
    i + 1 to N. The teacher is not detached. `--student` names the network of the branches; a smaller or a
    larger one than the student to come is the paper's Table 9.
    """

    def __init__(self, teacher: Network, options, image_size: int):
        super().__init__()
        if options.student is None:
            raise UserError("--student: --method sftn needs the student that the teacher is for")
        self.teacher, self.options = teacher, options
        num_classes = teacher.fc.out_features
        self.branches = nn.ModuleList()
        for index, shape in enumerate(block_shapes(teacher, image_size), start=1):
            student = create_model(options.student, num_classes, options.pool, "--student", image_size)
            if len(student.blocks) != len(teacher.blocks):
                raise UserError(
                    f"--student {options.student}: has {len(student.blocks)} blocks, the teacher {len(teacher.blocks)}"
                )
            transform = feature_transform(shape, block_shapes(student, image_size)[index - 1])
            self.branches.append(nn.Sequential(transform, *student.blocks[index:]))
        self.term_weights = {
            "teacher_ce": options.teacher_weight,
            "branch_ce": options.branch_weight,
            "branch_kl": options.alpha,
        }

    def forward(self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        features, logits = run_blocks(self.teacher, images)
        branches = torch.stack([branch(x) for branch, x in zip(self.branches, features, strict=True)])
        options = self.options
        ce, kl = kd_loss(branches, logits, labels, temperature=options.temperature, direction=options.kl_direction)
        return {"teacher_ce": cross_entropy(logits, labels), "branch_ce": ce.mean(), "branch_kl": kl.mean()}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        features, logits = run_blocks(self.teacher, images)
        found = {f"branch{i}": branch(x) for i, (branch, x) in enumerate(zip(self.branches, features, strict=True), 1)}
        return {"teacher": logits} | found
