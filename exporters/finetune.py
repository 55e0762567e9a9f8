"""Quantisation-aware distillation: a network that rounds as its int8 file does learns from its teacher once more."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common import UserError
from exporters.quantized import Quantized
from kernels import kd_loss
from models import load_pretrained
from models.network import Network
from models.preprocessing import Preprocessed, fitted_to
from reports.subject import Subject, learnt_from, run_options


@dataclass
class FinetuneOptions:
    """What is taken over from a run, by the names of its options; the defaults for one that had no teacher.

    Attributes:
        model: of a run of train_teacher.py, whose alpha and temperature are those of its branches.
    """

    teacher: list[str] = field(default_factory=list)
    temperature: float = 4.0
    alpha: float = 0.9
    batch_size: int = 64
    model: str | None = None


def finetune_options(folder: Path) -> FinetuneOptions:
    """Those of the run in a folder. Raises UserError for a config.yaml that no run of ours writes."""
    found = run_options(folder, FinetuneOptions)
    return found if found.model is None else FinetuneOptions(batch_size=found.batch_size)


def load_teachers(subject: Subject, places: Sequence[str], before: Sequence, what: str) -> list[Network | Preprocessed]:
    """The teachers in run folders, as the network knows its images and classes.

    Args:
        subject: the network that they are to teach.
        places: the run folders.
        before: the rows of its run's summary on the teachers that it had.
        what: what error messages begin with.

    Raises:
        UserError: one that is gone, another one by now, or that knows other classes.
    """
    checksums = {each.get("path"): each.get("sha256") for each in before if isinstance(each, dict)}
    teachers = []
    for place in places:
        try:
            teacher = load_pretrained(place)
        except UserError as error:
            raise UserError(f"{what}: {error}; name the teacher's run folder with --teacher") from None
        if checksums.get(place, teacher.info.sha256) != teacher.info.sha256:
            raise UserError(f"{what}: the teacher in {place} is another one than the run's; name one with --teacher")
        teachers.append(fitted_to(teacher, subject.network, **learnt_from(subject.folder, place)))
    return teachers


def finetune(
    network: Quantized,
    teacher: Callable[[Tensor], Tensor],
    batches: Iterable,
    steps: int,
    options: FinetuneOptions,
    lr: float,
) -> None:
    """Train all weights of `network` by (1 - alpha) CE(q, y) + alpha T^2 KL(p_T || q_T), in place, by Adam.

    Args:
        network: calibrated; in evaluation mode again when this returns.
        teacher: logits [n, C] of images.
        batches: of the training split (data.batch.Batch), `steps` of them.
        lr: of the first step; it falls to 0 along a cosine.
    """
    # Folded BatchNorms leave channels with weights of unlike size, which SGD's steps do not fit all at once.
    adam = torch.optim.Adam(network.parameters(), lr=lr)
    network.train()
    for step, batch in enumerate(batches):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            taught = teacher(batch.images)
        ce, kl = kd_loss(network(batch.images), taught, batch.labels, temperature=options.temperature)
        ((1 - options.alpha) * ce[0] + options.alpha * options.temperature**2 * kl[0]).backward()
        adam.step()
        adam.zero_grad()
    network.eval()
