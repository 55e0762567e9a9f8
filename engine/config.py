"""The options that every run has; a script adds its own, and those of its methods."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from common import UserError
from data.options import DataOptions

LARGEST = 3e38  # of float32, in which the optimiser computes
MONTH = 30 * 24 * 3600  # seconds


@dataclass
class TrainingOptions:
    """How networks are trained.

    Args:
        pretrained: start from torchvision's ImageNet weights, or for timm:NAME and hf-hub:ORG/NAME from timm's.
        weights: start from the weights in this run folder, or .safetensors, .pth or .pt file. From a run folder,
            train_teacher.py also takes the model, data set, image size and normalisation. Of another folder, as the
            students/ that search.py leaves, distill.py takes NAME.safetensors for the student NAME.json.
        freeze: submodules, or parameters, of the network that keep these weights, without gradients and with BatchNorm
            in eval mode: names as named_modules() gives them, for example conv1 bn1 layer1.
        epochs: passes over the training split.
        stop_after: stop after this many epochs of a schedule that is made for all of them (early-stopped teachers).
        batch_size: images a step over all processes together.
        gradient_accumulation_steps: compute a step's gradient in this many parts of its batch, one after the other, in
            about as many times less memory. BatchNorm, and losses that compare images, see a part at a time.
        opt: sgd (the papers'), adamw, or timm's lamb, lion, nadamw, adan, muon or rmsproptf; all but sgd leave biases
            and normalisations without weight decay.
        lr: peak learning rate.
        lr_batch_size: the batch size that lr is for: it is multiplied by batch_size over this (linear scaling, Goyal et
            al., arXiv 1706.02677; warm-ups of methods keep theirs); default: lr as it is.
        momentum: momentum of sgd, muon and rmsproptf.
        weight_decay: weight decay of the optimiser.
        nesterov: Nesterov momentum.
        lr_schedule: multistep (x lr_gamma at lr_milestones), cosine or linear (to 0 over all epochs), or constant.
        lr_milestones: epochs after which the learning rate falls, for multistep.
        lr_gamma: factor of each fall, for multistep.
        lr_restarts: run the schedule this many times, each in its share of the epochs; default: once (--method rco:
            once an anchor).
        lr_warmup_epochs: epochs at the start in which the learning rate rises linearly to where the schedule is.
        clip_grad: scale gradients down to this norm, that of all weights together; default: never.
        mixup: alpha of mixup (arXiv 1710.09412): images and labels of a batch mixed in pairs, which teachers see, too;
            0: none.
        cutmix: alpha of CutMix (arXiv 1905.04899); beside mixup each batch gets one of the two; 0: none.
        model_ema_decay: evaluate, choose and keep the exponential moving average of the network's weights, with this
            decay a step (fewer at the start); 0: the weights themselves.
        seed: seeds everything random in the run.
    """

    title = "training"

    pretrained: bool = False
    weights: str | None = None
    freeze: list[str] = field(default_factory=list)
    epochs: int = 30
    stop_after: int | None = None
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    opt: Literal["sgd", "adamw", "lamb", "lion", "nadamw", "adan", "muon", "rmsproptf"] = "sgd"
    lr: float = 0.05
    lr_batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    lr_schedule: Literal["multistep", "cosine", "linear", "constant"] = "cosine"
    lr_milestones: list[int] = field(default_factory=lambda: [150, 180, 210])
    lr_gamma: float = 0.1
    lr_restarts: int | None = None
    lr_warmup_epochs: int = 0
    clip_grad: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    model_ema_decay: float = 0.0
    seed: int = 0


@dataclass
class PlaceOptions:
    """Where and how a run runs.

    Args:
        output_dir: the run folder; default: runs/DATE-METHOD-MODEL-DATASET.
        overwrite: replace what an earlier run left in output_dir.
        resume_from_checkpoint: a checkpoint file, or "latest" for the one in output_dir.
        checkpointing_epochs: epochs between checkpoints.
        evaluation_epochs: epochs between two looks at the test split (and at the validation split, on which the best
            epoch is chosen); the last one is always evaluated.
        mixed_precision: no, fp16 or bf16; default: what accelerate launch says.
        process_timeout: seconds that a process waits for the others before it gives up; default: PyTorch's.
        compile: compile the networks' blocks with torch.compile, each once, when they first run.
        cuda_graph: record the steady step as a CUDA graph and replay it: one launch instead of hundreds; of gtn, which
            draws its paths, the teacher's blocks and every candidate, each by itself. On one GPU, not with fp16, for
            one student at a time, for methods of your own only if they decide nothing on the host within an epoch.
            Optimisers but sgd take their part of the step as it comes.
        kernels: triton or reference (plain PyTorch) for losses and gates; auto is Triton on an NVIDIA GPU.
        with_tracking: also log to the trackers of --report_to.
        report_to: tracker names known to Accelerate, comma-separated.
        tracker_project_name: the project that trackers put the run in.
        run_name: the run's name there; default: that of output_dir.
    """

    title = "where and how it runs"

    output_dir: str | None = None
    overwrite: bool = False
    resume_from_checkpoint: str | None = None
    checkpointing_epochs: int = 1
    evaluation_epochs: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    process_timeout: float | None = None
    compile: bool = False
    cuda_graph: bool = False
    kernels: Literal["auto", "triton", "reference"] = "auto"
    with_tracking: bool = False
    report_to: str = "tensorboard"
    tracker_project_name: str = "student-friendly-teachers"
    run_name: str | None = None


class ScriptOptions:
    """What the command line asks of a script's dataclass of options, which describes its fields under "Args:".

    A dataclass of options may have a `check` of its own, and a `title` for --help.
    """

    unread = ()  # names of options that a recipe gives and the run's method does not read
    essential: tuple[str, ...] | None = None  # what --help shows besides the method's options; None: all
    positional: str | None = None  # the list that words without a flag belong to

    @classmethod
    def with_method(cls, method: str) -> "type[ScriptOptions]":
        """This class, with the options that --method `method` brings from a file of the user's."""
        return cls

    @classmethod
    def rows(cls) -> dict[str, tuple[type, ...]]:
        """By the name of each method, the dataclasses of the options that it reads."""
        return {}

    def chosen(self) -> tuple[type, ...]:
        """The dataclasses of the options that this run's method reads."""
        return ()


@dataclass
class RunConfig(DataOptions, TrainingOptions, PlaceOptions, ScriptOptions):
    """Options that every run has, whatever its method.

    A script's subclass adds its own and those of its methods, a dataclass each, and says which of them a run reads.
    """

    essential = ("method", "dataset", "image_size", "weights", "epochs", "batch_size", "lr", "seed", "output_dir")
    essential += ("overwrite", "resume_from_checkpoint")

    def check(self) -> None:
        """Raise UserError for the first value outside its range."""
        limits = {
            "image_size": (self.image_size is None or 8 <= self.image_size <= 4096, "from 8 to 4096"),
            "crop_padding": (self.crop_padding is None or 0 <= self.crop_padding <= 4096, "from 0 to 4096"),
            "reprob": (0 <= self.reprob <= 1, "in [0, 1]"),
            "cutout": (0 <= self.cutout <= 4096, "from 0 to 4096"),
            "data_workers": (self.data_workers is None or 0 <= self.data_workers <= 1024, "from 0 to 1024"),
            "train_fraction": (0 < self.train_fraction <= 1, "in (0, 1]"),
            "val_fraction": (0 <= self.val_fraction < 1, "in [0, 1)"),
            "epochs": (1 <= self.epochs <= 10**6, "from 1 to a million"),
            "batch_size": (2 <= self.batch_size <= 2**24, "from 2 to 2^24"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1, "at least 1"),
            "lr": (0 < self.lr <= LARGEST, f"above 0 and at most {LARGEST:g}"),
            "lr_batch_size": (self.lr_batch_size is None or self.lr_batch_size >= 1, "at least 1"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay <= LARGEST, f"from 0 to {LARGEST:g}"),
            "nesterov": (not self.nesterov or self.momentum > 0, "off when --momentum is 0"),
            "lr_warmup_epochs": (0 <= self.lr_warmup_epochs < self.epochs, f"from 0 to below --epochs {self.epochs}"),
            "clip_grad": (self.clip_grad is None or 0 < self.clip_grad <= LARGEST, "above 0"),
            "mixup": (0 <= self.mixup <= 100, "from 0 to 100"),
            "cutmix": (0 <= self.cutmix <= 100, "from 0 to 100"),
            "model_ema_decay": (0 <= self.model_ema_decay < 1, "at least 0 and below 1"),
            "lr_gamma": (0 < self.lr_gamma <= 1, "in (0, 1]"),
            "checkpointing_epochs": (self.checkpointing_epochs >= 1, "at least 1"),
            "evaluation_epochs": (self.evaluation_epochs >= 1, "at least 1"),
            "process_timeout": (
                self.process_timeout is None or 0 < self.process_timeout <= MONTH,
                f"above 0 seconds and at most {MONTH} (30 days)",
            ),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        }
        for name, (fine, wanted) in limits.items():
            if not fine:
                raise UserError(f"--{name} {getattr(self, name)}: must be {wanted}")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.epochs:
            raise UserError(f"--stop_after {self.stop_after}: must be between 1 and --epochs {self.epochs}")
        if self.lr_restarts is not None and not 1 <= self.lr_restarts <= self.epochs:
            raise UserError(f"--lr_restarts {self.lr_restarts}: must be between 1 and --epochs {self.epochs}")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.tracker_project_name):
            raise UserError(
                f"--tracker_project_name {self.tracker_project_name}: must be of letters, digits, '.', '_' and '-'"
            )
        if self.streaming and (self.aa != "none" or self.reprob):
            raise UserError("--streaming: cannot be combined with --aa or --reprob, drawn by an image's number")
        if self.nesterov and self.opt != "sgd":
            raise UserError(f"--nesterov: is for --opt sgd, not {self.opt}")
        if self.pretrained and self.weights is not None:
            raise UserError(f"--weights {self.weights}: cannot be combined with --pretrained")

    @property
    def last_epoch(self) -> int:
        """Epochs that are trained."""
        return self.stop_after or self.epochs

    def evaluates(self, epoch: int) -> bool:
        """Whether accuracies are measured after this epoch, counted from 1; up to 0 they are a warm-up's."""
        return epoch >= 1 and (epoch % self.evaluation_epochs == 0 or epoch == self.last_epoch)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size

    def inputs(self) -> dict[str, list[str]]:
        """Folders and files that the run reads, by the option that names them."""
        given = {"--weights": self.weights, "--data_dir": self.data_dir}
        return {option: [place] for option, place in given.items() if place}

    def as_dict(self) -> dict:
        return asdict(self)


# Where and whether a run is written, not what is computed: free to differ when a run is resumed.
NOT_COMPUTED = {"output_dir", "overwrite", "resume_from_checkpoint", "with_tracking", "report_to"}
NOT_COMPUTED |= {"checkpointing_epochs", "tracker_project_name", "run_name", "process_timeout"}
NOT_COMPUTED |= {"students", "methods"}  # of distill.py: each of their runs is as if it were alone
NOT_COMPUTED |= {"cache_folder"}  # of distill.py: what is in it is checked

# Options that name run folders and files which a run reads: known by what these hold.
INPUTS = {"teacher", "teacher_weights", "teacher_classes", "weights", "vanilla_run"}
# Options that name places on the machine of whoever trains.
PLACES = INPUTS | {"unlabeled", "data_dir", "cache_dir", "cache_folder", "output_dir", "resume_from_checkpoint"}


def union(classes: Iterable[type]) -> tuple[type, ...]:
    """Bases of a dataclass with the options of all `classes`.

    Raises:
        TypeError: two classes that declare the same option apart from each other.
    """
    classes = list(dict.fromkeys(classes))
    bases = tuple(a for a in classes if not any(a is not b and issubclass(b, a) for b in classes))
    owners: dict[str, type] = {}
    for each in bases:
        for part in each.__mro__:
            for name in vars(part).get("__annotations__", {}):
                if owners.setdefault(name, part) is not part:
                    raise TypeError(f"{part.__name__} and {owners[name].__name__} both declare '{name}'")
    return bases
