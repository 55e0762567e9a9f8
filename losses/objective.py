"""The contract between the training loop and what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

Average = Callable[[Tensor], Tensor]


class Objective(nn.Module, ABC):
    """Owns the networks of a method and turns a batch into named loss terms.

    The loop asks, for every iteration (a count of batches over the whole run), which `phase` it belongs to,
    calls the objective for the terms of that phase, weights and sums them with `term_weights`, and steps
    that phase's optimiser. The "weights" phase always exists: its optimiser is the loop's, over
    `weight_parameters()`. A method with a phase more overrides the methods that name a phase.

    Randomness inside `forward` must be a function of the run's seed and `iteration`, so that every process
    does the same and a resumed run repeats it.
    """

    # Loss terms by name, with their weight in the sum.
    term_weights: dict[str, float]
    # Epochs before the first of the run's own, counted up to -1; `phase` says which optimiser they use.
    warmup_epochs = 0
    # How many differently augmented copies of a batch, one behind the other, `forward` wants as its images.
    copies = 1
    # Whether a step of "weights" launches the same on the device every time, within an epoch: --cuda_graph replays it.
    recordable = True
    # Asked by the loop before training about every view of every training image, images [N, 3, H, W] -> [N, D];
    # what it said is then `known` [images, views, D].
    in_advance: Callable[[Tensor], Tensor] | None = None
    known: Tensor | None = None
    # Whether steps of other phases than "weights" come on top of these, or take the place of some of them.
    extra_steps = False
    # Whether some iterations leave some parameters without a gradient, the same in all processes.
    sparse_gradients = False

    @abstractmethod
    def forward(
        self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None, views: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scalar loss terms of the iteration's phase, each a mean over the batch: images [N, 3, H, W]
        normalised, labels [N] int64, rows [N] int64: which images of the training split, where it has numbers,
        views [N] int64: which of the images that the augmentation makes of it, where they can be counted."""

    def begin_epoch(self, epoch: int) -> None:
        """Told before every epoch: from 0, or from -warmup_epochs where there is a warm-up."""

    @abstractmethod
    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        """Logits [N, C] by network name for evaluation, what is trained first; `seed` is for draws."""

    @abstractmethod
    def product(self) -> nn.Module:
        """The network that is saved when training ends."""

    def look_at_validation(self, answers: dict[str, Tensor], labels: Tensor) -> None:
        """Shown, after an epoch, each batch of the validation split: what `predict` said of it."""

    def end_validation(self, average: Average) -> None:
        """Told when all of the validation split was shown; `average` is the mean over processes."""

    def phase(self, iteration: int) -> str:
        return "weights"

    def weight_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def extra_optimizers(self) -> dict[str, Optimizer]:
        """Optimisers of the phases besides "weights", by phase."""
        return {}

    def leaves(self, phase: str) -> list[Tensor] | None:
        """The tensors whose gradients a phase wants; None: every parameter, averaged by DDP."""
        return None

    def before_update(self, phase: str, average: Average) -> None:
        """Between backward and the optimiser's step; `average` is the mean over processes."""

    def after_update(self, phase: str) -> None:
        """After the optimiser's step, which ends what the calls of `forward` since the last one were for."""

    def record(self) -> dict:
        """What an epoch's row of metrics.jsonl says besides losses and accuracies (JSON types only)."""
        return {}

    def advice(self, image_size: int) -> list[str]:
        """What the user should know before training, a line each."""
        return []

    def warnings(self, history: list[dict]) -> dict[str, str]:
        """Signs of failure in the run's rows of metrics.jsonl so far, by name, in words for the user."""
        return {}
