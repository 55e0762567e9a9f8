"""The options of fleet.py: those of distill.py, which it is checked as, and some of search.py and export.py."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from common import UserError
from comparing.planned import flags
from distill import DistillConfig
from engine.config import ScriptOptions
from searching.scoring import ScoringOptions


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
class FleetConfig(DistillConfig, ScoringOptions):
    """Options of fleet.py.

    Args:
        teacher: the run folder of a trained teacher; one of --method gtn brings its pool and, where it was trained with
            --save_supernet, the supernet that members are scored by.
        budgets: what a student may cost, each for a student of its own: 0.5ms (one image, one thread), 300kparams,
            20Mmacs, or several that hold together, 1ms,300kparams.
        pool: the pool of a teacher that brings none; default: the paper's.
        rank: supernet (scores on held-out images), macs (the more the better), or auto: supernet where there is one.
        finalists: the best members of each budget that are scored and measured themselves.
        profile: latencies of another device, or of this one: what profile_device.py wrote there; default: this device
            is measured.
        quantize: int8 adds model.int8.onnx, quantised after training; no.
        calibration_images: training images from whose activations its ranges are taken.
        max_drop: points of top-1 that the int8 file may lose on the test split.
        license: for the model cards, for example apache-2.0.
        output_dir: folder of all that is made.
        overwrite: replace an earlier fleet there.
        seed: seeds everything random.
    """

    title = "fleet"
    essential = ("teacher", "budgets", "method", "epochs", "batch_size", "lr", "quantize", "max_drop", "seed")
    essential += ("output_dir", "overwrite")

    budgets: list[str] = field(default_factory=list)
    rank: Literal["auto", "supernet", "macs"] = "auto"
    finalists: int = 8
    profile: str | None = None
    quantize: Literal["no", "int8"] = "no"
    calibration_images: int = 512
    max_drop: float = 1.0
    license: str | None = None

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

    def words(self, script: str, config_class: type[ScriptOptions], run: str = "", **own) -> list[str]:
        """What follows `python`: the script, a run folder, its options that are not at their defaults, and its own."""
        given = {name: value for name, value in self.as_dict().items() if name not in own}
        usual = defaults(config_class.with_method(self.method))
        given = {name: value for name, value in given.items() if name in usual and value != usual[name]}
        return [script, *([run] if run else []), *flags(given | own)]


def defaults(config_class: type) -> Mapping[str, object]:
    """The default of every option."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(config_class)
    }
