"""Distil a student from a trained teacher.

python distill.py --teacher runs/gtn --student pool:7
accelerate launch --config_file accelerate_config.yaml distill.py \\
    --config recipes/digits_kd.yaml --teacher runs/gtn --student pool:7 --output_dir runs/s
accelerate launch --config_file accelerate_config.yaml distill.py \\
    --config recipes/cifar100_kd.yaml --teacher runs/t --student nas_m --output_dir runs/s
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import torch

from common import UserError
from data.datasets import hold_out
from data.splits import ImageSet, StreamSplit
from data.unlabeled import with_unlabeled
from engine.command_line import changed_options, flags, parse, set_to_defaults, unread_options
from engine.config import NOT_COMPUTED, RunConfig, union
from engine.distributed import RunError, run_script
from engine.piece_graphs import advice
from engine.run import Run
from engine.run_folder import default_folder, plain
from engine.together import run_together
from losses.method import Method
from losses.registry import METHODS, describe_methods, find_methods, options_of
from models import (
    ModelInfo,
    create_model,
    describe_models,
    find_spec,
    rebuilt_by,
    save_pretrained,
)
from models.compiled import compile_regions
from models.foreign import check_classes, describe_stages
from models.freezing import freeze
from models.fused import fuse
from models.network import Network, count_parameters
from models.own import trust
from models.pool import Pool
from models.weights import initial_weights
from objectives.caching import cache_logits
from objectives.distillation import Distillation, build_methods
from objectives.own_methods import run_with
from objectives.peers import Peers
from objectives.shared import SharedOutputs
from objectives.teachers import (
    build_teacher,
    describe_preprocessing,
    fit_to_teachers,
    image_size,
    load_teachers,
    preprocessed,
    read_anchors,
)

LISTINGS = {"models": describe_models, "methods": describe_methods}


@dataclass
class DistillConfig(*union(each for method in METHODS.values() for each in options_of([method])), RunConfig):
    """Options of distill.py.

    Args:
        student: a zoo name (--list_models), pool:SEED, the path of a student's spec (.json), timm:NAME,
            hf-hub:ORG/NAME, torchvision:NAME or FILE.py:FUNCTION, which is executed.
        student_stages: of a student of another library or of your own: the submodules whose outputs are its feature
            maps, in the order in which they run; default: timm's, where it knows some.
        method: a name of --list_methods, several joined by +, or FILE.py:CLASS, a method of your own.
        pool: the pool of pool:SEED; default: the one a GTN teacher was trained for, else the paper's.
        students: several in place of student, each trained as if it were alone, into output_dir/NAME; the teacher sees
            a batch once for all of them.
        methods: several in place of method, for every student.
    """

    title = "student"
    essential = ("student", "students", "pool", *RunConfig.essential)

    student: str = "pool:0"
    student_stages: list[str] = field(default_factory=list)
    method: str = "kd"
    pool: Pool | None = None
    students: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)

    @classmethod
    def with_method(cls, method: str) -> "type[DistillConfig]":
        return with_own_options(cls, method)

    @classmethod
    def rows(cls) -> dict[str, tuple[type, ...]]:
        return {name: options_of([method]) for name, method in METHODS.items()}

    def chosen(self) -> tuple[type, ...]:
        names = self.methods or [self.method]
        return tuple(dict.fromkeys(part for name in names for part in options_of(find_methods(name), self.kd_weight)))

    def check(self) -> None:
        if self.pool is not None:
            self.pool.check()
        if self.unlabeled and (self.mixes or self.streaming):
            other = (
                "--streaming, which shows no test images to compare with" if self.streaming else "--mixup or --cutmix"
            )
            raise UserError(f"--unlabeled {self.unlabeled}: cannot be combined with {other}")
        if not (self.students or self.methods):
            return
        if self.resume_from_checkpoint not in (None, "latest"):
            raise UserError("--resume_from_checkpoint: of several students it can only be 'latest'")
        if self.cuda_graph and self.needs_teacher:
            raise UserError(
                "--cuda_graph: records a step with the teacher's own for each of several students; give one"
            )
        names = self.methods or [self.method]
        free = [name for name in names if not learns_from_teacher(find_methods(name))]
        if free and (self.cache_teacher == "disk" or self.unlabeled):
            other = "--unlabeled" if self.unlabeled else "--cache_teacher disk"
            raise UserError(f"--methods {free[0]}: has no teacher, and {other} decides on its images too")
        if alone := next((name for name in names if ".py:" in name or "rco" in name.split("+")), None):
            raise UserError(f"--method {alone}: goes with no other; give it to one --student")

    @property
    def needs_teacher(self) -> bool:
        """Whether any of its students learns from one."""
        return any(learns_from_teacher(find_methods(name)) for name in self.methods or [self.method])

    def each(self, known: Sequence[ModelInfo] = ()) -> list["DistillConfig"]:
        """The options of every student's run, as if it were the only one.

        Args:
            known: the teachers of run folders. What they decide for the students that learn from them, the size of
                images and the pool, the options of the others say.
        """
        if not (self.students or self.methods):
            return [self]
        base, found = Path(self.output_dir or default_folder("distilled", "students", self.dataset)), {}
        for student in self.students or [self.student]:
            for method in self.methods or [self.method]:
                name = "-".join(map(plain, [student, *([method] if self.methods else [])]))
                if name in found:
                    given = f"--methods {method}" if self.methods.count(method) > 1 else f"--students {student}"
                    raise UserError(f"{given}: there are two for the folder {base / name}")
                one = {"student": student, "method": method, "students": [], "methods": []}
                found[name] = replace(self, **one, output_dir=str(base / name))
                set_to_defaults(found[name], unread_options(found[name]))
                if not found[name].needs_teacher:
                    found[name].image_size = image_size(self, known)
                    found[name].pool = pool_of(self, known)
        return list(found.values())

    @property
    def own_weights(self) -> str | None:
        """The student's of --weights: in a folder that is no run's, the file that is named as its spec is."""
        place = Path(self.weights or "")
        if self.weights is None or not place.is_dir() or (place / "model.safetensors").exists():
            return self.weights
        return str(place / f"{Path(self.student).stem}.safetensors")

    def inputs(self) -> dict[str, list[str]]:
        """See RunConfig."""
        specs = [name for name in (self.student, *self.peers) if name.endswith(".json")]
        files = {f"--{name}": getattr(self, name) for name in ("teacher_weights", "teacher_classes")}
        files = {option: [place] for option, place in files.items() if place}
        return super().inputs() | {"--teacher": self.teacher, "the spec": specs} | files


def main() -> None:
    config = parse(DistillConfig, __doc__, LISTINGS)
    trust([config.student, *config.students, *getattr(config, "peers", []), *config.teacher])
    teachers = load_teachers(config, config.needs_teacher)
    known = [teacher.info for teacher in teachers if isinstance(teacher, Network)]
    config.dataset = config.dataset or (known[0].dataset if known else "digits")
    configs = config.each(known)
    methods = [check_methods(each) for each in configs]
    runs = [Run(each, each.method, each.student) for each in configs]
    first = runs[0]
    data = first.load_data(image_size(config, known))
    teachers = [first.first(build_teacher, each, data, config) if isinstance(each, str) else each for each in teachers]
    data, val = hold_out(data, config.val_fraction, "validation")
    data = replace(data, val=val)
    if config.unlabeled:
        data = first.first(with_unlabeled, data, config, first.accelerator.device, first.is_main)
    fitted = fit_to_teachers(data, teachers)
    teachers, shared = preprocessed(teachers, fitted, config), SharedOutputs() if len(runs) > 1 else None
    students = [
        Student(run, joined, *((teachers, fitted) if learns_from_teacher(joined) else ([], data)), shared)
        for run, joined in zip(runs, methods, strict=True)
    ]
    with run_with([method for joined in methods for method in joined]):
        if len(students) == 1:
            students[0].loop.run()
            failed = {}
        else:
            failed = run_together({student.name: student.loop for student in students}, shared.next_batch)
    for student in students:
        if student.name not in failed:
            student.finish()
    if failed:
        raise RunError(f"{', '.join(failed)} of {len(students)} students; the others are done")


class Student:
    """One student's run: what is made before training, and what is written after it.

    Attributes:
        name: of its folder.
        loop: trains it.
    """

    def __init__(
        self,
        run: Run,
        methods: list[type[Method]],
        teachers: list[Network],
        data: ImageSet,
        shared: SharedOutputs | None,
    ):
        self.run, self.teachers, self.data, config = run, teachers, data, run.config
        self.name = run.folder.path.name
        self.pool = pool_of(config, [teacher.info for teacher in teachers]) or Pool()
        self.taught = describe_teachers(config, teachers)
        others = (config.peers or [config.student]) if methods[0].peers else []
        self.alone = not (teachers or others)
        torch.manual_seed(config.seed)
        self.network, *started = self._make_network()
        peers = [create_model(name, data.num_classes, self.pool, "--peers", data.image_size) for name in others]
        if config.compile:
            for network in (self.network, *peers, *teachers):
                compile_regions(network)
        if peers:
            weight = 1.0 if config.kd_weight is None else config.kd_weight
            objective = Peers([self.network, *peers], methods[0], weight)
        else:
            objective = distillation(config, methods, self.network, teachers, data, shared)
        if not config.compile:
            for teacher in teachers:
                fuse(teacher)
        self.weights = objective.term_weights
        cached = cache_logits(config, objective, data)
        self.loop = run.loop(objective, data, {f"the teacher {each['path']}": each["sha256"] for each in self.taught})
        following = advice(objective, config, run.accelerator) if shared is None else None
        self._introduce(others, [*started, cached], following)

    def _make_network(self) -> tuple[Network, str | None, str | None]:
        """The student with the weights that it starts from; lines on these, and on those that it keeps."""
        config, data = self.run.config, self.data
        built = {"argument": "--student", "image_size": data.image_size, "stages": config.student_stages}
        network = create_model(config.student, data.num_classes, self.pool, **built)
        check_classes(network, data.num_classes, "--student")
        initial = self.run.first(initial_weights, network, config.pretrained, config.own_weights)
        frozen = freeze(network, config.freeze, initial, f"--student {config.student}")
        return network, initial and f"initial weights: {initial}", frozen

    def _introduce(self, peers: list[str], lines: list[str | None], last: str | None) -> None:
        """Tell the user what is trained, beside what `lines` say, and `last`."""
        run, data, config = self.run, self.data, self.run.config
        parameters = count_parameters(self.network)
        source = describe_source(config, self.teachers, peers)
        loss = f"loss: {' + '.join(f'{weight:g} {name}' for name, weight in self.weights.items())}"
        loss += f"; after epoch {config.stop_kd_epoch} the labels alone" if self.taught and config.stop_kd_epoch else ""
        lines = [loss, *lines, *map(describe_stages, [self.network, *self.teachers])]
        lines += map(describe_preprocessing, self.teachers)
        lines += [data.unlabeled.described] if data.unlabeled else []
        run.introduce(f"student {config.student} ({parameters:,} parameters), {source},", data, [*lines, last])

    def finish(self) -> None:
        """Save the student and tell the user what came out."""
        run, data, config, objective = self.run, self.data, self.run.config, self.loop.objective
        spec = find_spec(config.student, self.pool, image_size=data.image_size)
        facts = data.num_classes, data.image_size, data.mean, data.std
        built = rebuilt_by(self.network)
        info = ModelInfo(config.student, data.name, *facts, spec, class_names=data.class_names, **built)
        if run.is_main:
            info = save_pretrained(objective.trained_model(), info, run.folder.path)
        described = {"method": config.method, "model": config.student, "parameters": count_parameters(self.network)}
        described |= {"sha256": info.sha256, "loss": self.weights, "teachers": self.taught}
        following = run.folder.path / "model.json" if spec else config.student
        run.finish(self.loop, described, [], next_command(config, following, data.image_size, self.alone))


def with_own_options(config_class: type[DistillConfig], names: str) -> type[DistillConfig]:
    """The options of distill.py, and those of the methods of the user's own among `names`."""
    own = [each for each in options_of(find_methods(names)) if not issubclass(config_class, each)]
    if not own:
        return config_class
    try:
        bases = (config_class, *union([config_class, *own])[1:])
        found = make_dataclass(config_class.__name__, [], bases=bases)
        found()
    except TypeError as error:
        raise UserError(f"--method {names}: its options need defaults and names of their own ({error})") from None
    return found


def learns_from_teacher(methods: Sequence[type[Method]]) -> bool:
    """Whether a student that is trained by these methods together has a teacher."""
    return any(method.needs_teacher for method in methods)


def pool_of(config: DistillConfig, known: Sequence[ModelInfo]) -> Pool | None:
    """The pool of pool:SEED: the user's, else the first that a teacher brings; None: the paper's."""
    return config.pool or next((Pool(**info.pool) for info in known if info.pool), None)


def check_methods(config: DistillConfig) -> list[type[Method]]:
    """The classes of --method. Raises UserError for options that do not go with them."""
    methods = find_methods(config.method)
    if config.method_weights and len(config.method_weights) != len(methods):
        raise UserError(f"--method_weights: {len(config.method_weights)} for the {len(methods)} of --method")
    if config.unlabeled and not all(method.mixable for method in methods):
        raise UserError(f"--unlabeled {config.unlabeled}: --method {config.method} needs the label of every image")
    if methods[0].needs_validation and not config.val_fraction:
        raise UserError(f"--method {config.method}: weighs its peers on a validation split; give --val_fraction 0.1")
    return methods


def distillation(
    config: DistillConfig,
    methods: list[type[Method]],
    student: Network,
    teachers: list[Network],
    data: ImageSet,
    shared: SharedOutputs | None = None,
) -> Distillation:
    """The objective of a run between a student and its teachers."""
    anchors = read_anchors(config.teacher, teachers[0]) if any(method.anchors for method in methods) else []
    config.lr_restarts = config.lr_restarts or len(anchors) or None
    labels = None if isinstance(data.train, StreamSplit) else data.train.labels
    names = (config.student, teachers[0].info.name if teachers else "")
    built, weights = build_methods(methods, student, teachers, data.image_size, data.num_classes, labels, config, names)
    phases = {"warmup_epochs": config.warmup_epochs, "anchors": anchors, "stop_kd_epoch": config.stop_kd_epoch}
    return Distillation(student, teachers, built, weights, **phases, shared=shared, options=config)


def describe_source(config: DistillConfig, teachers: list[Network], peers: list[str]) -> str:
    """What the student learns from, in words."""
    if peers:
        return f"{config.method} with {' and '.join(peers)}"
    sources = [f"{teacher.info.name} in {place}" for teacher, place in zip(teachers, config.teacher, strict=True)]
    return f"{config.method} from {' and '.join(sources)}" if teachers else "trained alone"


def describe_teachers(config: DistillConfig, teachers: list[Network]) -> list[dict]:
    """For summary.json: where the teachers are, and which files they were."""
    return [
        {"path": source, "model": teacher.info.name, "sha256": teacher.info.sha256}
        for teacher, source in zip(teachers, config.teacher, strict=True)
    ]


def next_command(config: DistillConfig, student: str | Path, size: int, alone: bool) -> str:
    """The other half of a comparison: the same student trained alone, or distilled, with the run's other options."""
    method, teacher = ("kd", ["RUN_FOLDER"]) if alone else ("none", [])
    other = replace(config, method=method, teacher=teacher, student=str(student), image_size=size, pool=None)
    other.output_dir = config.output_dir.rstrip("/") + ("-distilled" if alone else "-alone")
    set_to_defaults(other, unread_options(other))
    first = {"method": method, "teacher": teacher or None, "student": other.student}
    last = {"seed": config.seed, "output_dir": other.output_dir}
    changed, said = changed_options(other, DistillConfig), NOT_COMPUTED | {*first, *last}
    options = {name: value for name, value in changed.items() if name not in said}
    return shlex.join(["python", "distill.py", *flags(first | options | last)])


if __name__ == "__main__":
    run_script(main)
