"""Losses on logits."""

from torch import Tensor, nn

from kernels import cross_entropy, kd_loss


class LabelsOnly(nn.Module):
    """Cross-entropy with the labels: the student trained alone, the baseline of every method."""

    def __init__(self, alpha: float, temperature: float):
        super().__init__()
        self.term_weights = {"ce": 1.0}

    def forward(self, student: Tensor, teacher: None, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(student, labels)}


class KD(nn.Module):
    """L = (1 - alpha) CE(q, y) + alpha T^2 KL(p_T^t || q_T^t) (Hinton et al., 2015); usually alpha 0.9, T 4.

    `student` and `teacher` are logits [N, C], `labels` [N]; the logged "kl" is the plain divergence in nats
    at temperature T, before the factor T^2.
    """

    def __init__(self, alpha: float, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.term_weights = {"ce": 1.0 - alpha, "kl": alpha * temperature**2}

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        ce, kl = kd_loss(student, teacher, labels, temperature=self.temperature)
        return {"ce": ce[0], "kl": kl[0]}
