"""The objective of distill.py: a student, frozen teachers, and the methods between them."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from engine.cuda_graph import beside
from engine.objective import Average, Objective, Phase
from losses.logits import KD, with_labels
from losses.method import Method, MethodContext, Outputs
from losses.self_supervised import rotate
from objectives.own_methods import as_theirs, check_terms, check_weights
from objectives.shared import SharedOutputs
from objectives.stored_logits import StoredLogits, View

CACHE_BATCH = 500


class Distillation(Objective):
    """Trains `student`; teachers are frozen, in eval mode, and evaluated once a step on the student's own batch.

    L = ce_weight CE(q, y) + kd_weight T^2 KL(p_T || q_T) + sum over methods of weight x terms, with the mean
    of the teachers' logits. Methods with a warm-up train before, in epochs of their own, with an optimiser
    of their own; the student's optimiser and schedule start after it.

    Args:
        student: the network to train.
        teachers: trained networks; none where nothing is distilled.
        methods: made for these networks (`build_methods`), the cross-entropy with the labels among them.
        weights: one a method.
        warmup_epochs: of all methods that have a warm-up; None: those of each.
        anchors: state dicts that the first teacher takes one after the other, each for an equal share of the epochs.
        stop_kd_epoch: the epoch, from 0, from which the student learns from the labels alone (early-stopped KD of Cho
            and Hariharan, 2019); None: never. The other terms go on with weight 0, so that they can be followed.
        cache_logits: compute the teachers' logits once, before training, for every view of every image.
        shared: where other students of these teachers find their outputs, and leave them.
        options: epochs, and lr, momentum and weight_decay of the warm-up.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module] = (),
        methods: Sequence[Method] = (),
        weights: Sequence[float] = (),
        *,
        warmup_epochs: int | None = None,
        anchors: Sequence[dict[str, Tensor]] = (),
        stop_kd_epoch: int | None = None,
        cache_logits: bool = False,
        shared: SharedOutputs | None = None,
        options: object = None,
    ):
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(methods)
        self.options = options
        # In a tuple, the teachers are no submodules: not trained, not averaged over processes, not in
        # checkpoints, not put into training mode.
        self.frozen = tuple(teacher.requires_grad_(False).eval() for teacher in teachers)
        self.training_weights: dict[str, float] = {}
        self.warmup_weights: dict[str, float] = {}
        for method, weight in zip(methods, weights, strict=True):
            self.training_weights |= {name: weight * part for name, part in method.terms.items()}
            scale = weight if method.warmup_student else 1.0
            self.warmup_weights |= {name: scale * part for name, part in method.warmup_terms.items()}
        self.term_weights = self.training_weights
        self.label_weights = {name: float(name == "ce") for name in self.training_weights}
        self.stop_kd_epoch = math.inf if stop_kd_epoch is None else stop_kd_epoch
        self.lengths = [(method.warmup_epochs and warmup_epochs) or method.warmup_epochs for method in methods]
        self.warmup_epochs = max(self.lengths, default=0)
        self.rotations = any(method.rotations for method in methods)
        self.student_features = combined_features([method.student_features for method in methods])
        self.teacher_features = combined_features([method.teacher_features for method in methods])
        self.epoch, self.anchors = 0, list(anchors)
        self.cache_logits = cache_logits
        self.cached_logits: Tensor | None = None  # [images, views, C]
        self.stored_logits: StoredLogits | None = None
        self.view: View | None = None  # the stored logits of the epoch
        self.shared = shared
        self.phases = self._warmup_phase()
        for method in methods:  # before DDP looks at which parameters train with the student
            for module in method.warmup_only():
                module.requires_grad_(False)

    @property
    def mixable(self) -> bool:
        return all(method.mixable for method in self.methods)

    def store_logits(self, stored: StoredLogits) -> None:
        """Take the teachers' logits from disk, where they are put before training."""
        self.stored_logits, self.cycle = stored, stored.views

    def before_training(self, loader, accelerator, console) -> None:
        shared = SharedOutputs() if self.shared is None else self.shared
        how = (lambda images: self._evaluate_teachers(images).logits, loader, accelerator, console)
        if self.stored_logits is not None:
            if shared.stored_logits is None:
                self.stored_logits.fill(*how, self.options.compile)
                shared.stored_logits = self.stored_logits
            self.stored_logits = shared.stored_logits
        if self.cache_logits:
            if shared.cached_logits is None:
                shared.cached_logits = cache_teacher_logits(*how, self.options.compile)
            self.cached_logits = shared.cached_logits

    def cannot_cache(self, views: int | None) -> str | None:
        """Why the teachers' logits cannot be computed once for each of the `views` that there are of an image."""
        reason = "views of an image can be counted only where the set is in memory, without cutouts, --aa and --reprob"
        return self._needs_teacher() or (reason if views is None else None)

    def cannot_store(self, numbered: bool) -> str | None:
        """Why they cannot be kept for some views of every image; a stream's images are not `numbered`."""
        reasons = {
            "the method asks its teacher in a warm-up of its own": self.warmup_epochs > 0,
            "the images of a stream have no numbers to find their logits by": not numbered,
        }
        return self._needs_teacher() or next((reason for reason, applies in reasons.items() if applies), None)

    def _needs_teacher(self) -> str | None:
        """Why logits that are known before training would not do."""
        reasons = {
            "there is no teacher": not self.frozen,
            "the method needs more of its teacher than logits": bool(self.teacher_features or self.rotations),
            "the teacher changes during training": bool(self.anchors),
            "images are mixed from two": bool(self.options and self.options.mixes),
            "images without a label are drawn anew for every epoch": bool(self.options and self.options.unlabeled),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        taught = self.training_weights if epoch < self.stop_kd_epoch else self.label_weights
        self.term_weights = self.warmup_weights if epoch < 0 else taught
        if self.stored_logits is not None:
            self.view = self.stored_logits.view(epoch)
        if self.anchors:
            place = max(epoch, 0) * len(self.anchors) // self.options.epochs
            self.frozen[0].load_state_dict(self.anchors[place])
        for method, length in zip(self.methods, self.lengths, strict=True):
            here = -length <= epoch < 0
            for module in method.warmup_only():
                module.requires_grad_(here)
            for parameter in self._warmed_up(method) if here else ():
                parameter.requires_grad_(True)
        if epoch < 0:
            groups = iter(self.phases[0].optimizer.param_groups)
            for method, length in zip(self.methods, self.lengths, strict=True):
                if length:  # a warm-up of another length than the method's keeps the shape of its schedule
                    place = (epoch + length) * method.warmup_epochs // length
                    next(groups)["lr"] = method.warmup_lr(place, self.options.lr) if epoch >= -length else 0.0

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.epoch >= 0:
            for method in self.methods:
                for module in method.warmup_only():
                    module.eval()
        return self

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        images = rotate(batch.images) if self.rotations else batch.images
        if self.epoch < 0:
            return self._warm_up(images, batch)
        teacher = beside(lambda: self._known_outputs(images, batch), images.device)
        student = outputs_of(self.student, images, self.student_features)
        teacher, batch, terms = teacher(), batch._replace(epoch=self.epoch), {}
        for method in self.methods:
            with as_theirs(type(method)):
                found = method(*self._outputs_for(method, student, teacher, batch), batch)
            terms |= check_terms(method, found, method.terms)
        return terms

    def _warm_up(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        teacher, student, terms = self._teacher_outputs(images, batch), None, {}
        for method, length in zip(self.methods, self.lengths, strict=True):
            if self.epoch < -length or not length:
                continue
            if student is None and method.warmup_student:
                student = outputs_of(self.student, images, self.student_features)
            outputs = self._outputs_for(method, student or teacher, teacher, batch)
            with as_theirs(type(method)):
                found = method.warmup(*outputs, batch._replace(epoch=self.epoch + length))
            terms |= check_terms(method, found, method.warmup_terms)
        return terms

    def _outputs_for(
        self, method: Method, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[Outputs, Outputs | None]:
        """Those of all rotations, or of the upright images, which come first."""
        if method.rotations or not self.rotations:
            return student, teacher
        return student.first(len(batch.labels)), teacher.first(len(batch.labels))

    def predict(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        return {"student": self.student(images)}

    def trained_model(self) -> nn.Module:
        return self.student

    def phase(self, iteration: int) -> Phase | None:
        return self.phases[0] if self.epoch < 0 else None

    def weight_parameters(self) -> list[nn.Parameter]:
        idle = {id(p) for method in self.methods for module in method.warmup_only() for p in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in idle]

    def _warmup_phase(self) -> tuple[Phase, ...]:
        groups = [
            {"params": self._warmed_up(method)}
            for method, length in zip(self.methods, self.lengths, strict=True)
            if length
        ]
        if not groups:
            return ()
        o = self.options
        sgd = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
        return (Phase("warm-up", sgd, self._warmup_inputs, self._average_warmup),)

    def _warmed_up(self, method: Method) -> list[nn.Parameter]:
        """What its warm-up trains, but for what is frozen of the student (--freeze)."""
        kept = {id(parameter) for parameter in self.student.parameters() if not parameter.requires_grad}
        return [parameter for parameter in method.warmup_parameters() if id(parameter) not in kept]

    def _warmup_inputs(self) -> list[Tensor]:
        active = zip(self.methods, self.lengths, strict=True)
        return [p for method, length in active if self.epoch >= -length for p in self._warmed_up(method) if length]

    def _average_warmup(self, average: Average) -> None:
        for parameter in self._warmup_inputs():
            if parameter.grad is not None:
                parameter.grad = average(parameter.grad)

    @property
    def follows_steps(self) -> bool:
        return any(type(method).after_step is not Method.after_step for method in self.methods)

    def after_step(self) -> None:
        for method in self.methods:
            method.after_step()

    def _apply(self, fn, recurse: bool = True):
        for teacher in self.frozen:  # follow the student to its device and memory format
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _known_outputs(self, images: Tensor, batch: Batch) -> Outputs | None:
        """The teachers' outputs: their logits from disk or memory, where they are there."""
        if self.view is not None:
            return Outputs(self.view.logits(batch.indices))
        if self.cached_logits is not None:
            return Outputs(self.cached_logits[batch.indices, batch.views])
        return self._teacher_outputs(images, batch)

    def _teacher_outputs(self, images: Tensor, batch: Batch) -> Outputs | None:
        """The teachers' outputs for a batch's images, or for their rotations."""
        if not self.frozen:
            return None
        if self.shared is None:
            return self._evaluate_teachers(images)
        kind = (self.teacher_features, self.rotations)
        return self.shared.get(batch.images, kind, lambda: self._evaluate_teachers(images))

    # no_grad and not inference_mode: inference tensors cannot be saved for the loss's backward pass.
    @torch.no_grad()
    def _evaluate_teachers(self, images: Tensor) -> Outputs:
        outputs = [outputs_of(teacher, images, self.teacher_features) for teacher in self.frozen]
        if len(outputs) > 1:
            outputs[0].logits = torch.stack([each.logits.float() for each in outputs]).mean(0)
        return outputs[0]


@torch.no_grad()
def cache_teacher_logits(predict, loader, accelerator, console, compiled: bool = False) -> Tensor:
    """Teacher logits [images, views, C] of every view of every training image, on the device, in every process.

    Args:
        predict: logits [N, C] of images [N, 3, H, W].
        loader: of a split in memory (data.loader.DeviceLoader); each process computes its part of the images.
        accelerator, console: the run's.
        compiled: whether networks are compiled: their graphs are for the batches of training, not for these.
    """
    views, table = loader.augmentation.views, None
    with console.bar(views, 0, "teacher logits") as bar:
        for view in range(views):
            for indices, images in loader.view(view, CACHE_BATCH):
                eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
                with accelerator.autocast(), eager:
                    logits = predict(images)
                if table is None:
                    table = logits.new_zeros(len(loader.split), views, logits.shape[1])
                table[indices, view] = logits
            bar.update()
    # Each process has zeros for the others' images. Not every backend sums in half precision.
    return accelerator.reduce(table.float(), "sum").to(table.dtype)


def combined_features(features: Sequence[str]) -> bool | str:
    """The `features` of models.network.Network that give every method what it needs."""
    needs = set(features) - {"", "embedding"}  # an embedding comes with any of them
    return "both" if len(needs) > 1 else "preact" if needs == {"preact"} else any(features)


def outputs_of(network: nn.Module, images: Tensor, features: bool | str) -> Outputs:
    """A forward pass."""
    if not features:
        return Outputs(network(images))
    logits, *maps, embedding = network(images, features=features)
    kinds = {"both": ("maps", "preact"), "preact": ("preact",), True: ("maps",)}[features]
    return Outputs(logits, embedding=embedding, **dict(zip(kinds, maps, strict=True)))


@torch.no_grad()
def probe(network: nn.Module, image_size: int, features: bool | str) -> Outputs:
    """The network's outputs for two random images, in eval mode."""
    training, weight = network.training, network.fc.weight
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    outputs = outputs_of(network.eval(), images.to(weight), features)
    network.train(training)
    return outputs


def build_methods(
    classes: Sequence[type[Method]],
    student: nn.Module,
    teachers: Sequence[nn.Module],
    image_size: int,
    num_classes: int,
    labels: Tensor | None,
    options,
    names: tuple[str, str] = ("", ""),
) -> tuple[list[Method], list[float]]:
    """The methods of a run, made for its networks, and their weights: the papers' unless `options` say otherwise.

    `labels` int64 [n] are those of the whole training split, None for a stream.
    The first of them is the cross-entropy with the labels, joined by T^2 KL where that has a weight. Its weight is that
    of the method; several methods share one of weight 1, and plain KD beside others has weight 1. `names` are the
    student's and the teacher's in the zoo.

    Raises:
        UserError: a method of features with several teachers, or networks that it cannot be made for.
    """
    student_features = combined_features([each.student_features for each in classes])
    teacher_features = combined_features([each.teacher_features for each in classes])
    if teacher_features and len(teachers) > 1:
        raise UserError("--teacher: several teachers are averaged in their logits; this method needs one's features")
    teacher = teachers[0] if teachers else None
    context = MethodContext(
        student,
        teacher,
        probe(student, image_size, student_features),
        probe(teacher, image_size, teacher_features) if teacher else None,
        num_classes,
        labels,
        options,
        *names,
    )
    for role, outputs in (("student", context.student_outputs), ("teacher", context.teacher_outputs)):
        compared = {getattr(each, f"{role}_features") for each in classes} & {"maps", "preact"}
        if compared and len(outputs.maps or outputs.preact) < 2:
            where = f"--{role} {names[role == 'teacher']}"
            raise UserError(f"{where}: has no known feature maps; name submodules with --{role}_stages")
    built = []
    for each in classes:
        with as_theirs(each):
            built.append(each(context))
        check_weights(built[-1])
    weights = options.method_weights or [method.weight for method in built]
    joined = len(built) > 1
    ce_weight = 1.0 if joined else built[0].ce_weight
    kd_weight = sum(
        weight * (1.0 if joined and isinstance(method, KD) else method.kd_weight)
        for method, weight in zip(built, weights, strict=True)
    )
    ce_weight = ce_weight if options.ce_weight is None else options.ce_weight
    kd_weight = kd_weight if options.kd_weight is None or not teachers else options.kd_weight
    methods = with_labels(built, context, ce_weight, kd_weight)
    own = {id(method): weight for method, weight in zip(built, weights, strict=True)}
    return methods, [1.0, *(own[id(method)] for method in methods[1:])]
