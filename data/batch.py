"""The batch, from the loader to the loss."""

from typing import NamedTuple

from torch import Tensor

UNLABELED = -100  # the label of images that have none: the cross-entropy leaves them out (kernels.kd_loss)


class Batch(NamedTuple):
    """A process's part of a global batch: what the loader gives, objectives take and losses see.

    `loss_scale` is what the mean loss over it must be multiplied with so that the average over processes is the
    mean over the global batch: 1 unless the parts differ in size.
    """

    images: Tensor  # [n, 3, H, W] float32, normalised, channels_last
    labels: Tensor  # [n] int64
    loss_scale: float = 1.0
    indices: Tensor | None = None  # [n] int64: which images of the split; None where they have no numbers
    views: Tensor | None = None  # [n] int64: which of `Augmentation.views`; None where they are not known
    epoch: int = 0  # the training's, from 0; in a method's warm-up, the warm-up's own
    partners: Tensor | None = None  # [n] int64: of mixed images, the labels of those that they were mixed with
    share: Tensor | None = None  # float32, of mixed images: that of their own labels; the partners have the rest
    unlabeled: int = 0  # so many images of the label UNLABELED stand behind each that has one

    @property
    def labeled(self) -> int:
        """How many images have a label: what batch sizes, sums of losses and images a second count."""
        return len(self.labels) // (1 + self.unlabeled)

    def parts(self, count: int, world: int = 1) -> list["Batch"]:
        """`count` batches that together are this one, in all of `world` processes alike, and fewer where it is
        too small: BatchNorm needs two images in each. Their loss scales sum to this one's.
        """
        if count == 1:
            return [self]
        images, group = self.labeled, 1 + self.unlabeled
        smallest = round(images * world / self.loss_scale) // world  # of the processes' parts of the global batch
        count = max(1, min(count, smallest // 2))
        copies = self.images.unflatten(0, (-1, images, group)).tensor_split(count, dim=1)
        given = {name: getattr(self, name) for name in ("labels", "indices", "views", "partners")}
        split = {
            name: each.unflatten(0, (images, group)).tensor_split(count)
            for name, each in given.items()
            if each is not None
        }
        return [
            self._replace(
                images=copy.flatten(0, 2),
                loss_scale=self.loss_scale * copy.shape[1] / images,
                **{name: parts[place].flatten() for name, parts in split.items()},
            )
            for place, copy in enumerate(copies)
        ]
