"""A matrix of runs: teachers x students x methods x seeds, from a YAML file or from flags."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path

import yaml

from common import UserError, check_name
from comparing.planned import CONFIGS, PlannedRun
from engine.recipe import read_recipe
from engine.run_folder import plain
from losses.registry import find_methods
from objectives.registry import TEACHERS
from reports.comparison import ALONE, PEERS

NOT_OPTIONS = ("for_each_student", "distill", "run")


@dataclass
class Comparison:
    """Planned runs, and the order in which tables show their students, teachers and methods.

    Attributes:
        rows: of a paper's table: what the paper reports of runs, a row each (comparing/papers.py).
        drawing: of a paper's figure: how its runs are drawn (reports/drawings.py).
        config: what the comparison was asked to be, for its report.
    """

    name: str
    runs: list[PlannedRun]
    students: list[str]
    teachers: list[str]
    methods: list[str]
    note: str = ""
    rows: list[dict] = field(default_factory=list)
    drawing: str = ""
    config: dict = field(default_factory=dict)


@dataclass
class Plan:
    """What a plan file says; every mapping holds options of the scripts.

    Args:
        common: of both scripts.
        teacher, distill: of all teachers, of all students.
        teachers: by name, what is a teacher's own; `for_each_student: true` trains one a student, `weights: NAME`
            starts from another teacher of the seed, `run: FOLDER` is one that is trained already, and `distill:` holds
            options of its students. The first is the standard one, which the others are held against.
        methods: how students are distilled: names, or by name the options; default: the `method` of `distill`.
        alone: of students without a teacher; `alone: null` leaves them out.
        sweep: lists of values by option of distill.py, or by teacher.OPTION of train_teacher.py: every combination.
        note: what the report says of it first.
    """

    teachers: dict[str, dict]
    students: list[str]
    seeds: list[int]
    common: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    methods: dict[str, dict] = field(default_factory=dict)
    alone: dict | None = field(default_factory=dict)
    sweep: dict[str, list] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self):
        named = self.methods or [self.distill.get("method", "kd")]
        named = named if isinstance(named, Mapping) else dict.fromkeys(named)
        self.methods = {name: {"method": name} | (options or {}) for name, options in named.items()}
        self.teachers = {name: options or {} for name, options in self.teachers.items()}
        prefix = "teacher."
        swept = {name: values for name, values in self.sweep.items() if name.startswith(prefix)}
        own = {name: values for name, values in self.sweep.items() if name not in swept}
        for name, options in self.teachers.items():
            if both := own.keys() & options.get("distill", {}).keys():
                raise UserError(f"--sweep {min(both)}: teacher '{name}' sets it for its students")
        self.methods = _swept(self.methods, own, "", "distill.py")
        # What others start from stays as it is.
        starts = {options.get("weights") for options in self.teachers.values()}
        kept = {name: options for name, options in self.teachers.items() if name in starts or "run" in options}
        rest = {name: self.teacher | options for name, options in self.teachers.items() if name not in kept}
        rest = _swept(rest, {name.removeprefix(prefix): swept[name] for name in swept}, prefix, "train_teacher.py")
        self.teachers = kept | rest if swept else self.teachers

    def runs(self, data: Mapping[str, str] | None = None) -> list[PlannedRun]:
        """All runs, seed by seed, teachers before their students; `data`: what --dataset is for the plan's name."""
        found = [run for seed in self.seeds for run in self._of_seed(seed)]
        for run in found:
            run.dataset = (data or {}).get(run.options.get("dataset", ""))
        return found

    def comparison(self, name: str, data: Mapping[str, str] | None = None) -> Comparison:
        """The plan's runs, and what its tables show."""
        names = self.students, list(self.teachers), list(self.methods)
        return Comparison(name, self.runs(data), *names, self.note, config=asdict(self))

    def _of_seed(self, seed: int) -> Iterator[PlannedRun]:
        teachers: dict[tuple[str, str | None], PlannedRun] = {}
        for name, options in self.teachers.items():
            if "run" not in options:
                for student in self.students if options.get("for_each_student") else [None]:
                    teachers[name, student] = self._teacher(name, student, seed, teachers)
        yield from teachers.values()
        for student in self.students:
            if self.alone is not None:
                options = self.common | self.distill | {"method": "none"} | self.alone
                yield self._student(student, seed, ALONE, None, options)
            for method, own in self.methods.items():
                if not find_methods(own["method"])[0].needs_teacher:
                    yield self._student(student, seed, PEERS, method, self.common | self.distill | own)
                    continue
                for name, teacher in self.teachers.items():
                    options = self.common | self.distill | own | teacher.get("distill", {})
                    run = self._student(student, seed, name, method, options)
                    run.teacher = teachers.get((name, student)) or teachers.get((name, None))
                    run.options |= {} if run.teacher else {"teacher": [teacher["run"]]}
                    yield run

    def _teacher(self, name: str, student: str | None, seed: int, teachers: dict) -> PlannedRun:
        own = {key: value for key, value in self.teachers[name].items() if key not in NOT_OPTIONS}
        options = self.common | self.teacher | own | ({"student": student} if student else {}) | {"seed": seed}
        start = options.pop("weights", None)
        weights = teachers.get((start, student)) or teachers.get((start, None))
        if start and not weights and start in self.teachers:
            raise UserError(f"teachers: '{name}' starts from '{start}', which comes after it; name that one first")
        options |= {"weights": start} if start and not weights else {}  # a file, or a run folder
        label = f"seed{seed}-{plain(name)}" + (f"-{plain(student)}" if student else "")
        return PlannedRun(label, "train_teacher.py", options, name, seed, student, weights=weights)

    def _student(self, student: str, seed: int, source: str, method: str | None, options: dict) -> PlannedRun:
        """`method` None: alone."""
        parts = [f"seed{seed}", plain(student), plain(source)]
        parts += [plain(method)] if method and len(self.methods) > 1 else []
        options = options | {"student": student, "seed": seed}
        return PlannedRun("-".join(parts), "distill.py", options, source, seed, student, method or "none")


def read_plan(path: Path) -> Plan:
    """The plan of a YAML file. Raises UserError for what is no plan."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read the plan ({' '.join(str(error).split())})") from None
    return make_plan(content, str(path))


def make_plan(content: object, where: str) -> Plan:
    """A plan of what YAML or flags say. Raises UserError, naming `where` it stands, for what is none."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: a plan is a YAML mapping; see docs/compare.md")
    for key in content:
        check_name(where, str(key), [each.name for each in fields(Plan)])
    for key in ("teachers", "students", "seeds"):
        if not content.get(key):
            raise UserError(f"{where}: '{key}' is missing; see docs/compare.md")
    for key, wanted in (("teachers", dict), ("students", list), ("seeds", list), ("common", dict), ("sweep", dict)):
        if not isinstance(content.get(key, wanted()), wanted):
            raise UserError(f"{where}: '{key}' is to be a {'mapping' if wanted is dict else 'list'}")
    return Plan(**content)


def teacher_of(word: str) -> tuple[str, dict]:
    """(name, options) of a word of --teachers: a method of train_teacher.py, a recipe, or a trained run's folder."""
    if Path(word).is_dir():
        return Path(word).name, {"run": word}
    if word.endswith((".yaml", ".yml")):
        name, options = Path(word).stem, read_recipe(word)
    else:
        name, options = check_name("--teachers", word, TEACHERS), {"method": word}
    each = {"for_each_student": True} if options.get("method") == "sftn" and "student" not in options else {}
    return name, options | each


def assignments(argument: str, words: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE words as options; values are read as YAML."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not given or not name:
            raise UserError(f"{argument} {word}: write NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{argument} {word}: cannot read the value as YAML") from None
    return found


def _swept(named: dict[str, dict], values: dict[str, list], prefix: str, script: str) -> dict[str, dict]:
    """Each of `named` with every combination of the options that it reads, the combination in its name."""
    found = {}
    for option, each in values.items():
        if not isinstance(each, list) or not each:
            raise UserError(f"--sweep {prefix}{option}: give values, for example {prefix}{option}=1,2,4")
        check_name("--sweep", option, CONFIGS[script].__dataclass_fields__)
    for name, options in named.items():
        known = _read_by(script, options.get("method", "vanilla"))
        own = {option: each for option, each in values.items() if option in known}
        for combination in product(*own.values()):
            chosen = dict(zip(own, combination, strict=True))
            label = " ".join([name, *(f"{option}={value}" for option, value in chosen.items())])
            found[label] = options | chosen
    if unread := [option for option in values if not any(option in options for options in found.values())]:
        raise UserError(f"--sweep {prefix}{unread[0]}: none of {', '.join(named)} reads it")
    return found


def _read_by(script: str, method: str) -> set[str]:
    """The options that a run by `method` reads."""
    config_class = CONFIGS[script].with_method(method)
    optional = {each.name for parts in config_class.rows().values() for part in parts for each in fields(part)}
    chosen = config_class(method=method).chosen()
    return set(config_class.__dataclass_fields__) - optional | {each.name for part in chosen for each in fields(part)}
