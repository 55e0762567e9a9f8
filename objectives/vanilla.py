"""A teacher trained for accuracy alone."""

from dataclasses import dataclass

from torch import Tensor

from common import UserError
from data.batch import Batch
from engine.objective import Objective
from kernels import cross_entropy
from losses.mixed import with_partners
from models.network import Network


@dataclass
class VanillaOptions:
    """Options of teachers trained by cross-entropy alone.

    Args:
        smoothing: label smoothing: the share of the target that is spread evenly over all classes.
    """

    title = "vanilla teacher"

    smoothing: float = 0.0

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing {self.smoothing}: must be at least 0 and below 1")


class Vanilla(Objective):
    """L = CE(q_T, y'), y' = (1 - smoothing) y + smoothing / C."""

    mixable = True

    def __init__(self, teacher: Network, options: VanillaOptions, image_size: int):
        super().__init__()
        self.teacher, self.options = teacher, options
        self.term_weights = {"ce": 1.0}

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        logits, smoothing = self.teacher(batch.images), self.options.smoothing
        ce = cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        return {"ce": with_partners(ce, logits, batch, smoothing)}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"teacher": self.teacher(images)}

    def trained_model(self) -> Network:
        return self.teacher
