"""What SFTN and GTN have in common: a teacher with branches, which may stay as it is for a while."""

from losses.objective import Objective
from models.network import Network


class Grafted(Objective):
    """Trains `teacher` together with branches; `options.freeze_teacher_epochs` epochs train the branches alone.

    A frozen teacher is in eval mode, without gradients. A subclass sets `teacher` and `options`.
    """

    teacher: Network
    options: object
    frozen = False

    def begin_epoch(self, epoch: int) -> None:
        self.frozen = epoch < self.options.freeze_teacher_epochs
        self.teacher.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Grafted":
        super().train(mode)
        if self.frozen:
            self.teacher.eval()
        return self

    def product(self) -> Network:
        return self.teacher
