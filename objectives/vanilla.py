"""A teacher trained for accuracy alone."""

from torch import Tensor

from data.batch import Batch
from engine.objective import Objective
from kernels import cross_entropy
from models.network import Network


class Vanilla(Objective):
    """L = CE(q_T, y)."""

    def __init__(self, teacher: Network, options: object, image_size: int):
        super().__init__()
        self.teacher = teacher
        self.term_weights = {"ce": 1.0}

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        return {"ce": cross_entropy(self.teacher(batch.images), batch.labels)}

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"teacher": self.teacher(images)}

    def trained_model(self) -> Network:
        return self.teacher
