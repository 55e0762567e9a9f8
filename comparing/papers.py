"""A paper's table as a comparison: its rows' runs at full length or shortened, and the paper's figures beside them."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

import recipes
from comparing import cost
from comparing.plan import Comparison
from comparing.planned import CONFIGS, ROOT, PlannedRun
from engine.recipe import read_recipe
from engine.run_folder import plain
from recipes import Row, Table, Teacher
from reports.comparison import ALONE, PEERS
from reports.transfer import TransferOptions

SHORT_EPOCHS, SHORT_IMAGES = 1 / 24, 1 / 10  # 10 of 240 epochs, a tenth of the training images
EPOCHS = ("epochs", "stop_after", "freeze_teacher_epochs", "warmup_epochs", "stop_kd_epoch")
SCALES = ("full", "short")
TRANSFER = ("stl10", "tiny_imagenet")  # figures that are those of linear classifiers on frozen embeddings
LISTED_RATE = "resnet20"  # whose step is measured for --list


def paper_comparison(name: str, scale: str, seeds: Sequence[int], data: Mapping[str, str] | None = None) -> Comparison:
    """The runs of a table (recipes.tables); `data`: what --dataset is for the recipes' names.

    Raises UserError for an unknown table.
    """
    table = recipes.table(name)
    found = _Runs(table, name, scale)
    every = {run.name: run for seed in seeds for run in found.of_seed(seed)}
    named = {run.options["dataset"] for run in every.values() if "dataset" in run.options}
    moved = {name: place for name, place in (data or {}).items() if name in named}
    for run in every.values():
        run.dataset = moved.get(run.options.get("dataset", ""))
    students = [run for run in every.values() if run.script == "distill.py"]
    note = f"{table.paper}, {table.title}."
    if scale == "short":
        note += f" Shortened: 1/{1 / SHORT_EPOCHS:.0f} of the epochs, 1/{1 / SHORT_IMAGES:.0f} of the training images."
    note += "".join(f" Images of {place} in place of {name}." for name, place in moved.items())
    taught = [run.source for run in students if run.source not in (ALONE, PEERS)]
    others = [run.source for run in every.values() if run.source not in (ALONE, PEERS)]
    standard = ["vanilla"] if "vanilla" in taught else []
    return Comparison(
        name=f"{name}, {scale}",
        runs=list(every.values()),
        students=list(dict.fromkeys(run.student for run in students)),
        teachers=list(dict.fromkeys([*standard, *taught, *others])),
        methods=list(dict.fromkeys(run.method for run in students if run.source != ALONE)),
        note=note,
        rows=[each for row in table.rows for each in found.figures(row)],
        drawing=table.drawing,
        config={"paper": name, "scale": scale, "seeds": list(seeds)},
    )


def beside(rows: Sequence[dict], records: Sequence[dict]) -> list[dict]:
    """What the paper prints and what came out: mean and deviation over seeds, None where no run is done."""
    found = []
    for row in rows:
        values = [_value(record, row) for record in records if record["run"].partition("-")[2] == row["run"]]
        values = [value for value in values if value is not None]
        ours = statistics.mean(values) if values else None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found.append(row | {"ours": ours, "deviation": deviation, "runs": len(values)})
    return found


def _value(record: dict, row: dict) -> float | None:
    """A record's value of a figure, in the table's measure."""
    if row["figure"] in ("kl", "cka"):
        return record["test"].get(row["figure"])
    if (name := row["figure"].removeprefix("teacher_")) in TRANSFER:
        return record.get("transfer", {}).get(name)
    value = record["top5" if row["figure"].endswith("top5") else "top1"]
    return 100 - value if row["error"] else value


def list_tables(names: Sequence[str] = ()) -> Iterator[str]:
    """A line a table (default: all): rows, runs, and what they cost at full length and shortened, one seed of each run.

    Operations over those of a measured step of one network: another one's may take twice or half as long.
    """
    chosen = {name: table for name, table in recipes.tables().items() if not names or name in names}
    width = max(map(len, chosen))
    yield f"{'table':<{width}}  rows  runs   images full, short (millions)   hours full, short on this machine"
    reference = PlannedRun("list", "train_teacher.py", {"model": LISTED_RATE, "dataset": "cifar100"}, "vanilla", 0)
    rate, measured = cost.measured_rate(reference)
    for name, table in chosen.items():
        costs = []
        for scale in SCALES:
            once = {plain(run.name): run for run in _Runs(table, name, scale).of_seed(0)}
            for run in once.values():
                run.__dict__["config"] = _as_written(run)
            by_run = {_identity(run): cost.of_run(run) for run in once.values()}
            costs.append(sum(by_run.values(), cost.Cost()))
        (full, short), images = costs, [f"{each.images / 1e6:,.1f}" for each in costs]
        hours = [f"{each.seconds(rate) / 3600:,.1f}" for each in (full, short)]
        yield (
            f"{name:<{width}}  {len(table.rows):>4}  {full.runs:>4}   {images[0]:>12} {images[1]:>9}"
            f"                {hours[0]:>12} {hours[1]:>9}   {table.title}"
        )
    yield f"({measured})"


def _identity(run: PlannedRun) -> str:
    """The same for two names of one run, without its key: that would take the parsers."""
    needed = [_identity(each) for each in run.needs]
    return repr((run.script, sorted(run.options.items(), key=str), needed))


def _as_written(run: PlannedRun):
    """The configuration of a recipe's options as they are: of the right types, as the recipes' own tests see to."""
    config_class = CONFIGS[run.script]
    config = config_class(**{name: value for name, value in run.options.items() if name != "pool"})
    for part in config_class.__mro__:
        if "check" in vars(part) and part.__name__ == config_class.__name__:
            part.check(config)  # a schedule in words becomes epochs
    for each in run.needs:
        each.__dict__.setdefault("config", _as_written(each))
    return config


class _Runs:
    """The runs of a table's rows."""

    def __init__(self, table: Table, name: str, scale: str):
        self.table, self.scale = table, scale
        # Of tables that compare teachers' sizes and schedules the source is the teacher; else student and teacher are a
        # pair, whose teachers differ in how they were trained.
        self.by_model = name.startswith("eskd/")
        epochs = TransferOptions.transfer_epochs * (SHORT_EPOCHS if scale == "short" else 1)
        self.transfer = {name: round(epochs) for name in TRANSFER if any(name in row.figures for row in table.rows)}
        self.models = {row.teacher.model for row in table.rows if row.teacher}
        self.teachers: dict[str, PlannedRun] = {}  # by name: rows share them

    def of_seed(self, seed: int) -> Iterator[PlannedRun]:
        for row in self.table.rows:
            teachers = list(self._teacher(row.teacher, seed)) if row.teacher else []
            yield from teachers
            if row.student:
                for label in self.labels(row):
                    yield self._student(row, label, seed, teachers[-1] if teachers else None)

    def _teacher(self, teacher: Teacher, seed: int) -> Iterator[PlannedRun]:
        """Its run, behind those that it starts from."""
        before = list(self._teacher(teacher.weights, seed)) if teacher.weights else []
        yield from before
        name = f"seed{seed}-{teacher.folder('').rpartition('/')[2]}"
        if name not in self.teachers:
            self.teachers[name] = self._new_teacher(name, teacher, seed, before[-1] if before else None)
        yield self.teachers[name]

    def _new_teacher(self, name: str, teacher: Teacher, seed: int, weights: PlannedRun | None) -> PlannedRun:
        options = self._options(teacher.recipe, {"method": teacher.method, "model": teacher.model, **teacher.options})
        more = {"weights": weights, "transfer": self.transfer}
        return PlannedRun(name, "train_teacher.py", options | {"seed": seed}, self.source(teacher), seed, **more)

    def _student(self, row: Row, label: str, seed: int, teacher: PlannedRun | None) -> PlannedRun:
        options = self._options(row.recipe, {"method": row.method, "student": row.student, **row.options})
        named = f"seed{seed}-{self.name(row, label)}"
        told = "distill.py", options | {"seed": seed}, self.source_of(row), seed, label, _method(row), teacher
        return PlannedRun(named, *told, transfer=self.transfer)

    def name(self, row: Row, label: str) -> str:
        """Of a row's run, without its seed."""
        if not row.student:
            return row.teacher.folder("").rpartition("/")[2]
        pair = "" if row.teacher else f"-{plain(label)}"
        return row.folder("").rpartition("/")[2] + pair

    def labels(self, row: Row) -> list[str]:
        """What tables call a row's student: a student without a teacher stands beside each of its pairs."""
        if row.teacher or self.by_model or len(self.models) < 2:
            models = [row.teacher.model] if row.teacher else []
        else:
            peers = row.options.get("peers", [])
            models = [each.teacher.model for each in self.table.rows if each.teacher and each.student == row.student]
            models = [model for model in dict.fromkeys(models) if not peers or model in peers]
        if self.by_model or len(self.models) < 2 or not models:
            return [row.student]
        return [f"{row.student} of {model}" for model in models]

    def source_of(self, row: Row) -> str:
        """What tables call a row's teacher, or its want of one."""
        return self.source(row.teacher) if row.teacher else ALONE if row.method == "none" else PEERS

    def source(self, teacher: Teacher) -> str:
        """What tables call a teacher: how it was trained, or which it is."""
        options = {name: value for name, value in teacher.options.items() if name != "student"}
        words = [f"{name} {value}" for name, value in options.items()]
        if self.by_model:
            return " ".join([teacher.model, *map(str, options.values())])
        if teacher.weights or teacher.options.get("pretrained"):  # a recipe of several steps
            return f"{teacher.method} (adapted)" if teacher.options.get("pretrained") else teacher.method
        branch = teacher.options.get("student")
        students = {row.student for row in self.table.rows if row.teacher == teacher and row.student}
        foreign = [f"with branches of {branch}"] if branch and students and students != {branch} else []
        return " ".join([teacher.method, *words, *foreign])

    def figures(self, row: Row) -> Iterator[dict]:
        """The paper's figures of a row, each with the run that it is of, and what tables call that."""
        error = "error" in self.table.measure
        called = {"source": self.source_of(row), "student": row.student and self.labels(row)[0], "method": _method(row)}
        for figure, value in row.figures.items():
            if figure.endswith("_std"):
                continue
            own = row.teacher.folder("").rpartition("/")[2] if figure.startswith("teacher") else None
            run = own or self.name(row, self.labels(row)[0])
            described = row.describe().partition(" (paper:")[0]
            yield {"row": described, "figure": figure, "paper": value, "run": run, "error": error} | called

    def _options(self, recipe: str, options: dict) -> dict:
        found = read_recipe(str(ROOT / "recipes" / f"{recipe}.yaml")) | dict(options)
        return shortened(found) if self.scale == "short" else found


def shortened(options: dict) -> dict:
    """Options of a run of SHORT_EPOCHS and SHORT_IMAGES of what they say."""

    def part(value: int) -> int:
        return max(1, round(value * SHORT_EPOCHS))

    found = options | {name: part(options[name]) for name in EPOCHS if options.get(name)}
    if "lr_milestones" in options:
        found["lr_milestones"] = [part(each) for each in options["lr_milestones"]]
    if "schedule" in options:
        step, _, stop = options["schedule"].partition("/")
        found["schedule"] = f"{part(int(step))}/{part(int(stop))}"
    return found | {"train_fraction": SHORT_IMAGES}


def _method(row: Row) -> str:
    """What tables call a row's method."""
    weights = "".join(f" x{each:g}" for each in row.options.get("method_weights", []))
    return row.label if row.label and row.label != row.method and "/" not in row.label else f"{row.method}{weights}"
