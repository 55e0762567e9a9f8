"""What a teacher is trained for: one row in `TEACHERS` for each method."""

from dataclasses import dataclass

from data.splits import AnySplit
from engine.objective import Objective
from models.network import Network
from objectives.gtn import GTN
from objectives.mse import MSE
from objectives.sftn import SFTN
from objectives.vanilla import Vanilla


@dataclass(frozen=True)
class TeacherMethod:
    """A way to train a teacher: its objective and its source."""

    objective: type[Objective]
    paper: str

    def build(self, teacher: Network, options, image_size: int, gate_split: AnySplit | None = None) -> Objective:
        """The objective of a run with these options; `gate_split` are images for gates alone."""
        own = (gate_split,) if gate_split is not None else ()
        return self.objective(teacher, options, image_size, *own)


TEACHERS = {
    "vanilla": TeacherMethod(Vanilla, "cross-entropy with the labels"),
    "mse": TeacherMethod(
        MSE, "Hamidi et al.: How to Train the Teacher Model for Effective KD (arXiv 2407.18041, 2024)"
    ),
    "sftn": TeacherMethod(SFTN, "Park et al.: Learning Student-Friendly Teacher Networks (arXiv 2102.07650, 2021)"),
    "gtn": TeacherMethod(GTN, "Binici, Wu, Mitra: Generalizing Teacher Networks (arXiv 2407.16040, 2024)"),
}
