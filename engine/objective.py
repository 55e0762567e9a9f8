"""The contract between the training loop and what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from data.batch import Batch
from data.splits import AnySplit
from engine.averaging import WeightAverage

Average = Callable[[Tensor], Tensor]  # a tensor's mean over processes


def _nothing(*_) -> None:
    """What most phases do before and after an update."""


@dataclass
class Phase:
    """Steps of another kind than those that train the objective's weights: a warm-up, GTN's gate steps.

    Attributes:
        name: as losses and checkpoints know it.
        optimizer: steps what it trains.
        grad_inputs: the tensors whose gradients its steps compute; they are not averaged over processes by the loop.
        before_update: called between the backward pass and the optimiser's step, with the mean over processes.
        after_update: called after the optimiser's step.
        additional: whether its steps come on top of those of the weights, or take the place, and the batch, of some.
        split: images of its own; None: the training images.
    """

    name: str
    optimizer: Optimizer
    grad_inputs: Callable[[], list[Tensor]]
    before_update: Callable[[Average], None] = field(default=_nothing)
    after_update: Callable[[], None] = field(default=_nothing)
    additional: bool = False
    split: AnySplit | None = None


class Objective(nn.Module, ABC):
    """Owns the networks of a method and turns a batch into named loss terms.

    The loop asks of every iteration (a count of batches over the whole run) which `phase` it belongs to, calls the
    objective for the terms, sums them with `term_weights`, and steps the phase's optimiser. Most iterations belong to
    no phase of the objective's own: the loop's optimiser then trains `trained_parameters()`.

    Randomness inside `forward` must be a function of the run's seed and `iteration`, so that every process does the
    same and a resumed run repeats it.

    Attributes:
        term_weights: loss terms by name, with their weight in the sum.
        phases: the phases that it has besides the weights' steps.
        warmup_epochs: epochs before the first of the run's own, counted up to -1.
        copies: how many differently augmented copies of a batch, one behind the other, `forward` wants as its images.
        cycle: after so many epochs images are to be varied again as in the first of them; None: always anew.
        capturable: whether, within an epoch, every step of the weights launches the same kernels (--cuda_graph).
        mixable: whether its losses know images that are mixed from two (--mixup, --cutmix).
        average: the moving average of what it trains, a part of its state, where the run asks for one.
        sparse_gradients: whether some iterations leave some parameters without a gradient, the same in all processes;
            default: whether it holds a network that says so of itself.
        pool: of a teacher for a pool of students: that pool (models.pool.Pool); it is kept in model.json.
    """

    term_weights: dict[str, float]
    phases: tuple[Phase, ...] = ()
    warmup_epochs = 0
    copies = 1
    cycle: int | None = None
    capturable = True
    mixable = False
    pool = None

    def __init__(self):
        super().__init__()
        self.average: WeightAverage | None = None

    @property
    def sparse_gradients(self) -> bool:
        return any(getattr(part, "sparse_gradients", False) for part in self.modules() if part is not self)

    @abstractmethod
    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Scalar loss terms of the iteration's phase, each a mean over the batch."""

    @abstractmethod
    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        """Logits [N, C] by network name for evaluation, what is trained first; `seed` is for draws."""

    @abstractmethod
    def trained_model(self) -> nn.Module:
        """The network that is saved when training ends."""

    def phase(self, iteration: int) -> Phase | None:
        """Which of `phases` an iteration belongs to; None: it trains the weights."""
        return None

    def save_beside(self, folder: Path) -> None:
        """Called when training ends, in the main process: time to write more than the trained model."""

    def weight_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of `weight_parameters` that are not frozen (--freeze) when training begins."""
        return [parameter for parameter in self.weight_parameters() if parameter.requires_grad]

    def pieces(self) -> list[list[nn.Module]]:
        """Of steps that are not `capturable`: the modules that can be, Tensor to Tensor each, by place.

        A step differentiates one module of a place at a time (engine/piece_graphs.py).
        """
        return []

    def averaged(self) -> AbstractContextManager:
        """Within it the trained network has the weights that are evaluated and kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def before_training(self, loader, accelerator, console) -> None:
        """Called once when all else is ready: time for work on the whole training split (data.loader.Loader)."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before every epoch: from 0, or from -warmup_epochs where there is a warm-up."""

    @property
    def follows_steps(self) -> bool:
        """Whether `after_step` does anything."""
        return False

    def after_step(self) -> None:
        """Called after every step of the weights."""

    def observe_validation(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Called with each batch of the validation split, evaluated after an epoch: what `predict` gave."""

    def record(self) -> dict:
        """What an epoch's row of metrics.jsonl says besides losses and accuracies: numbers, in mappings by name."""
        return {}

    def advice(self, image_size: int) -> list[str]:
        """What the user should know before training, a line each."""
        return []

    def warnings(self, history: list[dict]) -> dict[str, str]:
        """Signs of failure in the run's rows of metrics.jsonl so far, by name, in words for the user."""
        return {}


def weighted_sum(objective: Objective, terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of an objective's terms with their weights."""
    return sum(objective.term_weights[name] * term for name, term in terms.items())
