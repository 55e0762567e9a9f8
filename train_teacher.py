"""Train a teacher.

python train_teacher.py
accelerate launch --config_file accelerate_config.yaml train_teacher.py \\
    --config recipes/digits_gtn.yaml --weights runs/vanilla --output_dir runs/gtn
accelerate launch --config_file accelerate_config.yaml train_teacher.py \\
    --config recipes/cifar100_resnet32_gtn.yaml --output_dir runs/t
python train_teacher.py --method gtn --weights runs/vanilla --freeze_teacher_epochs 5 --epochs 20 --output_dir runs/g
"""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote

import torch

from common import UserError, check_name, read_text, write_atomically
from data.datasets import hold_out
from data.splits import AnySplit, ImageSet
from engine.command_line import parse
from engine.config import RunConfig, union
from engine.distributed import run_script
from engine.objective import Objective
from engine.piece_graphs import advice
from engine.run import Run
from models import ModelInfo, create_model, describe_models, find_spec, load_pretrained, rebuilt_by, save_pretrained
from models.compiled import compile_regions
from models.foreign import check_classes, describe_stages
from models.freezing import freeze
from models.network import count_parameters
from models.own import trust
from models.pool import pool_of
from models.preprocessing import published_preprocessing
from models.weights import initial_weights
from objectives.registry import TEACHERS

LISTINGS = {"models": describe_models, "methods": [f"{name}: {row.paper}" for name, row in TEACHERS.items()]}


@dataclass
class TeacherConfig(*union(each for row in TEACHERS.values() for each in row.reads()), RunConfig):
    """Options of train_teacher.py.

    Args:
        method: what the teacher is trained for: vanilla, mse, sftn or gtn.
        model: the teacher: a zoo name (--list_models), timm:NAME, hf-hub:ORG/NAME, torchvision:NAME or
            FILE.py:FUNCTION, which is executed; default: that of the run of --weights, else resnet20.
        schedule: STEP/TOTAL: TOTAL epochs, the learning rate times lr_gamma every STEP (as early-stopped teachers
            have it); takes the place of --epochs, --lr_schedule and --lr_milestones.
        anchors: keep this many models on the way, at equal intervals of epochs, for distill.py --method rco.
        vanilla_run: run folder of a vanilla teacher to compare with, epoch by epoch; default: the run of --weights.
    """

    title = "teacher"
    essential = ("model", *RunConfig.essential)

    method: str = "vanilla"
    model: str | None = None
    schedule: str | None = None
    anchors: int = 0
    vanilla_run: str | None = None

    @classmethod
    def rows(cls) -> dict[str, tuple[type, ...]]:
        return {name: row.reads() for name, row in TEACHERS.items()}

    def chosen(self) -> tuple[type, ...]:
        return TEACHERS[check_name("--method", self.method, TEACHERS)].reads(self.model)

    def check(self) -> None:
        if self.schedule is not None:
            if not (match := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.schedule)):
                raise UserError(f"--schedule {self.schedule}: write STEP/TOTAL in epochs, for example 15/50")
            step, self.epochs = int(match[1]), int(match[2])
            self.lr_schedule, self.lr_milestones = "multistep", list(range(step, self.epochs, step))
        if not 0 <= self.anchors <= self.last_epoch:
            raise UserError(f"--anchors {self.anchors}: must be between 0 and the {self.last_epoch} epochs")

    def inputs(self) -> dict[str, list[str]]:
        """See RunConfig."""
        specs = [name for name in (self.student, *self.pool_students) if name and name.endswith(".json")]
        return super().inputs() | {"--vanilla_run": [self.vanilla_run] if self.vanilla_run else [], "the spec": specs}


def main() -> None:
    config = parse(TeacherConfig, __doc__, LISTINGS)
    trust([config.model, config.student])
    source = source_run(config)
    reference = Reference(config.vanilla_run) if config.vanilla_run else None
    run = Run(config, config.method, config.model)
    data, gate_split = load_data(run, source)
    students = pool_students(config, data.image_size)
    torch.manual_seed(config.seed)
    known = {"stages": config.teacher_stages}
    known |= {"architecture": source.architecture} if source and source.name == config.model else {}
    teacher = create_model(config.model, data.num_classes, config.pool, "--model", data.image_size, **known)
    check_classes(teacher, data.num_classes, "--model")
    initial = run.first(initial_weights, teacher, config.pretrained, config.weights)
    frozen = freeze(teacher, config.freeze, initial, f"--model {config.model}")
    objective = TEACHERS[config.method].build(teacher, config, data.image_size, gate_split)
    if config.compile:
        compile_regions(objective)
    pool = asdict(objective.pool.for_images(data.image_size)) if objective.pool else None
    facts = data.num_classes, data.image_size, data.mean, data.std
    info = ModelInfo(config.model, data.name, *facts, pool=pool, class_names=data.class_names, **rebuilt_by(teacher))

    def after_epoch(epoch: int, row: dict) -> None:
        """Anchor i of K is the model after epoch i E / K; a teacher that falls behind the vanilla one is named."""
        if epoch in [-(-i * config.last_epoch // config.anchors) for i in range(1, config.anchors + 1)]:
            save_pretrained(objective.trained_model(), info, run.folder.path / "anchors" / f"{epoch:04d}")
        top1 = row["accuracy"].get("teacher")
        if reference and top1 is not None and (behind := reference.behind(top1, epoch / config.epochs)):
            run.console.print(f"warning: {behind}")

    loop = run.loop(objective, data, after_epoch=after_epoch)
    parameters = count_parameters(teacher)
    what = f"{config.method} teacher {config.model} ({parameters:,} parameters)"
    lines = [initial and f"initial weights: {initial}", frozen, describe_stages(teacher)]
    lines += [*objective.advice(data.image_size), advice(objective, config, run.accelerator)]
    run.introduce(what, data, lines)
    progress = loop.run()
    warnings = list(objective.warnings(progress.history).values())
    warnings += reference.verdict(progress.history) if reference else []
    described = {"method": config.method, "model": config.model, "parameters": parameters}
    if run.is_main:
        described["sha256"] = save(objective, info, students, run.folder.path).sha256
    run.finish(loop, described, warnings, next_command(config, info, students, run.folder.path))


def load_data(run: Run, source: ModelInfo | None) -> tuple[ImageSet, AnySplit | None]:
    """The images, normalised as the weights to start from know them, and those held out for gates."""
    config = run.config
    data = run.load_data(config.image_size)
    if config.pretrained and (known := run.first(published_preprocessing, config.model, "--pretrained")):
        data = replace(data, mean=known.mean, std=known.std)
    if source and source.dataset == config.dataset:
        data = replace(data, mean=source.mean, std=source.std)
    data, val = hold_out(data, config.val_fraction, "validation")
    data, gate_split = hold_out(data, config.gate_holdout, "the gates")
    return replace(data, val=val), gate_split


def pool_students(config: TeacherConfig, image_size: int) -> dict[str, dict]:
    """Specs of --pool_students by name; the pool becomes theirs."""
    students = {name: spec_of(name, config, image_size) for name in config.pool_students}
    if len({spec_path(Path(), name) for name in students}) < len(config.pool_students):
        raise UserError(f"--pool_students {' '.join(config.pool_students)}: two have the same name")
    if students:
        # From here on the pool says it all: in config.yaml, pool:SEED would be a student of the smaller pool.
        config.pool, config.pool_students = pool_of(students), []
    return students


def save(objective: Objective, info: ModelInfo, students: dict[str, dict], folder: Path) -> ModelInfo:
    """Write the teacher, what its method keeps beside it, and its pool's named students."""
    info = save_pretrained(objective.trained_model(), info, folder)
    objective.save_beside(folder)
    for name, spec in students.items():  # pool:SEED of the smaller pool is another network
        write_atomically(spec_path(folder, name), json.dumps(spec, indent=1) + "\n")
    return info


def next_command(config: TeacherConfig, info: ModelInfo, students: dict[str, dict], folder: Path) -> str:
    """The command that distils a student of this teacher."""
    student = config.student or ("pool:7" if info.pool else "resnet8")
    if students:
        student = str(spec_path(folder, next(iter(students))))
    return (
        f"python distill.py --teacher {quote(str(folder))} --student {quote(student)} --method kd "
        f"--epochs {config.last_epoch}{config.flags()} --output_dir {quote(f'{folder}-student')}"
    )


def spec_of(name: str, config: TeacherConfig, image_size: int) -> dict:
    """The spec of a student of --pool_students."""
    if (spec := find_spec(name, config.pool, "--pool_students", image_size)) is None:
        raise UserError(f"--pool_students {name}: is no student of a pool; give pool:SEED, nas_* or a spec (.json)")
    return spec


def spec_path(folder: Path, name: str) -> Path:
    """Where a student's spec is kept in a run folder."""
    return folder / "students" / f"{Path(name).stem.replace(':', '')}.json"


def source_run(config: TeacherConfig) -> ModelInfo | None:
    """What the run folder of --weights says of its model, which fills in what the options leave open."""
    source = None
    if config.weights is not None and Path(config.weights).is_dir():
        try:
            source = load_pretrained(config.weights).info
        except UserError as error:
            raise UserError(f"--weights {config.weights}: {error}") from None
    config.model = config.model or (source.name if source else "resnet20")
    config.dataset = config.dataset or (source.dataset if source else "digits")
    config.image_size = config.image_size or (source.image_size if source else None)
    if source and source.name == config.model:
        config.teacher_stages = config.teacher_stages or source.stages
    return source


class Reference:
    """The finished run of a vanilla teacher, --vanilla_run. Raises UserError where there is none."""

    MARGIN = 3.0  # points that a teacher may be behind at the same part of its schedule

    def __init__(self, run: str):
        self.run, self.warned = run, False
        try:
            self.top1 = float(json.loads(read_text(Path(run) / "summary.json"))["top1"])
            rows = [json.loads(line) for line in read_text(Path(run) / "metrics.jsonl").splitlines()]
            self.curve = [float(row["accuracy"]["teacher"]) for row in rows if row["accuracy"]]
            if not self.curve or not all(map(math.isfinite, (self.top1, *self.curve))):
                raise ValueError("no accuracy")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"--vanilla_run {run}: holds no finished run of a teacher") from None

    def behind(self, top1: float, done: float) -> str | None:
        """A warning, once, from a quarter of the schedule on: that `top1` is below the curve after the share `done`."""
        then = self.curve[max(0, min(len(self.curve), round(done * len(self.curve))) - 1)]
        if self.warned or done < 0.25 or top1 > then - self.MARGIN:
            return None
        self.warned = True
        return (
            f"the teacher is at {top1:.2f}%, the one of {self.run} was at {then:.2f}% after the same part of its "
            "epochs. Lower --teacher_kl_share or --alpha, or start from that teacher (--weights RUN "
            "--freeze_teacher_epochs E)."
        )

    def verdict(self, history: list[dict]) -> list[str]:
        """A warning where the teacher ended below the vanilla one."""
        top1 = history[-1]["accuracy"]["teacher"]
        found = f"the teacher reaches {top1:.2f}%, the vanilla teacher of {self.run} {self.top1:.2f}%"
        return [found] if top1 < self.top1 else []


if __name__ == "__main__":
    run_script(main)
