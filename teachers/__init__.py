"""What a teacher is trained for: one row in `TEACHERS` for each method."""

from dataclasses import dataclass

from losses.objective import Objective
from teachers.gtn import GTN
from teachers.vanilla import Vanilla


@dataclass(frozen=True)
class Method:
    """A way to train a teacher: objective(teacher, options, image_size) and its source."""

    objective: type[Objective]
    paper: str


TEACHERS = {
    "vanilla": Method(Vanilla, "cross-entropy with the labels"),
    "gtn": Method(GTN, "Binici, Wu, Mitra: Generalizing Teacher Networks (arXiv 2407.16040, 2024)"),
}
