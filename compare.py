"""Compare teachers by their students: a matrix of them, students, methods and seeds, or a paper's table.

python compare.py --teachers vanilla gtn --students pool:1 resnet8 --methods kd dkd --seeds 0 1 2 --options epochs=10
python compare.py benchmarks/plans/digits.yaml --seeds 0 --output_dir runs/demo
python compare.py --paper sftn/1 --scale short --seeds 0 1 2
python compare.py --list

Prints what it will cost, makes each run once, and goes on where it was stopped when it is called again. Leaves
comparison.json, comparison.md and report.html in --output_dir. docs/compare.md says more.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

from common import UserError, check_name
from comparing import cost
from comparing.executors import EXECUTORS, check_executor, check_package, create_executor
from comparing.local import Forks, slots
from comparing.order import Outcome, execute
from comparing.papers import SCALES, list_tables, paper_comparison
from comparing.places import Places, work_list
from comparing.plan import Comparison, assignments, make_plan, read_plan, teacher_of
from comparing.planned import PlannedRun
from comparing.records import recorded
from comparing.report import FIGURE, write_report
from comparing.search import Study, search
from engine.distributed import run_script
from engine.forks import be_forked_from, result_of


def main() -> None:
    options = arguments()
    be_forked_from()
    if options.list:
        result_of(lambda: [print(line, flush=True) for line in list_tables()])
        return
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    places = Places(options.runs, options.records or options.output_dir / "records", options.verbose)
    executor_options = assignments("--executor_options", options.executor_options)
    check_executor(options.executor, executor_options, options.verbose)
    if options.search:
        finish_with(*searched(options, places, deadline), options)
        return
    comparison = chosen(options)
    left = [] if options.report else work_list(comparison.runs, places)
    if left:
        show_cost(comparison, left, len(slots(options.jobs)) if options.executor == "local" else 1)
    if options.dry_run:
        for run in left:
            print(shlex.join(["python", *run.command(options.runs)]))
        return
    outcome = Outcome()
    if left:
        executor = create_executor(options.executor, options.jobs, executor_options, places)
        outcome = execute(left, places, executor, deadline, Progress(left, places).tell)
    finish_with(comparison, places, outcome, options)


class Parser(argparse.ArgumentParser):
    """One whose complaints are one line, as those of the other scripts."""

    def error(self, message: str) -> None:
        """Raise UserError."""
        raise UserError(message.removeprefix("argument "))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError for what it does not know."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("plan", nargs="?", type=Path, help="a YAML file that says what is compared (docs/compare.md)")
    add("--paper", metavar="TABLE", help="a paper's table by name, instead of a plan")
    add("--scale", choices=SCALES, default="full", help="of --paper: as printed, or shortened for CPUs")
    add("--list", action="store_true", help="print the papers' tables and what each would cost, and stop")
    add("--teachers", nargs="+", default=[], help="methods of train_teacher.py, its recipes, or trained run folders")
    add("--students", nargs="+", default=[], help="what distill.py takes as --student")
    add("--methods", nargs="+", default=[], help="what distill.py takes as --method; default: kd")
    add("--seeds", nargs="+", type=int, default=[], help="default: 0, or the plan's")
    add("--options", nargs="+", default=[], metavar="NAME=VALUE", help="options of every run")
    add("--teacher_options", nargs="+", default=[], metavar="NAME=VALUE", help="options of every teacher")
    add("--student_options", nargs="+", default=[], metavar="NAME=VALUE", help="options of every student")
    add("--sweep", nargs="+", default=[], metavar="NAME=V1,V2", help="every combination of these options' values")
    add("--search", type=int, metavar="TRIALS", help="instead of all combinations: search --sweep NAME=LOW..HIGH")
    add("--data", nargs="+", default=[], metavar="NAME=DATASET", help="what --dataset is where the plan says NAME")
    add("--only", nargs="+", default=[], help="runs whose names hold one of these words")
    add("--output_dir", type=Path, default=Path("runs/comparison"), help="folder of the results")
    add("--runs", type=Path, default=Path("runs/shared"), help="folder of run folders, shared by all comparisons")
    add("--records", type=Path, help="folder of a JSON file a run; default: records in --output_dir")
    add("--jobs", type=int, default=1, help="runs at a time on CPUs, which share the cores; on GPUs it is one a GPU")
    add("--executor", choices=EXECUTORS, default="local", help="where runs go on: here, on a Ray cluster or by Slurm")
    add("--executor_options", nargs="+", default=[], metavar="NAME=VALUE", help="of ray.remote, or of submitit")
    add("--minutes", type=float, help="stop after this long; the same command goes on")
    add("--verbose", action="store_true", help="show what every run prints")
    add("--dry_run", action="store_true", help="print the cost and the commands of what is left, and stop")
    add("--report", action="store_true", help="train nothing: write the results of the runs that are done")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        check_name("options", unknown[0].partition("=")[0], parser._option_string_actions)
    return options


def chosen(options: argparse.Namespace) -> Comparison:
    """What the user asks for. Raises UserError where it cannot be."""
    data = {name: str(value) for name, value in assignments("--data", options.data).items()}
    if options.paper:
        only_flags(options, "--paper says it")
        comparison = paper_comparison(options.paper, options.scale, options.seeds or [0], data)
    else:
        comparison = from_plan(options, data)
    for name in data:
        check_name("--data", name, {run.options["dataset"] for run in comparison.runs if "dataset" in run.options})
    return select(comparison, options.only)


def from_plan(options: argparse.Namespace, data: dict[str, str]) -> Comparison:
    """What a plan or flags ask for."""
    plan = read_plan(options.plan) if options.plan else make_plan(from_flags(options), "compare.py")
    if options.plan:
        only_flags(options, f"the plan {options.plan} says it")
        plan.seeds = options.seeds or plan.seeds
    return plan.comparison(options.plan.stem if options.plan else options.output_dir.name, data)


def only_flags(options: argparse.Namespace, reason: str) -> None:
    """Raise UserError for a flag that makes a matrix, where something else does."""
    names = ["teachers", "students", "methods", "options", "teacher_options", "student_options", "sweep"]
    if given := [name for name in [*names, *(["plan"] if options.paper else [])] if getattr(options, name)]:
        raise UserError(f"{'' if given[0] == 'plan' else '--'}{given[0]}: {reason}; leave one of them out")


def select(comparison: Comparison, words: list[str]) -> Comparison:
    """The comparison with the runs alone whose names hold one of the words, if there are any."""
    if words:
        comparison.runs = [run for run in comparison.runs if any(word in run.name for word in words)]
    return comparison


def from_flags(options: argparse.Namespace) -> dict:
    """A plan's content."""
    if not options.teachers or not options.students:
        raise UserError("give a plan, or --teachers and --students; --help shows examples")
    sweep = assignments("--sweep", [word.replace("=", "=[", 1) + "]" for word in options.sweep])
    return {
        "teachers": dict(map(teacher_of, options.teachers)),
        "students": options.students,
        "methods": options.methods,
        "seeds": options.seeds or [0],
        "common": assignments("--options", options.options),
        "teacher": assignments("--teacher_options", options.teacher_options),
        "distill": assignments("--student_options", options.student_options),
        "sweep": sweep,
    }


def searched(options: argparse.Namespace, places: Places, deadline: float) -> tuple[Comparison, Places, Outcome]:
    """What came of --search: its best trial as a comparison. Raises UserError for what cannot be searched."""
    if options.plan or options.paper or not options.sweep or options.executor != "local" or options.dry_run:
        raise UserError("--search: needs --teachers, --students and --sweep, and neither --executor nor --dry_run")
    check_package("--search", "optuna", "search")
    plan, executor = from_flags(options), Forks(slots(options.jobs))

    def comparison_of(values: dict) -> Comparison:
        sweep = {name: [value] for name, value in values.items()}
        return select(make_plan(plan | {"sweep": sweep}, "compare.py").comparison("search"), options.only)

    def make(comparison: Comparison, own: Places) -> Outcome:
        left = work_list(comparison.runs, own)
        return execute(left, own, executor, deadline, Progress(left, own).tell)

    study = Study(options.output_dir / "search.db", plan, plan["sweep"], plan["seeds"][0])
    return search(study, 0 if options.report else options.search, comparison_of, make, places)


def show_cost(comparison: Comparison, left: list[PlannedRun], slots: int) -> None:
    """Print what the runs that are left will cost."""
    print(f"{comparison.name}: {len(comparison.runs)} runs, {len(left)} to be made", flush=True)
    found = result_of(lambda: cost.estimate(left, slots))
    at_once = f", {slots} at a time" if slots > 1 else ""
    print(
        f"  cost      {found['images']:,} training images, about {duration(found['seconds'])}{at_once}, "
        f"{found['bytes'] / 1e6:,.0f} MB of models on disk\n            ({found['measured']})",
        flush=True,
    )


class Progress:
    """Says what has come of each run, and how long the rest will take at the pace so far."""

    def __init__(self, left: list[PlannedRun], places: Places):
        self.total, self.done, self.places, self.start = len(left), 0, places, time.monotonic()

    def tell(self, run: PlannedRun, failure: str | None) -> None:
        self.done += 1
        what = f"failed: {failure}" if failure else summary(run, self.places)
        rest = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        print(f"[{self.done}/{self.total}] {run.name}: {what}; about {duration(rest)} left", flush=True)


def summary(run: PlannedRun, places: Places) -> str:
    """What came out of a run."""
    record = recorded(run, places.records)
    return f"{record['top1']:.2f}% in {record['seconds']:.0f} s"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def finish_with(comparison: Comparison, places: Places, outcome: Outcome, options: argparse.Namespace) -> None:
    """Write the results, say where they are, and exit."""
    found = write_report(comparison, places, options.output_dir, shlex.join(["python", *sys.argv]), outcome)
    finish(found, outcome, options.output_dir)


def finish(found: dict | None, outcome: Outcome, folder: Path) -> None:
    """Say what came out and where it is; exits with 1 if a run failed, 130 if the user stopped it."""
    if found is None:
        print("no run is done yet")
    else:
        print(f"\n{(folder / 'comparison.md').read_text()}")
        print(f"  page      {(folder / 'report.html').resolve()}")
        print(f"  figure    {folder / FIGURE}\n" * bool(found["panels"]), end="")
        print(f"  tables    {folder / 'comparison.md'}\n  numbers   {folder / 'comparison.json'}")
    for name, reason in outcome.failed.items():
        print(f"  failed    {name}: {reason}", file=sys.stderr)
    if outcome.left:
        print(f"stopped with {len(outcome.left)} runs left; the same command goes on")
    if outcome.failed:
        print(f"{len(outcome.failed)} runs failed; the same command tries them again", file=sys.stderr)
    sys.exit(130 if outcome.interrupted else int(bool(outcome.failed)))


if __name__ == "__main__":
    run_script(main)
