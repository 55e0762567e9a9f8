"""What a file computes, beside the network that it was made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.deployed import Deployed
from reports.latency import FEW, MANY, Stopwatch, describe, repeat

Function = Callable[[Tensor], Tensor]
TOLERANCE = 1e-4  # of the largest output of an image: rounding, in another order of the sums


@dataclass
class Proof:
    """A file's outputs over a split, against the network's.

    Attributes:
        images: how many.
        correct, network_correct: of them, how many the file and the network have right.
        max_relative_error: the largest over images of max_c |file - network| / max_c |network|.
        disagreements: images whose most likely class differs, and whose two candidates the network holds further
            apart than TOLERANCE.
        ties: images whose most likely class differs, but for which the network does not hold them apart.
    """

    images: int = 0
    correct: int = 0
    network_correct: int = 0
    max_relative_error: float = 0.0
    disagreements: int = 0
    ties: int = 0

    def update(self, found: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs [n, C] of the file and of the network, labels [n]."""
        found, expected = found.double(), expected.double()
        scale = expected.abs().amax(1)
        error = (found - expected).abs().amax(1) / scale
        self.max_relative_error = max(self.max_relative_error, float(error.nan_to_num(torch.inf, torch.inf).max()))
        guess, reference = found.argmax(1), expected.argmax(1)
        differ = guess != reference
        margin = (expected.gather(1, reference[:, None]) - expected.gather(1, guess[:, None]))[:, 0] / scale
        self.ties += int((differ & (margin <= TOLERANCE)).sum())
        self.disagreements += int((differ & (margin > TOLERANCE)).sum())
        self.images += len(labels)
        self.correct += int((guess == labels).sum())
        self.network_correct += int((reference == labels).sum())

    def include(self, other: "Proof") -> None:
        """Take over what another proof on the same images has found that is worse."""
        for name in ("max_relative_error", "disagreements"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    @property
    def drop(self) -> float:
        """Points of accuracy that the file loses."""
        return 100 * (self.network_correct - self.correct) / self.images

    def results(self) -> dict:
        """For export.json."""
        return {
            "top1": 100 * self.correct / self.images,
            "network_top1": 100 * self.network_correct / self.images,
            "images": self.images,
            "max_relative_error": self.max_relative_error,
            "disagreements": self.disagreements,
            "ties": self.ties,
        }

    def failure(self, max_drop: float | None) -> str | None:
        """Why the file must not be shipped: it has to compute what the network does or, where there is a `max_drop`,
        to lose no more than that many points."""
        if max_drop is not None:
            fine = self.drop <= max_drop
            return None if fine else f"it loses {self.drop:.2f} points of accuracy, more than --max_drop {max_drop:g}"
        if self.max_relative_error > TOLERANCE or self.disagreements:
            return (
                f"its outputs differ from the network's by up to {self.max_relative_error:.1e} of the largest, and "
                f"{self.disagreements} of {self.images} images get another class"
            )
        return None


@torch.no_grad()
def prove(files: dict[str, Function], deployed: Deployed, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Proof]:
    """The proof of each file over `batches` of (images, normalised as in training, labels), in one pass."""
    proofs = {name: Proof() for name in files}
    for images, labels in batches:
        images = deployed.given(images)
        expected = deployed(images)
        for name, function in files.items():
            proofs[name].update(function(images), expected, labels)
    return proofs


def latency(function: Function, deployed: Deployed, sizes: tuple[int, ...] = (1, 32)) -> dict[str, dict[str, float]]:
    """Milliseconds by size of batch: quantiles over repeats behind the warm-up."""
    found = {}
    for size in sizes:
        watch = Stopwatch(torch.device("cpu"))
        repeat(function, deployed.example(size), watch, MANY if size == 1 else FEW)
        found[str(size)] = describe(watch.milliseconds())
    return found
