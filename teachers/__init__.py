"""What a teacher is trained for: one row in `TEACHERS` for each method."""

from dataclasses import dataclass

from losses.objective import Objective
from teachers.gtn import GTN
from teachers.mse import MSE
from teachers.sftn import SFTN
from teachers.vanilla import Vanilla


@dataclass(frozen=True)
class Method:
    """A way to train a teacher: objective(teacher, options, image_size) and its source."""

    objective: type[Objective]
    paper: str


TEACHERS = {
    "vanilla": Method(Vanilla, "cross-entropy with the labels"),
    "mse": Method(MSE, "Hamidi et al.: How to Train the Teacher Model for Effective Knowledge Distillation (2024)"),
    "sftn": Method(SFTN, "Park et al.: Learning Student-Friendly Teacher Networks (arXiv 2102.07650, 2021)"),
    "gtn": Method(GTN, "Binici, Wu, Mitra: Generalizing Teacher Networks (arXiv 2407.16040, 2024)"),
}
