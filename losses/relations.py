"""Methods that compare relations between the images of a batch: SP, CC, RKD, PKT.

In runs of several processes each compares the images of its own part of the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batch
from losses.adapters import by_pixel
from losses.method import Method, Outputs, full_precision

TINY = 1e-12


class SP(Method):
    """||G_S - G_T||_F^2 / N^2, G the similarities F F^T of the last maps, each row of length 1 (Tung and Mori,
    eq. 3 and 4)."""

    paper = "Tung, Mori: Similarity-Preserving Knowledge Distillation (2019)"
    weight, terms = 3000.0, {"sp": 1.0}
    student_features = teacher_features = "maps"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"sp": similarity_preserving(student.maps[-1], teacher.maps[-1])}


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Of maps [N, ...], whose shapes need not agree."""

    def similarities(maps: Tensor) -> Tensor:
        flat = by_pixel(maps)
        return F.normalize(flat @ flat.T, dim=1)

    return (similarities(student) - similarities(teacher)).square().mean()


class CC(Method):
    """||K_S - K_T||_F^2 / N^2 for kernel matrices of the embeddings (Peng et al., eq. 5, 9 and 10): a Gaussian
    with gamma 0.4 by its Taylor series to the second power, on l2-normalised embeddings.

    Kernel matrices are N x N whatever the widths are, so that no layer brings the embeddings to one width;
    the field's code has two trainable ones, which can shrink both sides to nothing, and compares neighbours
    in the batch only, which is another loss in all but the name.

    The field's weight of 0.02 does nothing here: kernels of embeddings of length 1 differ by hundredths, and the
    gradient is a thousandth of the cross-entropy's. At 100 it is 3 to 7 times the cross-entropy's, as those of PKT, SP
    and RKD are 2 to 26 times at theirs (resnet8 from resnet20 on digits, batches of 64, untrained and trained).
    """

    paper = "Peng et al.: Correlation Congruence for Knowledge Distillation (2019)"
    weight, terms = 100.0, {"cc": 1.0}
    student_features = teacher_features = "embedding"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"cc": correlation_congruence(student.embedding, teacher.embedding)}


@full_precision
def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, powers: int = 2) -> Tensor:
    """Of embeddings [N, D]."""

    def kernel(embedding: Tensor) -> Tensor:
        x = F.normalize(embedding, dim=1)
        products = x @ x.T
        series = sum((2 * gamma) ** p / math.factorial(p) * products**p for p in range(powers + 1))
        return math.exp(-2 * gamma) * series

    return (kernel(student) - kernel(teacher)).square().mean()


class RKD(Method):
    """25 x distance-wise + 50 x angle-wise loss on embeddings (Park et al., eq. 5 to 9), Huber on both.

    Distances are over their mean, angles cosines at every triple; means are over all N^2 and N^3.
    """

    paper = "Park et al.: Relational Knowledge Distillation (2019)"
    weight, terms = 1.0, {"rkd_distance": 25.0, "rkd_angle": 50.0}
    usual = "25 distance, 50 angle"
    student_features = teacher_features = "embedding"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        student, teacher = student.embedding, teacher.embedding
        return {"rkd_distance": distances_loss(student, teacher), "rkd_angle": angles_loss(student, teacher)}


@full_precision
def distances_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: Huber loss of two batches' relative distances, of embeddings [N, D]."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def relative_distances(embedding: Tensor) -> Tensor:
    """[N, D] -> [N, N] over the mean of those above 0; differences, not the Gram trick, which cancels."""
    squares = (embedding[:, None] - embedding[None]).square().sum(2)
    apart = squares > TINY
    distances = torch.where(apart, squares, 1.0).sqrt() * apart  # no gradient of a root at 0
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=TINY)


@full_precision
def angles_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: Huber loss of two batches' angles, of embeddings [N, D]."""
    return F.smooth_l1_loss(angles(student), angles(teacher))


def angles(embedding: Tensor) -> Tensor:
    """[N, D] -> [N, N, N]: at image i, the cosine between the directions to j and to k."""
    directions = F.normalize(embedding[None] - embedding[:, None], dim=2, eps=TINY)
    return torch.bmm(directions, directions.transpose(1, 2))


class PKT(Method):
    """mean over N^2 pairs of p_T log(p_T / p_S), p: rows of (1 + cosine) / 2 of the embeddings over their sum
    (Passalis and Tefas, eq. 3 to 6)."""

    paper = "Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer (2018)"
    weight, terms = 30000.0, {"pkt": 1.0}
    student_features = teacher_features = "embedding"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"pkt": probabilistic_transfer(student.embedding, teacher.embedding)}


@full_precision
def probabilistic_transfer(student: Tensor, teacher: Tensor, tiny: float = 1e-7) -> Tensor:
    """Of embeddings [N, D], whose widths need not agree."""

    def probabilities(embedding: Tensor) -> Tensor:
        x = embedding / (embedding.norm(dim=1, keepdim=True) + tiny)
        similar = (x @ x.T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    p, q = probabilities(teacher), probabilities(student)
    return (p * ((p + tiny) / (q + tiny)).log()).mean()
