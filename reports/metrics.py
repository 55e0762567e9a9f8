"""What a network's outputs say of it, and of how alike it and its teacher are.

Functions take logits [N, C], embeddings [N, D] or labels [N] of any number of images and compute in float64.
`Similarity` accumulates over batches, so that no set of feature maps is ever held.

Sources: expected calibration error by Guo et al. (arXiv 1706.04599), eq. 3; KL and CKA between teachers and students
by Park et al., SFTN (arXiv 2102.07650), Table 8; linear CKA by Kornblith et al. (arXiv 1905.00414), its minibatch form
with the unbiased HSIC by Nguyen et al. (arXiv 2010.15327), eq. 2 and 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in its paper


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """Mean over images of KL(p || q) in nats, p and q the softmax of logits [N, C] at temperature 1."""
    p, q = p_logits.double().log_softmax(1), q_logits.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def agreement(one: Tensor, other: Tensor) -> float:
    """Percent of images whose most likely class is the same by both logits [N, C]."""
    return 100 * float((one.argmax(1) == other.argmax(1)).double().mean())


def confidence(logits: Tensor) -> float:
    """Mean probability of the most likely class, of logits [N, C]."""
    return float(logits.double().softmax(1).amax(1).mean())


def entropy(logits: Tensor) -> float:
    """Mean entropy in nats of the softmax of logits [N, C]."""
    return float(torch.special.entr(logits.double().softmax(1)).sum(1).mean())


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats of logits [N, C] and labels [N]."""
    return float(-logits.double().log_softmax(1).gather(1, labels[:, None]).mean())


def calibration_bins(confidences: Tensor, correct: Tensor, bins: int = BINS) -> Tensor:
    """Sums [3, bins] over the images of bins of equal width: 1, confidence and correctness; of [N] in (0, 1] each.

    A bin holds its upper edge. Those of parts of a set add up to the set's.
    """
    numbers = (confidences.double() * bins).ceil().long().clamp(1, bins) - 1
    values = torch.stack([torch.ones_like(numbers), confidences, correct]).double()
    return values.new_zeros(3, bins).index_add_(1, numbers, values)


def reliability(bins: Tensor) -> list[dict[str, float]]:
    """Of `calibration_bins`: `share` of the images, mean `confidence`, `accuracy`. Empty bins are left out."""
    return [
        {"share": images / float(bins[0].sum()), "confidence": confidence / images, "accuracy": right / images}
        for images, confidence, right in bins.T.tolist()
        if images
    ]


def calibration_error(bins: Tensor) -> float:
    """ECE in [0, 1]: sum over `calibration_bins` of their share times |accuracy - confidence|."""
    return sum(each["share"] * abs(each["accuracy"] - each["confidence"]) for each in reliability(bins))


def bootstrap_interval(right: int, images: int, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% interval in percent of an accuracy of `right` in `images`, by resampling images.

    The number of successes in a resample is binomial: it is drawn as that, not image by image.
    """
    source = torch.Generator().manual_seed(seed)
    rates = torch.full((samples,), right / images)
    counts = torch.binomial(torch.full((samples,), float(images)), rates, generator=source)
    low, high = torch.quantile(
        counts.double() / images * 100, torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return low, high


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA in [0, 1] of two embeddings [N, D] and [N, E] of the same images (Kornblith et al., eq. 5).

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of the centred X and Y; biased towards 1 where N is not far above D.
    """
    x, y = (each.double() - each.double().mean(0) for each in (one, other))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def unbiased_hsic(ks: Tensor, others: Tensor) -> Tensor:
    """HSIC_1 [A, B] of every pair of Gram matrices [A, n, n] and [B, n, n], n >= 4 (Nguyen et al., eq. 3).

    Their diagonals are not used.
    """
    n = ks.shape[1]
    ks, others = (each - each.diagonal(dim1=1, dim2=2).diag_embed() for each in (ks, others))
    sums, other_sums = ks.sum(1), others.sum(1)
    both = ks.flatten(1) @ others.flatten(1).T
    apart = sums.sum(1)[:, None] * other_sums.sum(1)
    return (both + apart / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ other_sums.T)) / (n * (n - 3))


class Similarity:
    """Linear CKA between every feature of one network and every feature of another, accumulated over batches.

    The sum over batches of HSIC_1(K, L) over the root of those of HSIC_1(K, K) and HSIC_1(L, L): unbiased in each of
    the three, whatever the size of the batches.
    """

    def __init__(self) -> None:
        self.ones = 0  # A
        self.sums: Tensor | None = None  # [A + B, A + B] HSIC of every pair, which adds up over batches and processes

    def update(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Features [n, ...] of the same n >= 4 images, A of one network and B of the other."""
        grams = torch.stack([self._gram(each) for each in (*ones, *others)])
        found = unbiased_hsic(grams, grams)
        self.ones, self.sums = len(ones), found if self.sums is None else self.sums + found

    def matrix(self) -> list[list[float]]:
        """CKA [A][B]."""
        norms = self.sums.diagonal().clamp(min=1e-300).sqrt()
        return (self.sums / norms / norms[:, None])[: self.ones, self.ones :].tolist()

    @staticmethod
    def _gram(features: Tensor) -> Tensor:
        """Of the centred features, in which HSIC is the same and float32 keeps what it is made of."""
        flat = features.flatten(1).float()
        flat = flat - flat.mean(0)
        return (flat @ flat.T).double()
