"""What is measured of a network while its outputs pass by: sums over images, so that no set of outputs is held.

Each measure has `sums`, float64 tensors by name that add up over batches and over processes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common import UserError
from reports import metrics

Outputs = tuple[Tensor, Sequence[Tensor], Tensor]  # logits [n, C], a map a stage [n, ...], embedding [n, D]
MOST_CLASSES = 1000  # of a confusion matrix


class Measure:
    """Sums that grow with every batch and are added up over processes."""

    sums: dict[str, Tensor]

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of this process by those of all; `total` is a tensor's sum over processes."""
        together = total(torch.cat([each.flatten() for each in self.sums.values()]))
        parts = together.split([each.numel() for each in self.sums.values()])
        for (name, own), part in zip(self.sums.items(), parts, strict=True):
            self.sums[name] = part.view_as(own)


class Classification(Measure):
    """Accuracy, likelihood and calibration of a classifier."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        size = {"images": (classes,), "right": (classes,), "top5": (), "nll": (), "bins": (3, metrics.BINS)}
        if classes <= MOST_CLASSES:
            size["confusion"] = (classes * classes,)
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in size.items()}

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [n, C] and labels [n] of some images."""
        sums, log_p = self.sums, logits.double().log_softmax(1)
        ranked = logits.topk(min(5, self.classes), dim=1).indices
        said = ranked[:, 0]
        right = (said == labels).double()
        ones = torch.ones_like(right)
        sums["images"].index_add_(0, labels, ones)
        sums["right"].index_add_(0, labels, right)
        sums["top5"] += (ranked == labels[:, None]).sum()
        sums["nll"] -= log_p.gather(1, labels[:, None]).sum()
        sums["bins"] += metrics.calibration_bins(log_p.amax(1).exp(), right)
        if "confusion" in sums:
            sums["confusion"].index_add_(0, labels * self.classes + said, ones)

    def results(self) -> dict:
        """top1, top5 and top1_interval in percent, nll in nats, ece in [0, 1], per_class: top-1 in percent by class,
        None where the split has no image of it.
        """
        images, right = int(self.sums["images"].sum()), int(self.sums["right"].sum())
        return {
            "top1": 100 * right / images,
            "top5": 100 * float(self.sums["top5"]) / images,
            "top1_interval": list(metrics.bootstrap_interval(right, images)),
            "nll": float(self.sums["nll"]) / images,
            "ece": metrics.calibration_error(self.sums["bins"]),
            "per_class": [
                100 * hits / count if count else None
                for hits, count in zip(self.sums["right"].tolist(), self.sums["images"].tolist(), strict=True)
            ],
        }

    def top1_of(self, classes: Sequence[int]) -> float | None:
        """Top-1 in percent on the images of these classes; None if there are none."""
        images, right = (self.sums[name][list(classes)].sum().item() for name in ("images", "right"))
        return 100 * right / images if images else None

    def confusion(self) -> Tensor | None:
        """Images [C, C] by label and prediction; None where there are more than MOST_CLASSES."""
        return self.sums["confusion"].view(self.classes, self.classes) if "confusion" in self.sums else None


class Resemblance(Measure):
    """How alike a student and its teacher are (SFTN, Table 8)."""

    def __init__(self, device: torch.device):
        self.similarity = metrics.Similarity()
        self.sums = {"numbers": torch.zeros(4, dtype=torch.float64, device=device)}  # images, KL, reverse, agreement

    def update(self, student: Outputs, teacher: Outputs) -> None:
        """Of the same images; CKA leaves out batches of fewer than 4."""
        (logits, maps, embedding), (teacher_logits, teacher_maps, teacher_embedding) = student, teacher
        q, p = logits.double().log_softmax(1), teacher_logits.double().log_softmax(1)
        apart = p - q
        agreed = logits.argmax(1) == teacher_logits.argmax(1)
        found = [(p.exp() * apart).sum(), -(q.exp() * apart).sum(), agreed.sum()]
        self.sums["numbers"] += torch.stack([apart.new_tensor(len(logits)), *found])
        if len(logits) >= 4:
            self.similarity.update([*maps, embedding], [*teacher_maps, teacher_embedding])
            self.sums["hsic"] = self.similarity.sums

    def results(self) -> dict:
        """KL(teacher || student) and KL(student || teacher) in nats, agreement in percent; CKA of the embeddings, and
        of each of the student's maps (rows) with each of the teacher's.

        Raises:
            UserError: too few images for CKA.
        """
        if "hsic" not in self.sums:
            raise UserError("CKA needs batches of 4 images and more")
        images, kl, reverse, agreed = self.sums["numbers"].tolist()
        self.similarity.sums = self.sums["hsic"]
        cka = self.similarity.matrix()
        return {
            "kl": kl / images,
            "kl_reverse": reverse / images,
            "agreement": 100 * agreed / images,
            "cka": cka[-1][-1],
            "cka_maps": [row[:-1] for row in cka[:-1]],
        }


def reduce_to_two(logits: Tensor, positive: Sequence[int]) -> Tensor:
    """Logits [n, 2] whose softmax is the summed probability [n] of all other classes and of these, of logits [n, C]."""
    chosen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    chosen[list(positive)] = True
    return torch.stack([logits[:, ~chosen].logsumexp(1), logits[:, chosen].logsumexp(1)], 1)
