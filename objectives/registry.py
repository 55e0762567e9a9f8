"""What a teacher is trained for: one row in `TEACHERS` for each method."""

from dataclasses import dataclass

from data.splits import AnySplit
from engine.objective import Objective
from models.network import Network
from objectives.grafted import PoolOptions
from objectives.gtn import GTN, GTNOptions
from objectives.mse import MSE
from objectives.sftn import SFTN, SFTNOptions
from objectives.vanilla import Vanilla, VanillaOptions


@dataclass(frozen=True)
class TeacherMethod:
    """A way to train a teacher: its objective, its source and the dataclass of its own options."""

    objective: type[Objective]
    paper: str
    options: type | None = None

    def reads(self, model: str | None = None) -> tuple[type, ...]:
        """The dataclasses of options that matter to a teacher `model`."""
        found = (self.options, PoolOptions if model and model.startswith("pool:") else None)
        return tuple(each for each in found if each is not None)

    def build(self, teacher: Network, options, image_size: int, gate_split: AnySplit | None = None) -> Objective:
        """The objective of a run with these options; `gate_split` are images for gates alone."""
        own = (gate_split,) if gate_split is not None else ()
        return self.objective(teacher, options, image_size, *own)


TEACHERS = {
    "vanilla": TeacherMethod(Vanilla, "cross-entropy with the labels", VanillaOptions),
    "mse": TeacherMethod(
        MSE, "Hamidi et al.: How to Train the Teacher Model for Effective KD (arXiv 2407.18041, 2024)"
    ),
    "sftn": TeacherMethod(
        SFTN, "Park et al.: Learning Student-Friendly Teacher Networks (arXiv 2102.07650, 2021)", SFTNOptions
    ),
    "gtn": TeacherMethod(GTN, "Binici, Wu, Mitra: Generalizing Teacher Networks (arXiv 2407.16040, 2024)", GTNOptions),
}
