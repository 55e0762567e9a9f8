"""Train a teacher.

python train_teacher.py
accelerate launch --config_file accelerate_config.yaml train_teacher.py \\
    --config recipes/digits_gtn.yaml --output_dir runs/gtn
accelerate launch --config_file accelerate_config.yaml train_teacher.py \\
    --config recipes/cifar100_resnet32_gtn.yaml --output_dir runs/t
python train_teacher.py --method gtn --weights runs/vanilla --freeze_teacher_epochs 5 --epochs 20 --output_dir runs/g
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote

import safetensors.torch
import torch

import kernels
from common import UserError, check_name, write_atomically
from engine.checkpoint import state_tensors
from engine.config import RunConfig, parse
from engine.data import ImageSet, hold_out, load_images
from engine.finish import finish_run
from engine.loop import Loop
from engine.processes import run_script, start_accelerator
from engine.tracking import RunFolder, Screen, default_folder
from models import ModelInfo, create_model, describe_models, find_spec, load_pretrained, save_pretrained
from models.compiled import compile_regions
from models.network import count_parameters
from models.pool import pool_of
from models.weights import initial_weights
from teachers import TEACHERS
from teachers.gtn import GTNOptions


@dataclass
class TeacherConfig(GTNOptions, RunConfig):
    """Options of train_teacher.py.

    Args:
        method: what the teacher is trained for: vanilla, mse, sftn or gtn.
        model: the teacher: a zoo name (--list_models); default: that of the run of --weights, else resnet20.
        student: of --method sftn: the one student that the branches stand for, named as for distill.py.
        pool_students: of --method gtn: students of the pool, named as for distill.py (pool:SEED, specs as .json): the
            supernet offers in each layer what these take there, and nothing else. Their specs are kept in students/.
        schedule: STEP/TOTAL: TOTAL epochs, the learning rate times lr_gamma every STEP (as early-stopped teachers
            have it); takes the place of --epochs, --lr_schedule and --lr_milestones.
        anchors: keep this many models on the way, at equal intervals of epochs, for distill.py --method rco.
        vanilla_run: run folder of a vanilla teacher to compare with, epoch by epoch; default: the run of --weights.
    """

    method: str = "vanilla"
    model: str | None = None
    student: str | None = None
    pool_students: list[str] = field(default_factory=list)
    schedule: str | None = None
    anchors: int = 0
    vanilla_run: str | None = None

    def check(self) -> None:
        if self.schedule is not None:
            if not (match := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.schedule)):
                raise UserError(f"--schedule {self.schedule}: write STEP/TOTAL in epochs, for example 15/50")
            step, self.epochs = int(match[1]), int(match[2])
            self.lr_schedule, self.lr_milestones = "multistep", list(range(step, self.epochs, step))
        super().check()
        if not 0 <= self.anchors <= self.last_epoch:
            raise UserError(f"--anchors {self.anchors}: must be between 0 and the {self.last_epoch} epochs")
        if self.freeze_teacher_epochs and self.method not in ("sftn", "gtn"):
            raise UserError(
                f"--freeze_teacher_epochs {self.freeze_teacher_epochs}: --method {self.method} has no branches to train"
            )
        if self.student is not None and self.method != "sftn":
            raise UserError(f"--student {self.student}: is for --method sftn, which trains for one student")
        if self.branches and self.method not in ("sftn", "gtn"):
            raise UserError(f"--branches {' '.join(map(str, self.branches))}: --method {self.method} has none")
        if self.pool_students and self.method != "gtn":
            raise UserError(f"--pool_students {' '.join(self.pool_students)}: are for --method gtn")


def main() -> None:
    listings = {"models": describe_models, "methods": [f"{name}: {row.paper}" for name, row in TEACHERS.items()]}
    config = parse(TeacherConfig, __doc__, listings)
    check_name("--method", config.method, TEACHERS)
    config.check_gtn()
    students: dict[str, dict] = {}
    if config.pool_students:
        students = {name: spec_of(name, config) for name in config.pool_students}
        if len({spec_path(Path(), name) for name in config.pool_students}) < len(config.pool_students):
            raise UserError(f"--pool_students {' '.join(config.pool_students)}: two have the same name")
        # From here on the pool says it all: in config.yaml, pool:SEED would be a student of the smaller pool.
        config.pool, config.pool_students = pool_of(students), []
    source = source_run(config)
    config.model = config.model or (source.name if source else "resnet20")
    config.dataset = config.dataset or (source.dataset if source else "digits")
    config.image_size = config.image_size or (source.image_size if source else None)
    reference = Reference(config.vanilla_run, "--vanilla_run") if config.vanilla_run else None
    config.output_dir = config.output_dir or default_folder(config.method, config.model, config.dataset)
    folder = RunFolder(config.output_dir, config.overwrite, config.resume_from_checkpoint is not None)
    trackers = config.report_to if config.with_tracking else None
    accelerator = start_accelerator(config.mixed_precision, trackers, config.output_dir)
    screen = Screen(accelerator.is_main_process)
    try:
        implementation = kernels.use(config.kernels, accelerator.device)
    except ValueError as error:
        raise UserError(f"--kernels {config.kernels}: {error}") from None

    with accelerator.main_process_first():
        data = load_images(config.dataset, config.image_size, accelerator.is_main_process, config, accelerator.device)
    if source and source.dataset == config.dataset:  # as its weights know the images, whatever part is trained on
        data = replace(data, mean=source.mean, std=source.std)
    data = hold_out(data, config.val_fraction, "val")
    data = hold_out(data, config.gate_holdout if config.method == "gtn" else 0.0, "gates")
    torch.manual_seed(config.seed)
    teacher = create_model(config.model, data.num_classes, config.pool, "--model", data.image_size)
    with accelerator.main_process_first():
        initial = initial_weights(teacher, config.pretrained, config.weights)
    objective = TEACHERS[config.method].objective(teacher, config, data.image_size)
    if config.compile:
        compile_regions(objective)

    def after_epoch(epoch: int, row: dict) -> None:
        """Anchor i of K is the model after epoch i E / K; a teacher that falls behind the vanilla one is named."""
        if epoch in [-(-i * config.last_epoch // config.anchors) for i in range(1, config.anchors + 1)]:
            info = describe(config, data, pool=None)
            save_pretrained(objective.product(), info, folder.path / "anchors" / f"{epoch:04d}")
        if reference and (behind := reference.behind(row["accuracy"]["teacher"], epoch / config.epochs)):
            screen.say(f"warning: {behind}")

    loop = Loop(objective, data, config, accelerator, folder, screen, after_epoch)
    parameters = count_parameters(teacher)
    screen.say(
        f"{config.method} teacher {config.model} ({parameters:,} parameters) on {data.name}: {len(data.train):,} "
        f"training and {len(data.test):,} test images of {data.image_size}x{data.image_size}, {data.num_classes} "
        f"classes; seed {config.seed}, {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"kernels: {implementation}"
    )
    screen.say(data.described)
    if initial:
        screen.say(f"initial weights: {initial}")
    for line in objective.advice(data.image_size):
        screen.say(line)
    progress = loop.run()

    pool = asdict(config.pool) if config.method == "gtn" else None
    info = describe(config, data, pool)
    warnings = list(objective.warnings(progress.history).values())
    if reference and (top1 := progress.history[-1]["accuracy"]["teacher"]) < reference.top1:
        warnings.append(
            f"the teacher reaches {top1:.2f}%, the vanilla teacher of {config.vanilla_run} {reference.top1:.2f}%"
        )
    if accelerator.is_main_process:
        info = save_pretrained(objective.product(), info, folder.path)
        if config.method == "gtn" and config.save_supernet:
            save_supernet(objective, folder.path / "supernet.safetensors")
        for name, spec in students.items():  # pool:SEED of the smaller pool is another network
            write_atomically(spec_path(folder.path, name), json.dumps(spec, indent=1) + "\n")
    suggested = config.student or ("pool:7" if pool else "resnet8")
    if students:
        suggested = str(spec_path(folder.path, next(iter(students))))
    finish_run(
        loop,
        described={
            "method": config.method,
            "model": config.model,
            "parameters": parameters,
            "sha256": info.sha256,
            "kernels": implementation,
        },
        warnings=warnings,
        next_command=f"python distill.py --teacher {quote(str(folder.path))} --student {quote(suggested)} --method kd "
        f"--epochs {config.last_epoch} --output_dir {quote(f'{folder.path}-student')}",
    )


def describe(config: TeacherConfig, data: ImageSet, pool: dict | None) -> ModelInfo:
    return ModelInfo(config.model, data.name, data.num_classes, data.image_size, data.mean, data.std, pool=pool)


def spec_of(name: str, config: TeacherConfig) -> dict:
    if (spec := find_spec(name, config.pool, "--pool_students")) is None:
        raise UserError(f"--pool_students {name}: is no student of a pool; give pool:SEED, nas_* or a spec (.json)")
    return spec


def spec_path(folder: Path, name: str) -> Path:
    return folder / "students" / f"{Path(name).stem.replace(':', '')}.json"


def source_run(config: TeacherConfig) -> ModelInfo | None:
    """What the run folder of --weights says of its model; None where there is no such folder."""
    if config.weights is None or not Path(config.weights).is_dir():
        return None
    try:
        return load_pretrained(config.weights).info
    except UserError as error:
        raise UserError(f"--weights {config.weights}: {error}") from None


class Reference:
    """The finished run of a vanilla teacher. Raises UserError, naming `argument`, where there is none."""

    MARGIN = 3.0  # points that a teacher may be behind at the same part of its schedule

    def __init__(self, run: str, argument: str):
        self.run, self.said = run, False
        try:
            self.top1 = float(json.loads((Path(run) / "summary.json").read_text())["top1"])
            rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
            self.curve = [float(row["accuracy"]["teacher"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{argument} {run}: holds no finished run of a teacher") from None

    def behind(self, top1: float, done: float) -> str | None:
        """Said once, from a quarter of the schedule on: that `top1` is below the curve after the share `done`."""
        then = self.curve[max(0, min(len(self.curve), round(done * len(self.curve))) - 1)]
        if self.said or done < 0.25 or top1 > then - self.MARGIN:
            return None
        self.said = True
        return (
            f"the teacher is at {top1:.2f}%, the one of {self.run} was at {then:.2f}% after the same part of its "
            "epochs. Lower --teacher_kl_share or --alpha, or start from that teacher (--weights RUN "
            "--freeze_teacher_epochs E)."
        )


def save_supernet(objective, path: Path) -> None:
    """Branches and gates of a GTN run, with the pool and the gates' probabilities as JSON in the metadata."""
    names = ("branches.", "gates.phi")
    tensors = {name: tensor for name, tensor in state_tensors(objective).items() if name.startswith(names)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"pool": json.dumps(asdict(objective.options.pool)), "gates": json.dumps(objective.record()["gates"])}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


if __name__ == "__main__":
    run_script(main)
