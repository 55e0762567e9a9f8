"""The batch, from the loader to the loss."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A process's part of a global batch: what the loader gives, objectives take and losses see.

    `loss_scale` is what the mean loss over it must be multiplied with so that the average over processes is the
    mean over the global batch: 1 unless the parts differ in size.
    """

    images: Tensor  # [n, 3, H, W] float32, normalised, channels_last
    labels: Tensor  # [n] int64
    loss_scale: float = 1.0
    indices: Tensor | None = None  # [n] int64: which images of the split; None in a stream, which has no numbers
    views: Tensor | None = None  # [n] int64: which of `Augmentation.views`; None where they are not known
    epoch: int = 0  # the training's, from 0; in a method's warm-up, the warm-up's own
    partners: Tensor | None = None  # [n] int64: of mixed images, the labels of those that they were mixed with
    share: float = 1.0  # of the images' own labels; the partners have the rest

    def parts(self, count: int, world: int = 1) -> list["Batch"]:
        """`count` batches that together are this one, in all of `world` processes alike, and fewer where it is
        too small: BatchNorm needs two images in each. Their loss scales sum to this one's.
        """
        if count == 1:
            return [self]
        images = len(self.labels)
        smallest = round(images * world / self.loss_scale) // world  # of the processes' parts of the global batch
        count = max(1, min(count, smallest // 2))
        copies = self.images.unflatten(0, (-1, images)).tensor_split(count, dim=1)
        labels, *numbers, partners = (
            [None] * count if each is None else each.tensor_split(count)
            for each in (self.labels, self.indices, self.views, self.partners)
        )
        return [
            Batch(
                each.flatten(0, 1), label, self.loss_scale * len(label) / images, *which, self.epoch, others, self.share
            )
            for each, label, *which, others in zip(copies, labels, *numbers, partners, strict=True)
        ]
