"""What a distillation method is: a loss of a student's and its teacher's outputs for a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from types import MappingProxyType

import torch
from torch import Tensor, nn

from data.batch import Batch


@dataclass
class Outputs:
    """A network's outputs for a batch of N images.

    logits [N, C]; maps: its feature maps, one a stage, the stem's first, each [N, C_l, H_l, W_l]; preact: the
    same before their last ReLU; embedding [N, D]. Only logits and what the methods' `student_features` and
    `teacher_features` name are there.
    """

    logits: Tensor
    maps: list[Tensor] = field(default_factory=list)
    preact: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None

    def first(self, count: int) -> "Outputs":
        """Those of the first `count` images."""
        if count == len(self.logits):
            return self
        embedding = None if self.embedding is None else self.embedding[:count]
        maps, preact = ([each[:count] for each in part] for part in (self.maps, self.preact))
        return Outputs(self.logits[:count], maps, preact, embedding)


@dataclass
class MethodContext:
    """What a method is made for.

    Attributes:
        student, teacher: the networks.
        student_outputs, teacher_outputs: their outputs for two random images, in eval mode, for the shapes.
        num_classes: of the labels.
        labels: int64 [n], of the whole training split; None for a stream.
        options: the run's, those of `Method.options` among them.
        student_name, teacher_name: as in the zoo.
    """

    student: nn.Module
    teacher: nn.Module
    student_outputs: Outputs
    teacher_outputs: Outputs
    num_classes: int
    labels: Tensor | None
    options: object
    student_name: str = ""
    teacher_name: str = ""


class Method(nn.Module):
    """A distillation loss. A subclass is built from a `MethodContext` and overrides `forward`.

    Its parameters train with the student, are checkpointed, and are not part of the saved student. What
    overflows or cancels in half precision belongs in a function under `full_precision`.

    Attributes:
        paper: the source.
        weight: the method's usual weight in the sum of losses; terms: its parts and their weights within it.
        usual: the usual weights in words, for the table; `weight` where a class does not set it.
        student_features, teacher_features: which outputs it needs beside logits: "", "embedding", "maps" or "preact",
            the latter two with the embedding.
        rotations: whether both networks get every image in four rotations, [4 N, ...], upright ones first.
        warmup_epochs: epochs before the student's own, in which `warmup` is minimised over
            `warmup_parameters` alone; warmup_terms: its parts and their weights.
        warmup_student: whether the warm-up trains the student; its terms are then weighted like the method's own.
        ce_weight, kd_weight: of the cross-entropy with the labels and of T^2 KL on logits beside this method.
        anchors: whether the teacher takes the weights of its own training's checkpoints, one after the other.
        mixable: whether it makes sense for images that are mixed from two, or have no label (data.batch.UNLABELED): not
            where it needs each image's one label.
        peers: whether it is no loss between a student and a teacher, but networks that train together.
        needs_validation: whether it learns from a validation split (--val_fraction).
        needs_teacher: False for none at all.
        options: a dataclass of the options that are the method's own, each a flag with a default; found in
            `context.options`. Weights, the teacher's and the warm-up's are not among them: they follow from the above.
        joined_options: the same where other methods stand beside it; None: no others.

    Raises:
        TypeError: a subclass with warmup_epochs, but without warmup() or warmup_terms.
    """

    paper: str
    usual: str = "1"
    options: type | None = None
    joined_options: type | None = None
    weight: float = 1.0
    terms: Mapping[str, float] = MappingProxyType({})
    needs_teacher = True
    anchors = False
    mixable = True
    peers = False
    needs_validation = False
    student_features: str = ""
    teacher_features: str = ""
    rotations = False
    warmup_epochs = 0
    warmup_terms: Mapping[str, float] = MappingProxyType({})
    warmup_student = False
    ce_weight: float = 1.0
    kd_weight: float = 0.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "weight" in vars(cls) and "usual" not in vars(cls):
            cls.usual = f"{cls.weight:g}"
        if cls.warmup_epochs and (cls.warmup is Method.warmup or not cls.warmup_terms):
            raise TypeError(f"{cls.__name__}: a method with warmup_epochs needs warmup() and warmup_terms")

    def __init__(self, context: MethodContext):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms, scalars, by their names in `terms`. The teacher's outputs have no gradient."""
        return {}

    def after_step(self) -> None:
        """Called after every update of the student."""

    def warmup(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms that the warm-up minimises, scalars, by their names in `warmup_terms`."""
        return {}

    def warmup_only(self) -> list[nn.Module]:
        """Modules of the method that are trained in the warm-up alone, and frozen after it."""
        return []

    def warmup_parameters(self) -> list[nn.Parameter]:
        """What the warm-up trains: those modules, if nothing else."""
        return [parameter for module in self.warmup_only() for parameter in module.parameters()]

    def warmup_lr(self, epoch: int, lr: float) -> float:
        """The learning rate of the warm-up in epoch `epoch` of `warmup_epochs`; `lr` is the run's."""
        return lr


def full_precision(function: Callable) -> Callable:
    """Run a function of tensors, or of lists of them, outside autocast, with half precision raised to float32."""

    def up(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return [up(each) for each in value]
        return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value

    @wraps(function)
    def wrapped(*args, **options):
        args = [up(each) for each in args]
        tensors = [y for x in args for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*args, **options)

    return wrapped
