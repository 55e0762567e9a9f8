"""A teacher trained for accuracy alone."""

from torch import Tensor

from kernels import cross_entropy
from losses.objective import Objective
from models.network import Network


class Vanilla(Objective):
    """L = CE(q_T, y)."""

    def __init__(self, teacher: Network, options: object, image_size: int):
        super().__init__()
        self.teacher = teacher
        self.term_weights = {"ce": 1.0}

    def forward(
        self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None, views: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"ce": cross_entropy(self.teacher(images), labels)}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"teacher": self.teacher(images)}

    def product(self) -> Network:
        return self.teacher
