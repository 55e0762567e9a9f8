"""The options of fleet.py: those of distill.py, which it is checked as, and some of search.py and export.py."""

from dataclasses import dataclass, field
from typing import Literal

from common import UserError
from comparing.executors import check_executor
from comparing.plan import assignments
from distill import DistillConfig
from engine.command_line import changed_options, flags
from engine.config import ScriptOptions
from searching.options import SearchOptions


@dataclass
class Found:
    """Options of distill.py that fleet.py finds out itself.

    Args:
        student: see distill.py.
        students: those that were searched.
        methods: see distill.py.
        resume_from_checkpoint: where there is something to go on from.
    """

    student: str
    students: list[str]
    methods: list[str]
    resume_from_checkpoint: str | None


@dataclass
class FleetConfig(DistillConfig, SearchOptions):
    """Options of fleet.py.

    Args:
        teacher: the run folder of a trained teacher; one of --method gtn brings its pool and, where it was trained with
            --save_supernet, the supernet that members are scored by.
        pool: the pool of a teacher that brings none; default: the paper's.
        quantize: int8 adds model.int8.onnx, quantised after training; no.
        calibration_images: training images from whose activations its ranges are taken.
        max_drop: points of top-1 that the int8 file may lose on the test split.
        finetune_epochs: where it loses more, distil the student for so many further epochs, with its roundings in the
            forward pass; 0: never; default: 3.
        license: for the model cards, for example apache-2.0.
        executor: where students are distilled: all together here, or each by itself on a Ray cluster or by Slurm.
        executor_options: NAME=VALUE of ray.remote, or of submitit's AutoExecutor.
        output_dir: folder of all that is made.
        overwrite: replace an earlier fleet there.
        seed: seeds everything random.
    """

    title = "fleet"
    essential = ("teacher", "budgets", "method", "epochs", "batch_size", "lr", "quantize", "max_drop", "seed")
    essential += ("output_dir", "overwrite")

    quantize: Literal["no", "int8"] = "no"
    calibration_images: int = 512
    max_drop: float = 1.0
    finetune_epochs: int | None = None
    license: str | None = None
    executor: Literal["local", "ray", "slurm"] = "local"
    executor_options: list[str] = field(default_factory=list)

    @classmethod
    def rows(cls) -> dict[str, tuple[type, ...]]:
        return super().rows() | {"distill.py": (Found,)}

    def check(self) -> None:
        """Raise UserError for what is missing; each script checks the rest."""
        if len(self.teacher) != 1:
            given = f" {' '.join(self.teacher)}" if self.teacher else ""
            raise UserError(f"--teacher{given}: name the run folder of one trained teacher")
        if self.output_dir is None:
            raise UserError("--output_dir: name the folder of the fleet, for example runs/fleet")
        check_executor(self.executor, assignments("--executor_options", self.executor_options), False)

    def words(self, script: str, config_class: type[ScriptOptions], run: str = "", **own) -> list[str]:
        """What follows `python`: the script, a run folder, its options that are not at their defaults, and its own."""
        given = {name: value for name, value in changed_options(self, config_class).items() if name not in own}
        return [script, *([run] if run else []), *flags(given | own)]
