"""The objective of distill.py: a student, a frozen teacher, and the loss between them."""

import torch
from torch import Tensor, nn

from losses.objective import Objective


class Distillation(Objective):
    """Trains `student` with `loss`; `teacher` is frozen and only asked.

    Args:
        student: the network to train.
        loss: loss(student_logits, teacher_logits, labels) -> terms, with `term_weights`.
        teacher: a trained network, or None for a loss that needs none.
    """

    def __init__(self, student: nn.Module, loss: nn.Module, teacher: nn.Module | None):
        super().__init__()
        self.student = student
        self.loss = loss
        self.term_weights = loss.term_weights
        # In a tuple, the teacher is no submodule: not trained, not averaged over processes, not in
        # checkpoints, not put into training mode.
        self.frozen = () if teacher is None else (teacher.requires_grad_(False).eval(),)

    def forward(self, images: Tensor, labels: Tensor, iteration: int) -> dict[str, Tensor]:
        return self.loss(self.student(images), self._ask_teacher(images), labels)

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"student": self.student(images)}

    def product(self) -> nn.Module:
        return self.student

    def _apply(self, fn, recurse: bool = True):
        for teacher in self.frozen:  # follows the student to its device and memory format
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad and not inference_mode: inference tensors cannot be saved for the loss's backward pass.
    @torch.no_grad()
    def _ask_teacher(self, images: Tensor) -> Tensor | None:
        return self.frozen[0](images) if self.frozen else None
