"""The objective of distill.py: a student, frozen teachers, and the methods between them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common import UserError
from kernels import cross_entropy, kd_loss
from losses.method import Batch, Method, Setting, Views
from losses.objective import Average, Objective
from losses.rotations import rotate

WARMUP = "warm-up"


class Distillation(Objective):
    """Trains `student`; teachers are frozen, in eval mode, and asked once a step on the student's own batch.

    L = ce_weight CE(q, y) + kd_weight T^2 KL(p_T || q_T) + sum over methods of weight x terms, with the mean
    of the teachers' logits. Methods with a warm-up train before, in epochs of their own, with an optimiser
    of their own; the student's optimiser and schedule start after it.

    Args:
        student: the network to train.
        teachers: trained networks; none where nothing is distilled.
        methods: made for these networks, see `setting`.
        weights: one a method.
        ce_weight, kd_weight, temperature: of the sum above.
        warmup_epochs: of all methods that have a warm-up; None: their own.
        anchors: state dicts that the first teacher takes one after the other, each for its share of the epochs.
        options: lr, momentum and weight_decay of the warm-up.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module] = (),
        methods: Sequence[Method] = (),
        weights: Sequence[float] = (),
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        warmup_epochs: int | None = None,
        anchors: Sequence[dict[str, Tensor]] = (),
        options: object = None,
    ):
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(methods)
        self.temperature, self.options = temperature, options
        # In a tuple, the teachers are no submodules: not trained, not averaged over processes, not in
        # checkpoints, not put into training mode.
        self.frozen = tuple(teacher.requires_grad_(False).eval() for teacher in teachers)
        self.weights_after = {"ce": ce_weight} | ({"kl": kd_weight * temperature**2} if kd_weight else {})
        self.weights_before: dict[str, float] = {}  # of the warm-up's terms
        for method, weight in zip(methods, weights, strict=True):
            self.weights_after |= {name: weight * part for name, part in method.terms.items()}
            scale = weight if method.warmup_student else 1.0
            self.weights_before |= {name: scale * part for name, part in method.warmup_terms.items()}
        self.term_weights = self.weights_after
        self.lengths = [(method.warmup_epochs and warmup_epochs) or method.warmup_epochs for method in methods]
        self.warmup_epochs = max(self.lengths, default=0)
        self.rotations = any(method.rotations for method in methods)
        self.student_features = wanted([method.student_features for method in methods])
        self.teacher_features = wanted([method.teacher_features for method in methods])
        self.warmup_optimizer: torch.optim.Optimizer | None = None
        self.epoch, self.anchors = 0, list(anchors)
        for method in methods:  # before DDP looks at which parameters train with the student
            for module in method.warmup_only():
                module.requires_grad_(False)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.term_weights = self.weights_before if epoch < 0 else self.weights_after
        if self.anchors:
            place = max(epoch, 0) * len(self.anchors) // self.options.epochs
            self.frozen[0].load_state_dict(self.anchors[place])
        for method, length in zip(self.methods, self.lengths, strict=True):
            here = -length <= epoch < 0
            for module in method.warmup_only():
                module.requires_grad_(here)
            for parameter in method.warmup_parameters() if here else ():
                parameter.requires_grad_(True)
        if epoch < 0:
            groups = iter(self.warmup_optimizer.param_groups)
            for method, length in zip(self.methods, self.lengths, strict=True):
                if length:  # a warm-up of another length than the method's keeps the shape of its schedule
                    place = (epoch + length) * method.warmup_epochs // length
                    next(groups)["lr"] = method.warmup_lr(place, self.options.lr) if epoch >= -length else 0.0

    def ask_in_advance(self, views: int | None) -> None:
        """Have the loop ask the teachers before training, about each of the `views` that there are of an image.

        Raises:
            ValueError: a reason why that is not possible.
        """
        if not self.frozen:
            raise ValueError("there is no teacher")
        if self.teacher_features or self.rotations:
            raise ValueError("the method wants more of its teacher than logits")
        if self.anchors:
            raise ValueError("the teacher changes on the way")
        if views is None:
            raise ValueError("views of an image can be counted only where the set is in memory, without cutouts")
        self.in_advance = lambda images: self._ask_teachers(images).logits

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.epoch >= 0:
            for method in self.methods:
                for module in method.warmup_only():
                    module.eval()
        return self

    def forward(
        self, images: Tensor, labels: Tensor, iteration: int, rows: Tensor | None = None, views: Tensor | None = None
    ) -> dict[str, Tensor]:
        if self.rotations:
            images = rotate(images)
        if self.epoch < 0:
            return self._warm_up(images, labels, rows)
        student = ask(self.student, images, self.student_features)
        teacher = self._ask_teachers(images) if self.known is None else Views(self.known[rows, views])
        upright = student.logits[: len(labels)]
        if "kl" in self.weights_after:
            ce, kl = kd_loss(upright, teacher.logits[: len(labels)], labels, temperature=self.temperature)
            terms = {"ce": ce[0], "kl": kl[0]}
        else:
            terms = {"ce": cross_entropy(upright, labels)}
        batch = Batch(labels, rows, self.epoch)
        for method in self.methods:
            terms |= method(*self._views(method, student, teacher, labels), batch)
        return terms

    def _warm_up(self, images: Tensor, labels: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        teacher, student, terms = self._ask_teachers(images), None, {}
        for method, length in zip(self.methods, self.lengths, strict=True):
            if self.epoch < -length:
                continue
            if student is None and method.warmup_student:
                student = ask(self.student, images, self.student_features)
            views = self._views(method, student or teacher, teacher, labels)
            terms |= method.warmup(*views, Batch(labels, rows, self.epoch + length))
        return terms

    def _views(self, method: Method, student: Views, teacher: Views, labels: Tensor) -> tuple[Views, Views]:
        """Methods without rotations see the upright images, which come first."""
        if method.rotations or not self.rotations:
            return student, teacher
        return student.first(len(labels)), teacher.first(len(labels))

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"student": self.student(images)}

    def product(self) -> nn.Module:
        return self.student

    def phase(self, iteration: int) -> str:
        return WARMUP if self.epoch < 0 else "weights"

    def weight_parameters(self) -> list[nn.Parameter]:
        idle = {id(p) for method in self.methods for module in method.warmup_only() for p in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in idle]

    def extra_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        groups = [
            {"params": method.warmup_parameters()}
            for method, length in zip(self.methods, self.lengths, strict=True)
            if length
        ]
        if not groups:
            return {}
        o = self.options
        self.warmup_optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
        return {WARMUP: self.warmup_optimizer}

    def leaves(self, phase: str) -> list[Tensor] | None:
        if phase != WARMUP:
            return None
        active = zip(self.methods, self.lengths, strict=True)
        return [p for method, length in active if self.epoch >= -length for p in method.warmup_parameters() if length]

    def before_update(self, phase: str, average: Average) -> None:
        if phase == WARMUP:
            for parameter in self.leaves(phase):
                if parameter.grad is not None:
                    parameter.grad = average(parameter.grad)

    def after_update(self, phase: str) -> None:
        if phase != WARMUP:
            for method in self.methods:
                method.after_step()

    def _apply(self, fn, recurse: bool = True):
        for teacher in self.frozen:  # follow the student to its device and memory format
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad and not inference_mode: inference tensors cannot be saved for the loss's backward pass.
    @torch.no_grad()
    def _ask_teachers(self, images: Tensor) -> Views | None:
        if not self.frozen:
            return None
        views = [ask(teacher, images, self.teacher_features) for teacher in self.frozen]
        if len(views) > 1:
            views[0].logits = torch.stack([each.logits.float() for each in views]).mean(0)
        return views[0]


def wanted(features: Sequence[str]) -> bool | str:
    """What to ask a network for (models.network.Network) so that every method gets what it needs."""
    needs = set(features) - {"", "embedding"}  # an embedding comes with any of them
    return "both" if len(needs) > 1 else "preact" if needs == {"preact"} else any(features)


def ask(network: nn.Module, images: Tensor, features: bool | str) -> Views:
    """A forward pass."""
    if not features:
        return Views(network(images))
    logits, *maps, embedding = network(images, features=features)
    kinds = {"both": ("maps", "preact"), "preact": ("preact",), True: ("maps",)}[features]
    return Views(logits, embedding=embedding, **dict(zip(kinds, maps, strict=True)))


@torch.no_grad()
def probe(network: nn.Module, image_size: int, features: bool | str) -> Views:
    """What the network says of two random images, in eval mode."""
    training, weight = network.training, network.fc.weight
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    views = ask(network.eval(), images.to(weight), features)
    network.train(training)
    return views


def build_methods(
    classes: Sequence[type[Method]],
    student: nn.Module,
    teachers: Sequence[nn.Module],
    image_size: int,
    num_classes: int,
    images: int | None,
    options: object,
    names: tuple[str, str] = ("", ""),
) -> list[Method]:
    """The methods of a run, made for its networks; `names` are the student's and the teacher's in the zoo.

    Raises:
        UserError: a method of features with several teachers, or networks that it cannot be made for.
    """
    student_features = wanted([each.student_features for each in classes])
    teacher_features = wanted([each.teacher_features for each in classes])
    if teacher_features and len(teachers) > 1:
        raise UserError("--teacher: several teachers are averaged in their logits; this method needs one's features")
    if not teachers:
        return []
    setting = Setting(
        student,
        teachers[0],
        probe(student, image_size, student_features),
        probe(teachers[0], image_size, teacher_features),
        num_classes,
        images,
        options,
        *names,
    )
    return [each(setting) for each in classes]
