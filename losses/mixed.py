"""The cross-entropy with the labels of images that may be mixed."""

from torch import Tensor

from data.batch import Batch
from kernels import cross_entropy


def with_partners(ce: Tensor, logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """s CE(q, y) + (1 - s) CE(q, y') of images mixed with others of labels y' (mixup, arXiv 1710.09412, section 2).

    Args:
        ce: CE(q, y), the mean over the batch, a scalar; of images that are not mixed it is returned as it is.
        logits: [N, C].
    """
    if batch.partners is None:
        return ce
    return batch.share * ce + (1 - batch.share) * cross_entropy(logits, batch.partners, label_smoothing=label_smoothing)
