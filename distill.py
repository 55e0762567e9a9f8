"""Distil a student from a trained teacher.

python distill.py --teacher runs/gtn --student pool:7
accelerate launch --config_file accelerate_config.yaml distill.py \\
    --config recipes/digits_kd.yaml --teacher runs/gtn --student pool:7 --output_dir runs/s
accelerate launch --config_file accelerate_config.yaml distill.py \\
    --config recipes/cifar100_kd.yaml --teacher runs/t --student nas_m --output_dir runs/s
"""

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch

import kernels
from common import UserError, check_name
from engine.config import RunConfig, parse
from engine.data import ImageSet, hold_out, load_images
from engine.finish import finish_run
from engine.loop import Loop
from engine.processes import run_script, start_accelerator
from engine.tracking import RunFolder, Screen, default_folder
from losses import METHODS
from losses.distillation import Distillation
from models import ModelInfo, create_model, describe_models, find_spec, load_pretrained, save_pretrained
from models.network import Network
from models.pool import Pool
from models.weights import initial_weights


@dataclass
class DistillConfig(RunConfig):
    """Options of distill.py.

    Args:
        teacher: run folder of a trained teacher; not needed for --method none.
        student: a zoo name (--list_models), pool:SEED, or the path of a student's spec (.json).
        method: kd, or none: the student trained alone.
        alpha: weight of the distillation term; cross-entropy with the labels gets 1 - alpha.
        temperature: softmax temperature of teacher and student in the distillation term.
        pool: the pool of pool:SEED; default: the one a GTN teacher was trained for, else the paper's.
    """

    teacher: str | None = None
    student: str = "pool:0"
    method: str = "kd"
    alpha: float = 0.9
    temperature: float = 4.0
    pool: Pool | None = None

    def check(self) -> None:
        super().check()
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}: must be in [0, 1]")
        if self.pool is not None:
            self.pool.check()


def main() -> None:
    listings = {"models": describe_models, "methods": [f"{name}: {row.paper}" for name, row in METHODS.items()]}
    config = parse(DistillConfig, __doc__, listings)
    check_name("--method", config.method, METHODS)
    teacher = load_teacher(config)
    config.dataset = config.dataset or (teacher.info.dataset if teacher else "digits")
    config.output_dir = config.output_dir or default_folder(config.method, config.student, config.dataset)
    folder = RunFolder(config.output_dir, config.overwrite, config.resume_from_checkpoint is not None)
    trackers = config.report_to if config.with_tracking else None
    accelerator = start_accelerator(config.mixed_precision, trackers, config.output_dir, sparse_gradients=False)
    screen = Screen(accelerator.is_main_process, config.epochs)
    try:
        implementation = kernels.use(config.kernels, accelerator.device)
    except ValueError as error:
        raise UserError(f"--kernels {config.kernels}: {error}") from None

    with accelerator.main_process_first():
        data = load_images(
            config.dataset, image_size(config, teacher), accelerator.is_main_process, config, accelerator.device
        )
    data = hold_out(fit_to_teacher(data, teacher), config.val_fraction, "val")
    pool = config.pool or (Pool(**teacher.info.pool) if teacher and teacher.info.pool else Pool())
    torch.manual_seed(config.seed)
    student = create_model(config.student, data.num_classes, pool, "--student", data.image_size)
    with accelerator.main_process_first():
        initial = initial_weights(student, config.pretrained, config.weights)
    loss = METHODS[config.method].loss(config.alpha, config.temperature)
    objective = Distillation(student, loss, teacher)

    loop = Loop(objective, data, config, accelerator, folder, screen)
    source = f"{config.method} from {teacher.info.name} in {config.teacher}" if teacher else "trained alone"
    parameters = sum(parameter.numel() for parameter in student.parameters())
    screen.say(
        f"student {config.student} ({parameters:,} parameters), {source}, on {data.name}: {len(data.train):,} training "
        f"and {len(data.test):,} test images of {data.image_size}x{data.image_size}, {data.num_classes} classes; "
        f"seed {config.seed}, {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"kernels: {implementation}"
    )
    screen.say(data.described)
    if initial:
        screen.say(f"initial weights: {initial}")
    loop.run()

    spec = find_spec(config.student, pool)
    info = ModelInfo(config.student, data.name, data.num_classes, data.image_size, data.mean, data.std, spec)
    if accelerator.is_main_process:
        info = save_pretrained(objective.product(), info, folder.path)
    described = {"method": config.method, "model": config.student, "parameters": parameters, "sha256": info.sha256}
    described["kernels"] = implementation
    if teacher:
        described["teacher"] = {"path": config.teacher, "model": teacher.info.name, "sha256": teacher.info.sha256}
    finish_run(
        loop,
        described=described,
        warnings=[],
        next_command=next_command(config, folder.path / "model.json" if spec else config.student, data.image_size),
    )


def next_command(config: DistillConfig, student: str | Path, size: int) -> str:
    """The other half of a comparison: the same student trained alone, or distilled."""
    other = "--method none" if config.teacher else "--method kd --teacher RUN_FOLDER"
    name = config.output_dir.rstrip("/") + ("-alone" if config.teacher else "-distilled")
    return (
        f"python distill.py {other} --student {quote(str(student))} --dataset {quote(config.dataset)} "
        f"--image_size {size} --epochs {config.epochs} --output_dir {quote(name)}"
    )


def load_teacher(config: DistillConfig) -> Network | None:
    if not METHODS[config.method].needs_teacher:
        if config.teacher is not None:
            raise UserError(f"--teacher {config.teacher}: --method {config.method} trains the student alone")
        return None
    if config.teacher is None:
        raise UserError(f"--teacher: --method {config.method} needs the run folder of a trained teacher")
    try:
        return load_pretrained(config.teacher)
    except UserError as error:
        raise UserError(f"--teacher {config.teacher}: {error}") from None


def image_size(config: DistillConfig, teacher: Network | None) -> int | None:
    """The size the teacher was trained at, unless the user asks for another: then that is a mistake."""
    if teacher is None:
        return config.image_size
    if config.image_size not in (None, teacher.info.image_size):
        raise UserError(
            f"--image_size {config.image_size}: the teacher was trained on images of {teacher.info.image_size}"
        )
    return teacher.info.image_size


def fit_to_teacher(data: ImageSet, teacher: Network | None) -> ImageSet:
    """The data normalised as the teacher knows it: teacher and student see the same batch."""
    if teacher is None:
        return data
    if teacher.info.num_classes != data.num_classes:
        raise UserError(
            f"--dataset {data.name}: has {data.num_classes} classes, but the teacher {teacher.info.num_classes}"
        )
    return replace(data, mean=teacher.info.mean, std=teacher.info.std)


if __name__ == "__main__":
    run_script(main)
