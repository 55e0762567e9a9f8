"""Knowledge-distillation losses: one row in `METHODS` for each."""

from dataclasses import dataclass

from losses.logits import KD, LabelsOnly


@dataclass(frozen=True)
class Method:
    """A way to train a student: its loss class, its source, and whether it has a teacher at all."""

    loss: type
    paper: str
    needs_teacher: bool = True


METHODS = {
    "kd": Method(KD, "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015)"),
    "none": Method(LabelsOnly, "no distillation: the student trained alone", needs_teacher=False),
}
