"""When a generic teacher pays: docs/when_it_pays.png and its first panel, docs/gain.png, from the evidence's records.

python -m benchmarks.when_it_pays

A point is what students gain if their teacher was made generic: the mean of their top-1 minus that of the same student,
seed and images from the vanilla teacher, with its 95% interval over seeds (Student's t). A hollow point is of too few
seeds for an interval. Points of one plan are shifted a little to the right of the one before. Runs that are not
recorded yet are left out, and panels without any.
"""

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
from reports.statistics import over_seeds

HERE = Path(__file__).parent
ENOUGH = 3  # seeds, of which an interval says something
DOCS = HERE.parent / "docs"


@dataclass(frozen=True)
class Line:
    """The points of some plans.

    Args:
        x: of a student's run.
        teachers: the plan's generic ones.
        standard: the vanilla one.
    """

    label: str
    plans: tuple[str, ...]
    classes: int
    x: Callable[[PlannedRun, "Line"], float]
    teachers: tuple[str, ...] = ("gtn",)
    standard: str = "vanilla"

    def points(self) -> Iterator[tuple[float, dict[int, list[float]]]]:
        """(x, gains in percentage points over the vanilla teacher by seed, one a student), x rising."""
        found: dict[float, dict[int, list[float]]] = {}
        for name in self.plans:
            plan: Plan = read_plan(HERE / "plans" / f"{name}.yaml")
            folder = HERE / "results" / "evidence" / name
            runs = [run for run in plan.runs() if run.teacher]
            top1 = {
                (run.source, run.student, run.method, run.seed): record["top1"]
                for run in runs
                if (record := recorded(run, folder))
            }
            for run in runs:
                pair = [(source, run.student, run.method, run.seed) for source in (run.source, self.standard)]
                if run.source in self.teachers and top1.keys() >= set(pair):
                    gains = found.setdefault(self.x(run, self), {}).setdefault(run.seed, [])
                    gains.append(top1[pair[0]] - top1[pair[1]])
        yield from sorted(found.items())


def share_of_images(run: PlannedRun, line: Line) -> float:
    """Of the teacher's training images, what the student sees."""
    return round(run.options.get("train_fraction", 1.0) / run.teacher.options.get("train_fraction", 1.0), 6)


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
    "share of the teacher's images that students see": [
        Line("digits", ("digits_images",), 10, share_of_images),
        Line("digits, the demo's students", ("digits",), 10, share_of_images),
        Line("100 classes", ("tin100_few",), 100, share_of_images),
        Line("100 classes, Muon", ("tin100_few_muon", "tin100_images_muon"), 100, share_of_images),
        Line("CIFAR-10", ("cifar10_few",), 10, share_of_images),
        Line("CIFAR-10, Muon", ("cifar10_few_muon",), 10, share_of_images),
    ],
    "epochs of making it generic": [
        Line("digits", ("digits_branches",), 10, epochs, ("gtn", "gtn 3 epochs", "gtn 20 epochs", "gtn 40 epochs")),
        Line("100 classes, validation", ("tin100_dev_few_kd",), 100, epochs, ("gtn_s1", "gtn_40"), "vanilla_a1_t8"),
    ],
    "branches' MACs over the teacher's": [
        Line("digits", ("digits_branches",), 10, capacity, ("gtn", "gtn narrow", "gtn wide")),
    ],
}


def main() -> None:
    found = {
        xlabel: [(line, points) for line in lines if (points := list(line.points()))]
        for xlabel, lines in PANELS.items()
    }
    found = {xlabel: lines for xlabel, lines in found.items() if lines}
    for xlabel, lines in found.items():
        for line, points in lines:
            print(xlabel, "|", line.label)
            for x, gains in points:
                mean, interval = over_seeds(gains)
                told = " ({:+.2f} to {:+.2f})".format(*interval) if interval else ""
                print(f"  {x:8.2f}  {mean:+.2f}{told}, {len(gains)} seeds, {sum(map(len, gains.values()))} pairs")
    draw(found, DOCS / "when_it_pays.png")
    draw(dict([next(iter(found.items()))]), DOCS / "gain.png")


def draw(found: dict[str, list[tuple[Line, list]]], path: Path) -> None:
    """A panel for each x axis of `found`, with a line for each of its own."""
    figure = Figure(figsize=(2.3 + 3.1 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (xlabel, lines) in zip(axes, found.items(), strict=True):
        for number, (line, points) in enumerate(lines):
            colour, beside = f"C{number}", 1.04**number  # so that points of the same x can be told apart
            means = [over_seeds(gains)[0] for _, gains in points]
            axis.plot([x * beside for x, _ in points], means, color=colour, linewidth=0.8, label=line.label)
            for (x, gains), mean in zip(points, means, strict=True):
                shown = over_seeds(gains)[1] if len(gains) >= ENOUGH else None
                if shown:
                    axis.plot([x * beside] * 2, shown, color=colour, linewidth=1.5)
                axis.plot(
                    [x * beside], [mean], "o", color=colour, markerfacecolor=colour if shown else "white", zorder=3
                )
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(xlabel=xlabel, xscale="log")
        ticks = sorted({x for _, points in lines for x, _ in points})
        axis.set_xticks(ticks, [f"{x:.2g}" for x in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("students' gain, points of top-1")
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
