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


def reliability(confidences: Tensor, correct: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Of bins of equal width over confidences [N] in (0, 1]: `share` of the images, mean `confidence`, `accuracy`.

    A bin holds its upper edge; empty bins are left out.
    """
    numbers = (confidences.double() * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for number in range(bins):
        inside = numbers == number
        if inside.any():
            means = confidences[inside].double().mean(), correct[inside].double().mean()
            share = inside.double().mean()
            found.append({"share": float(share), "confidence": float(means[0]), "accuracy": float(means[1])})
    return found


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """ECE in [0, 1]: sum over bins of their share times |accuracy - confidence|."""
    return sum(
        each["share"] * abs(each["accuracy"] - each["confidence"]) for each in reliability(confidences, correct, bins)
    )


def bootstrap_interval(correct: Tensor, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of `correct` [N] (0 or 1) in percent, by resampling images.

    The number of successes in a resample is binomial: it is drawn as that, not image by image.
    """
    source = torch.Generator().manual_seed(seed)
    images, rate = len(correct), float(correct.double().mean())
    counts = torch.binomial(torch.full((samples,), float(images)), torch.full((samples,), rate), generator=source)
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


def unbiased_hsic(k: Tensor, other: Tensor) -> Tensor:
    """HSIC_1 of two Gram matrices [n, n], n >= 4, whose diagonals are not used (Nguyen et al., eq. 3)."""
    n = len(k)
    k, other = (each - each.diagonal().diag() for each in (k, other))
    sums, other_sums = k.sum(0), other.sum(0)
    value = (k * other).sum() + sums.sum() * other_sums.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ other_sums)
    return value / (n * (n - 3))


class Similarity:
    """Linear CKA between every feature of one network and every feature of another, accumulated over batches.

    The sum over batches of HSIC_1(K, L) over the root of those of HSIC_1(K, K) and HSIC_1(L, L): unbiased in each of
    the three, whatever the size of the batches.
    """

    def __init__(self) -> None:
        self.both: Tensor | None = None  # [A, B]
        self.own: list[Tensor] = []  # [A] and [B]

    def update(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Features [n, ...] of the same n >= 4 images, A of one network and B of the other."""
        grams = [[self._gram(each) for each in features] for features in (ones, others)]
        both = torch.stack([torch.stack([unbiased_hsic(k, other) for other in grams[1]]) for k in grams[0]])
        own = [torch.stack([unbiased_hsic(k, k) for k in each]) for each in grams]
        self.both = both if self.both is None else self.both + both
        self.own = own if not self.own else [before + now for before, now in zip(self.own, own, strict=True)]

    def sums(self) -> Tensor:
        """All that was accumulated as one vector, whose sum over processes `take` gives back."""
        return torch.cat([self.both.flatten(), *self.own])

    def take(self, sums: Tensor) -> None:
        """Replace what was accumulated by such a vector."""
        parts = sums.split([self.both.numel(), *(len(each) for each in self.own)])
        self.both, self.own = parts[0].view_as(self.both), list(parts[1:])

    def matrix(self) -> list[list[float]]:
        """CKA [A][B]."""
        return (
            self.both / (self.own[0].clamp(min=1e-300).sqrt()[:, None] * self.own[1].clamp(min=1e-300).sqrt())
        ).tolist()

    @staticmethod
    def _gram(features: Tensor) -> Tensor:
        flat = features.flatten(1).float()
        return (flat @ flat.T).double()
