"""Options that several distillation methods read; those of one method stand beside it."""

from dataclasses import dataclass, field
from typing import Literal

from common import UserError


@dataclass
class LabelOptions:
    """Options of whatever learns from labels.

    Args:
        ce_weight: weight of the cross-entropy with the labels; default: the method's, usually 1.
    """

    title = "loss"

    ce_weight: float | None = None

    def check(self) -> None:
        check_weights(self, "ce_weight")


@dataclass
class KLOptions:
    """Options of whatever can have a KL on logits.

    Args:
        kd_weight: weight of T^2 KL on logits beside the method (at --temperature), or between peers; default: the
            method's, usually 0, and 1 between peers.
    """

    title = "loss"

    kd_weight: float | None = None

    def check(self) -> None:
        check_weights(self, "kd_weight")


@dataclass
class TeacherOptions(LabelOptions, KLOptions):
    """Options of methods that learn from a teacher.

    Args:
        teacher: run folders of trained teachers (the logits of several are averaged), or names as for --student,
            for example timm:resnet18, with published weights or those of --teacher_weights; what FILE.py:FUNCTION
            gives is taken with the weights that it has.
        teacher_weights: weights of a teacher given by its name: a .safetensors, .pth, .pt or .pth.tar file.
        teacher_stages: of a teacher of another library or of your own: the submodules whose outputs are its feature
            maps, in the order in which they run; default: timm's, where it knows some.
        teacher_mean: by which a teacher given by its name normalises RGB from 0 to 1 (three numbers); default: as its
            published weights have it, else as the data set.
        teacher_std: the standard deviation for the same.
        teacher_image_size: side of the images that a teacher given by its name sees; default: as its published weights
            have it, else the student's. Teachers of run folders know all three.
        teacher_interpolation: how images are resized for a teacher of another size than the student's; default: as
            published, else bilinear.
        teacher_classes: a JSON file with an object from the images' classes to the teacher's, names or numbers both,
            for a teacher whose classes have other names, or another order or number without any.
        method_weights: weight of each method of --method; default: its paper's.
        cache_teacher: ask the teacher before training, and never again, for methods on its logits: about every crop and
            mirror of every image (memory), or about views that are drawn, in files that later runs share (disk);
            default: memory where that at least halves its work and takes at most 1 GiB, else no.
        cache_views: of every image that are drawn for the disk; epoch e trains on view e modulo this number; default:
            one an epoch, as without a cache.
        cache_folder: of the files; default: runs/logits.
        cache_top_k: keep the logits of so many classes an image; the others get the one value that leaves them their
            probability at temperature 1; default: all.
        unlabeled: images without labels that the student learns from as well, folder:PATH (all there are, however deep)
            or parquet:GLOB (column image), for methods that need no label of an image; near-duplicates of test images
            are left out.
        unlabeled_ratio: so many of them come with each labelled image of a batch.
        stop_kd_epoch: after this many epochs the labels alone, with weight 1; default: the teacher to the end.
    """

    title = "teacher"

    teacher: list[str] = field(default_factory=list)
    teacher_weights: str | None = None
    teacher_stages: list[str] = field(default_factory=list)
    teacher_mean: list[float] = field(default_factory=list)
    teacher_std: list[float] = field(default_factory=list)
    teacher_image_size: int | None = None
    teacher_interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    teacher_classes: str | None = None
    method_weights: list[float] = field(default_factory=list)
    cache_teacher: Literal["no", "memory", "disk"] | None = None
    cache_views: int | None = None
    cache_folder: str | None = None
    cache_top_k: int | None = None
    unlabeled: str | None = None
    unlabeled_ratio: int = 1
    stop_kd_epoch: int | None = None

    def check(self) -> None:
        for name in ("cache_views", "cache_folder", "cache_top_k"):
            if (value := getattr(self, name)) is None:
                continue
            if self.cache_teacher != "disk":
                raise UserError(f"--{name} {value}: goes with --cache_teacher disk")
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        if not all(0 <= weight < float("inf") for weight in self.method_weights):
            raise UserError(f"--method_weights {self.method_weights}: must be numbers of at least 0")
        for name, least in (("teacher_mean", -1e6), ("teacher_std", 1e-6)):
            if (values := getattr(self, name)) and not (len(values) == 3 and all(least <= v <= 1e6 for v in values)):
                raise UserError(f"--{name} {' '.join(map(str, values))}: must be three numbers from {least:g} to 1e+06")
        if self.teacher_image_size is not None and not 8 <= self.teacher_image_size <= 4096:
            raise UserError(f"--teacher_image_size {self.teacher_image_size}: must be from 8 to 4096")
        if self.unlabeled_ratio != 1 and self.unlabeled is None:
            raise UserError(f"--unlabeled_ratio {self.unlabeled_ratio}: goes with --unlabeled")
        if not 1 <= self.unlabeled_ratio <= 1024:
            raise UserError(f"--unlabeled_ratio {self.unlabeled_ratio}: must be from 1 to 1024")
        if self.stop_kd_epoch is not None and self.stop_kd_epoch < 1:
            raise UserError(f"--stop_kd_epoch {self.stop_kd_epoch}: must be at least 1; --method none has no teacher")


@dataclass
class PeersOptions(KLOptions):
    """Options of networks that train together.

    Args:
        peers: the networks that train together with the student; default: one like it.
    """

    peers: list[str] = field(default_factory=list)


@dataclass
class TemperatureOptions:
    """Options of methods with a softmax temperature to choose.

    Args:
        temperature: softmax temperature of teacher and student in terms on logits.
    """

    title = "loss"

    temperature: float = 4.0

    def check(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0")


@dataclass
class WarmupOptions:
    """Options of methods with a warm-up.

    Args:
        warmup_epochs: epochs of the warm-up; default: the method's.
    """

    warmup_epochs: int | None = None

    def check(self) -> None:
        if self.warmup_epochs is not None and self.warmup_epochs < 1:
            raise UserError(f"--warmup_epochs {self.warmup_epochs}: must be at least 1")


def check_weights(options: object, *names: str) -> None:
    """Raise UserError for a weight that is given and is no finite number of at least 0."""
    for name in names:
        if (weight := getattr(options, name)) is not None and not 0 <= weight < float("inf"):
            raise UserError(f"--{name} {weight}: must be a number of at least 0")
