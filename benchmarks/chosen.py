"""Whether the members that search.py chooses make better students than random ones of the same cost.

python -m benchmarks.chosen --search runs/generic-s/search --epochs 10

For each budget of the search random members that cost what the chosen one does, by the predicted latency where the
budget is in ms: they are distilled from the teacher as the chosen one is, each alike, for a short schedule, with each
seed. The difference is that of the chosen one's top-1 on the test split and the random ones' mean, paired by seed; its
95% interval is Student's over the seeds, with these members. A run that is there is not repeated.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.ranking import train
from common import UserError, derive_seed, read_json, write_atomically
from engine.console import Console
from engine.distributed import run_script
from engine.run_folder import machine
from models.pool import Pool
from reports.statistics import student_interval
from reports.subject import Subject, load_subject
from searching.members import Members
from searching.profile import read_profile


def main() -> None:
    options, console = arguments(), Console(True)
    search = read_search(Path(options.search))
    subject = load_subject(search["teacher"], f"--search {options.search}: its teacher")
    if not subject.info.pool:
        raise UserError(f"--search {options.search}: its teacher needs a pool of its own")
    members = Members(Pool(**subject.info.pool))
    costs = costs_of(members, search, subject, options)
    rows = {name: draw(name, entry, members, costs, options) for name, entry in search["students"].items()}
    drawn = sorted({member for row in rows.values() for member in row})
    runs = [(member, seed) for seed in options.seeds for member in drawn]
    top1 = {run: train(members, *run, search["teacher"], options) for run in console.through(runs, len(runs), "runs")}
    budgets = {name: compare(row, top1, members, costs, options.seeds) for name, row in rows.items()}
    apart = np.mean([each["differences"] for each in budgets.values()], axis=0)
    report = {"command": f"python -m benchmarks.chosen {' '.join(sys.argv[1:])}", **machine(), "seeds": options.seeds}
    report |= {"budgets": budgets, "overall": summary(apart)}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    show(report, options)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", required=True, help="the folder of a search.py whose teacher has a pool")
    parser.add_argument("--profile", help="the search's latencies; default: profile.json of its folder")
    parser.add_argument("--random", type=int, default=5, help="members that each chosen one is held against")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of their costs, as a share of the chosen one's")
    parser.add_argument("--epochs", type=int, default=10, help="of each")
    parser.add_argument("--batch_size", type=int, default=64, help="of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of students; the first: of the draw")
    parser.add_argument("--runs", default="runs/chosen", help="folder of the students' runs")
    parser.add_argument("--output", default="benchmarks/results/chosen.json")
    parser.add_argument("further", nargs="*", help="after --: further options of distill.py, for all")
    options = parser.parse_args()
    if options.random < 1 or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--random must be at least 1, and each of --seeds stand once")
    return options


def read_search(folder: Path) -> dict:
    """search.json of a folder. Raises UserError where there is none."""
    found = read_json(folder / "search.json", "--search")
    if not found.keys() >= {"teacher", "students"}:
        raise UserError(f"--search {folder}: its search.json is none of search.py")
    return found


def costs_of(members: Members, search: dict, subject: Subject, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What all members cost, [members] by unit; milliseconds where a budget is in them."""
    classes, side = subject.info.num_classes, subject.info.image_size
    costs = members.sizes(classes, side)
    if any("ms" in entry["limits"] for entry in search["students"].values()):
        path = Path(options.profile or Path(options.search) / "profile.json")
        costs["ms"] = read_profile(path, members, classes, side).latency()
    return costs


def draw(
    name: str, entry: dict, members: Members, costs: dict[str, np.ndarray], options: argparse.Namespace
) -> list[int]:
    """The member chosen for a budget, and random others that cost as much of all that the budget limits.

    None is the chosen one's network with its `zero` layers, which pass on what they get, elsewhere.

    Raises:
        UserError: there are too few of them.
    """
    chosen = members.number(entry["choice"])
    alike = [np.abs(costs[unit] / costs[unit][chosen] - 1) <= options.tolerance for unit in entry["limits"]]
    (near,) = np.nonzero(np.all(alike, axis=0))
    others = [member for member in near.tolist() if working(members, member) != working(members, chosen)]
    if len(others) < options.random:
        raise UserError(
            f"--tolerance {options.tolerance}: {len(others)} other members cost what {name}'s chosen one does, and "
            f"--random asks for {options.random}; raise the one or lower the other"
        )
    generator = np.random.default_rng(derive_seed(options.seeds[0], "chosen", name))
    return [chosen, *generator.choice(others, options.random, replace=False).tolist()]


def working(members: Members, member: int) -> list[dict]:
    """The layers of a member's spec that compute something: members that have the same are the same network."""
    return [layer for layer in members.pool.spec(members.choice(member))["layers"] if layer["type"] != "zero"]


def compare(row: Sequence[int], top1: dict, members: Members, costs: dict[str, np.ndarray], seeds: list[int]) -> dict:
    """The chosen member, which comes first, beside the random ones; top1[member, seed] in percent."""
    found = [
        {"choice": members.choice(member), "costs": {unit: float(values[member]) for unit, values in costs.items()}}
        | {"top1": [top1[member, seed] for seed in seeds]}
        for member in row
    ]
    chosen, *others = (np.array(each["top1"]) for each in found)
    return {"chosen": found[0], "random": found[1:], **summary(chosen - np.mean(others, axis=0))}


def summary(apart: np.ndarray) -> dict:
    """Differences in percentage points, a seed each, their mean and its 95% interval (None of one seed)."""
    return {"differences": apart.tolist(), "mean": float(apart.mean()), "interval": student_interval(apart.tolist())}


def show(report: dict, options: argparse.Namespace) -> None:
    """A line a budget, and what holds over all."""
    print(f"top-1 after {options.epochs} epochs, seeds {' '.join(map(str, options.seeds))}: chosen, random, difference")
    for name, row in report["budgets"].items():
        chosen, *others = (statistics.mean(each["top1"]) for each in (row["chosen"], *row["random"]))
        spread = f"{statistics.mean(others):.2f} ({min(others):.2f} to {max(others):.2f})"
        print(f"  {name}: {chosen:.2f}, {spread}, {in_words(row)}")
    print(f"  over all: {in_words(report['overall'])}")
    print(f"written: {options.output}")


def in_words(found: dict) -> str:
    """A mean difference and its interval."""
    low_high = found["interval"]
    return f"{found['mean']:+.2f}" + (f" ({low_high[0]:+.2f} to {low_high[1]:+.2f})" if low_high else " (one seed)")


if __name__ == "__main__":
    run_script(main)
