"""What SFTN and GTN have in common: a teacher with branches, which may stay as it is for a while."""

from collections.abc import Sequence

from common import UserError
from losses.objective import Objective
from models.network import Network


def branch_places(wanted: Sequence[int], blocks: int) -> list[int]:
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

    A frozen teacher is in eval mode, without gradients. A subclass sets `teacher` and `options`.
    """

    teacher: Network
    options: object
    frozen = False

    @property
    def sparse_gradients(self) -> bool:
        return self.options.freeze_teacher_epochs > 0

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
