"""One pass over images with a network, and with its teacher: everything that is measured of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from common import UserError
from data.datasets import check_binary
from models.network import Network
from models.preprocessing import class_order, fitted
from reports import latency, metrics
from reports.latency import Stopwatch
from reports.measures import Classification, Resemblance, reduce_to_two


class Evaluation:
    """What is measured of a network (with its `info`, in eval mode) and, where there is one, of it and its teacher.

    Args:
        network, teacher: images come as `network` knows them; the teacher may know them, and classes, otherwise.
        device: where both are moved.
        mapping: from the network's classes to the teacher's (models.preprocessing.class_order).
        positive: classes that count as class 1, all others as class 0; empty: classes as they are. Of a network for
            more than two classes the probabilities are summed.
    """

    def __init__(
        self,
        network: Network,
        teacher: Network | None,
        device: torch.device,
        positive: Sequence[int] = (),
        mapping: dict | None = None,
    ):
        info = network.info
        if teacher:
            theirs = teacher.info
            names = (theirs.class_names, theirs.num_classes, info.class_names, info.num_classes)
            order = class_order(*names, mapping, "--teacher")
            teacher = fitted(teacher, info.mean, info.std, info.image_size, order)
        if network.info.num_classes > 2:
            check_binary(list(positive), network.info.num_classes)
        self.network = network.to(device).eval()
        self.teacher = teacher.to(device).eval() if teacher else None
        self.positive = list(positive) if network.info.num_classes > 2 else []
        classes = 2 if self.positive else network.info.num_classes
        self.classification = Classification(classes, device)
        self.resemblance = Resemblance(device) if teacher else None
        self.watch, self.device = Stopwatch(device), device
        self.logits: Tensor | None = None  # [images, C] on the host, where they are kept, and labels [images]
        self.labels: Tensor | None = None
        self._last: Tensor | None = None

    @torch.no_grad()
    def run(self, batches: Iterable[tuple[Tensor, Tensor]], places: Iterable[Tensor] = (), count: int = 0) -> None:
        """Measure on all batches, (images [n, 3, H, W], labels [n]).

        With `places`, of each batch the rows that its images have among `count`, the logits are kept.
        """
        network = partial(self.network, features=self.teacher is not None)
        places = iter(places)
        for images, labels in batches:
            outputs = self.watch(network, images)
            logits = outputs if self.teacher is None else outputs[0]
            if self.positive:
                labels = torch.isin(labels, torch.tensor(self.positive, device=labels.device)).long()
                logits = reduce_to_two(logits, self.positive)
            self.classification.update(logits, labels)
            if self.teacher is not None:
                theirs = self.teacher(images, features=True)
                reference = reduce_to_two(theirs[0], self.positive) if self.positive else theirs[0]
                self.resemblance.update((logits, *outputs[1:]), (reference, *theirs[1:]))
            if count:
                self._keep(logits, labels, next(places), count)
            self._last = images

    def _keep(self, logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> None:
        if self.logits is None:
            self.logits = torch.zeros(count, logits.shape[1])
            self.labels = torch.zeros(count, dtype=torch.int64)
        self.logits[rows], self.labels[rows] = logits.float().cpu(), labels.cpu()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make the measures, and the logits that were kept, those of all processes; `total` sums over them."""
        for measure in filter(None, (self.classification, self.resemblance)):
            measure.add_up(total)
        if self.logits is not None:
            self.logits, self.labels = (total(each.to(self.device)).cpu() for each in (self.logits, self.labels))

    def results(self) -> dict:
        """The measures by name, as evaluation.json has them.

        Raises:
            UserError: outputs that are not finite, or too few images for CKA.
        """
        found = self.classification.results()
        if not math.isfinite(found["nll"]):
            raise UserError(f"{self.network.info.name}: its outputs are not finite")
        return found | (self.resemblance.results() if self.resemblance else {})

    def reliability(self) -> list[dict[str, float]]:
        """See metrics.reliability."""
        return metrics.reliability(self.classification.sums["bins"])

    def speed(self) -> dict:
        """latency_ms: quantiles for batches of 1 and of as many images as were passed; images_per_second of these."""
        images, one = self._last, Stopwatch(self.device)
        latency.repeat(self.network, images, self.watch, latency.FEW)
        latency.repeat(self.network, images[:1], one, latency.MANY)
        found = {"1": one, str(len(images)): self.watch}
        found = {size: latency.describe(watch.milliseconds()) for size, watch in found.items()}
        return {"latency_ms": found, "images_per_second": 1000 * len(images) / found[str(len(images))]["p50"]}
