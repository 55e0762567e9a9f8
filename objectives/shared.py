"""What several students of the same teachers have in common: the teachers' outputs for a batch."""

from collections.abc import Callable, Hashable

from torch import Tensor

from losses.method import Outputs
from objectives.stored_logits import StoredLogits


class SharedOutputs:
    """Teachers' outputs, computed for the first student that asks and kept for the others until the next batch.

    Attributes:
        cached_logits: the teachers' logits [images, views, C] of all of training, once a student has had them computed.
        stored_logits: the same for those on disk.
    """

    def __init__(self):
        self.cached_logits: Tensor | None = None
        self.stored_logits: StoredLogits | None = None
        self._of_batch: dict[Hashable, tuple[Tensor, Outputs]] = {}

    def get(self, images: Tensor, kind: Hashable, compute: Callable[[], Outputs]) -> Outputs:
        """What `compute` gives for a batch's images, or for a part of them, in the way `kind`."""
        # Parts of a batch are views, made anew for every student. What is kept holds on to them, so that no other
        # images come to lie in their place.
        place = (images.data_ptr(), images.shape, kind)
        if place not in self._of_batch:
            self._of_batch[place] = images, compute()
        return self._of_batch[place][1]

    def __len__(self) -> int:
        """How many outputs are kept."""
        return len(self._of_batch)

    def next_batch(self) -> None:
        """Forget the outputs of the batch before."""
        self._of_batch.clear()
