"""When a generic teacher pays: one picture from the evidence's records.

python -m benchmarks.when_it_pays

A point is what students gain if their teacher was made generic: the mean of their top-1 minus that of the same student,
seed and images from the vanilla teacher, with its 95% interval (Student's t) over students and seeds. Runs that are not
recorded yet are left out, and panels without any.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from comparing.plan import Plan, read_plan
from comparing.planned import PlannedRun
from comparing.records import recorded
from models import create_model
from models.network import macs
from objectives.registry import TEACHERS
from reports.statistics import student_interval

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "when_it_pays.png"


@dataclass(frozen=True)
class Line:
    """The points of one plan.

    Args:
        x: of a student's run, and of the training images of a class of its data set.
        teachers: the plan's generic ones.
    """

    label: str
    plan: str
    classes: int
    images: int  # of a class in the training split
    x: Callable[[PlannedRun, "Line"], float]
    teachers: tuple[str, ...] = ("gtn",)

    def points(self) -> Iterator[tuple[float, list[float]]]:
        """(x, gains in percentage points over the vanilla teacher, one a student and seed), x rising."""
        plan: Plan = read_plan(HERE / "plans" / f"{self.plan}.yaml")
        folder = HERE / "results" / "evidence" / self.plan
        runs = [run for run in plan.runs() if run.teacher]
        top1 = {
            (run.source, run.student, run.method, run.seed): record["top1"]
            for run in runs
            if (record := recorded(run, folder))
        }
        found: dict[float, list[float]] = {}
        for run in runs:
            pair = [(source, run.student, run.method, run.seed) for source in (run.source, "vanilla")]
            if run.source in self.teachers and top1.keys() >= set(pair):
                found.setdefault(self.x(run, self), []).append(top1[pair[0]] - top1[pair[1]])
        yield from sorted(found.items())


def images_a_class(run: PlannedRun, line: Line) -> float:
    """Labelled images of a class that the student sees."""
    return line.images * run.options.get("train_fraction", 1.0)


def epochs(run: PlannedRun, line: Line) -> float:
    """Of the generic teacher, those with the vanilla teacher frozen among them."""
    return run.teacher.options["epochs"]


def capacity(run: PlannedRun, line: Line) -> float:
    """Multiply-accumulates of all branches, by the mean path, over the teacher's."""
    config = run.teacher.config
    with torch.device("meta"):
        teacher = create_model(config.model, line.classes, config.pool, image_size=config.image_size).eval()
        own = macs(teacher, torch.zeros(1, 3, config.image_size, config.image_size))[0]
        branches = (
            TEACHERS["gtn"].build(teacher, config, config.image_size).branch_macs(config.image_size, uniform=True)
        )
    return branches / own


PANELS = {
    "labelled images a class, of students": [
        Line("digits", "digits_images", 10, 144, images_a_class),
        Line("100 classes, test", "tin100_few", 100, 500, images_a_class),
        Line("100 classes, validation", "tin100_dev", 100, 100, images_a_class, ("gtn_tune",)),
    ],
    "epochs of making it generic": [
        Line("digits", "digits_branches", 10, 144, epochs, ("gtn", "gtn 3 epochs", "gtn 20 epochs", "gtn 40 epochs")),
    ],
    "branches' multiply-accumulates over the teacher's": [
        Line("digits", "digits_branches", 10, 144, capacity, ("gtn", "gtn narrow", "gtn wide")),
    ],
}


def main() -> None:
    found = {
        xlabel: [(line, points) for line in lines if (points := list(line.points()))]
        for xlabel, lines in PANELS.items()
    }
    found = {xlabel: lines for xlabel, lines in found.items() if lines}
    figure = Figure(figsize=(0.5 + 3.5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (xlabel, lines) in zip(axes, found.items(), strict=True):
        for number, (line, points) in enumerate(lines):
            print(xlabel, "|", line.label)
            for x, gains in points:
                low, high = student_interval(gains) or (float("nan"), float("nan"))
                print(f"  {x:8.2f}  {statistics.mean(gains):+.2f} ({low:+.2f} to {high:+.2f}), {len(gains)} pairs")
                axis.plot([x, x], [low, high], color=f"C{number}", linewidth=1.5)
            style = {"marker": "o", "color": f"C{number}", "linewidth": 0.8, "label": line.label}
            axis.plot([x for x, _ in points], [statistics.mean(gains) for _, gains in points], **style)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(xlabel=xlabel, xscale="log")
        axis.legend(frameon=False)
    axes[0].set_ylabel("students' gain, points of top-1")
    figure.savefig(PICTURE, dpi=150)
    print(PICTURE)


if __name__ == "__main__":
    main()
