"""A row of a paper's table, and the commands that train it: a teacher, and a student of it."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

OUTPUT_DIR = "runs/papers"
SLOW = ("shufflenet", "mobilenet")  # students that take a learning rate of 0.01 on CIFAR-100


@dataclass(frozen=True)
class Teacher:
    """One run of train_teacher.py.

    Args:
        recipe: the setting, recipes/RECIPE.yaml.
        model: its --model.
        method: its --method.
        options: what differs from the recipe.
        weights: the teacher that it starts from; None: fresh weights.
    """

    recipe: str
    model: str
    method: str = "vanilla"
    options: Mapping[str, object] = field(default_factory=dict)
    weights: "Teacher | None" = None

    def folder(self, output_dir: str = OUTPUT_DIR) -> str:
        """Its run folder: the same for the same run, in whatever row it stands."""
        start = [f"from_{self.weights.method}"] if self.weights else []
        return f"{output_dir}/teachers/" + _joined(
            [self.recipe, self.model, self.method, *_words(self.options), *start]
        )

    def commands(self, output_dir: str = OUTPUT_DIR, extra: Sequence[str] = ()) -> list[str]:
        """Its command, behind those of the teacher that it starts from."""
        options = {"method": self.method, "model": self.model, **self.options}
        before = self.weights.commands(output_dir, extra) if self.weights else []
        if self.weights:
            options["weights"] = self.weights.folder(output_dir)
        return [*before, _command("train_teacher.py", self.recipe, options, self.folder(output_dir), extra)]


@dataclass(frozen=True)
class Row:
    """One student of a table with its teacher, or one of them alone.

    Args:
        recipe: the student's setting, recipes/RECIPE.yaml.
        teacher: whom the student learns from; None: the labels, or peers.
        student: its --student; None: the row is a teacher's.
        method: its --method.
        options: of distill.py, what differs from the recipe.
        figures: what the paper reports, by name: teacher and student in the table's measure, further ones as
            student_top5 or student_std.
        label: what the table calls the row, where that is more than the method.
    """

    recipe: str
    teacher: Teacher | None
    student: str | None = None
    method: str = "kd"
    options: Mapping[str, object] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    label: str = ""

    def folder(self, output_dir: str = OUTPUT_DIR) -> str:
        """The run folder of what the row is about: its student, else its teacher."""
        if self.student is None:
            return self.teacher.folder(output_dir)
        source = [f"from_{self.teacher.folder('').rpartition('/')[2]}"] if self.teacher else []
        parts = [self.recipe, self.student, self.method, *_words(self.options), *source]
        return f"{output_dir}/students/{_joined(parts)}"

    def commands(self, output_dir: str = OUTPUT_DIR, extra: Sequence[str] = ()) -> list[str]:
        """The row's commands in their order, to be run where train_teacher.py and distill.py are.

        Args:
            output_dir: the folder of the run folders.
            extra: arguments of every command, for example ["--seed", "1"].
        """
        before = self.teacher.commands(output_dir, extra) if self.teacher else []
        if self.student is None:
            return before
        options = {"method": self.method, "student": self.student, **self.options}
        if self.teacher:
            options = {"teacher": self.teacher.folder(output_dir), **options}
        return [*before, _command("distill.py", self.recipe, options, self.folder(output_dir), extra)]

    def describe(self) -> str:
        """The row in one line, with the paper's figures."""
        teacher = ""
        if self.teacher:
            branches = f" for {self.teacher.options['student']}" if "student" in self.teacher.options else ""
            others = {name: value for name, value in self.teacher.options.items() if name != "student"}
            teacher = _joined([f"{self.teacher.method} {self.teacher.model}{branches}", *_words(others)], ", ")
        way = _joined([self.method, *_words(self.options)], ", ")
        parts = [teacher, self.student and f"{self.student} by {way}"]
        text = " -> ".join(part for part in parts if part)
        text = f"{self.label}: {text}" if self.label else text
        figures = ", ".join(f"{name} {value:g}" for name, value in self.figures.items())
        return f"{text} (paper: {figures})" if figures else text


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Args:
        paper: the paper.
        title: what it compares, where it stands, and what of it is a choice of this repository.
        rows: its rows.
        measure: what `Row.figures` of teachers and students are.
        drawing: of a figure: how its runs are drawn (reports/drawings.py).
    """

    paper: str
    title: str
    rows: Sequence[Row]
    measure: str = "top-1 accuracy in percent"
    drawing: str = ""

    def commands(self, output_dir: str = OUTPUT_DIR, extra: Sequence[str] = ()) -> list[str]:
        """The commands of all rows, each once, every teacher before its students."""
        return list(dict.fromkeys(each for row in self.rows for each in row.commands(output_dir, extra)))


def grid(text: str) -> dict[str, list[float | None]]:
    """{first word: numbers} of lines of a printed table; "-" stands for a cell without a number."""
    lines = [line.split() for line in text.strip().splitlines()]
    return {name: [None if cell == "-" else float(cell) for cell in cells] for name, *cells in lines}


def figures(**values: float | None) -> dict[str, float]:
    """The figures of a row, without those that are not printed."""
    return {name: value for name, value in values.items() if value is not None}


def slow(student: str) -> dict[str, object]:
    """The options of a student on CIFAR-100 whose learning rate is not the recipe's."""
    return {"lr": 0.01} if student.startswith(SLOW) else {}


def _command(script: str, recipe: str, options: Mapping[str, object], folder: str, extra: Sequence[str]) -> str:
    words = ["python", script, "--config", f"recipes/{recipe}.yaml"]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        words += [f"--{name}", *(_text(each) for each in values)]
    return shlex.join([*words, "--output_dir", folder, *extra])


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(options: Mapping[str, object]) -> list[str]:
    """Options as words: the value of `student`, NAME VALUE of the others."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        words.append(" ".join([*([] if name == "student" else [name]), *map(_text, values)]))
    return words


def _joined(parts: Iterable[str], sign: str = "-") -> str:
    text = sign.join(parts)
    return text if " " in sign else re.sub(r"[^\w.+-]", "_", text.replace(":", ""))
