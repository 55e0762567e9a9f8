"""The comparison that the project is about: students trained alone, and distilled from teachers of each kind.

python -m benchmarks.compare --students pool:1 pool:3 --seeds 0 --output_dir runs/demo
python -m benchmarks.compare --teachers recipes/cifar10_short_{vanilla,mse,early,sftn,gtn}.yaml \\
    --distill recipes/cifar10_short_kd.yaml --students pool:1 pool:2 --dataset cifar10

It runs the two scripts as anybody would, prints each command, and skips runs that are already finished, so
that an interrupted comparison goes on where it stopped. A teacher is called as its recipe's name ends; one
whose method is sftn is trained for each student anew. Options that are not its own go to both scripts.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ALONE = "alone"
LAUNCH = ("accelerate", "launch", "-q", "--config_file", "accelerate_config.yaml")


def main() -> None:
    options, others = parse()
    start = time.perf_counter()
    folder = Path(options.output_dir)
    recipes = {called(recipe): recipe for recipe in options.teachers}
    runs = [run_seed(options, recipes, others, folder, seed) for seed in options.seeds]
    rows = tabulate(runs)
    machine = {name: runs[0]["teachers"][next(iter(recipes))][0][name] for name in ("device", "versions", "git_commit")}
    table = as_markdown(rows, options.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"recipes": recipes, "distill": options.distill, "options": others, "seeds": options.seeds, **machine}
    (folder / "comparison.json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    (folder / "comparison.md").write_text(table)
    plot(rows, folder / "comparison.png")
    print(f"\n{table}")
    print(f"written in {time.perf_counter() - start:.0f} s:")
    print(f"  table   {folder}/comparison.md, {folder}/comparison.json, {folder}/comparison.png")
    print(f"  teacher {folder}/seed{options.seeds[0]}-{list(recipes)[-1]}*/plots: accuracy and losses")
    print("next: your own images, on one GPU or on this CPU:")
    print(f"  {shlex.join(LAUNCH)} train_teacher.py --method gtn --model resnet32 --dataset folder:PATH \\")
    print("      --image_size 32 --epochs 60 --output_dir runs/mine")
    print("  add --multi_gpu --num_processes 4 after `launch` for four GPUs; recipes/ has the paper's settings")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left over for both scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["pool:1", "pool:3"], help="names as distill.py takes them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    digits = ["recipes/digits_vanilla.yaml", "recipes/digits_gtn.yaml"]
    parser.add_argument("--teachers", nargs="+", default=digits, help="recipes; the others are held against the first")
    parser.add_argument("--distill", default="recipes/digits_kd.yaml", help="recipe of the students")
    parser.add_argument("--output_dir", default="runs/compare")
    options, others = parser.parse_known_args()
    for recipe in (*options.teachers, options.distill):
        if not Path(recipe).is_file():
            parser.error(f"{recipe}: there is no such recipe")
    if len({called(recipe) for recipe in options.teachers}) < len(options.teachers):
        parser.error("--teachers: two recipes end in the same word, which is what their teachers are called by")
    if len({plain(student) for student in options.students}) < len(options.students):
        parser.error("--students: two have the same name, which is what their runs are called by")
    return options, others


def called(recipe: str) -> str:
    """The last word of a recipe's name: what its teachers are called."""
    return Path(recipe).stem.split("_")[-1]


def plain(student: str) -> str:
    """A student in names of folders."""
    return Path(student).stem.replace(":", "")


def run_seed(options: argparse.Namespace, recipes: dict[str, str], others: list[str], folder: Path, seed: int) -> dict:
    """Summaries of all runs of one seed: {"teachers": {name: [summary, ...]}, "students": {name: {source: summary}}}.

    A teacher has one run, or one for each student.
    """

    def go(name: str, *command: str) -> dict:
        return run(*command, *others, seed=seed, output=folder / f"seed{seed}-{name}")

    each = {name: yaml.safe_load(Path(recipe).read_text()).get("method") == "sftn" for name, recipe in recipes.items()}
    first = next(iter(recipes))
    teachers: dict[str, list[dict]] = {}
    for name, recipe in recipes.items():
        command = ["train_teacher.py", "--config", recipe]
        if name != first:
            command += ["--vanilla_run", str(folder / f"seed{seed}-{first}")]
        if each[name]:
            teachers[name] = [go(f"{name}-{plain(s)}", *command, "--student", s) for s in options.students]
        else:
            teachers[name] = [go(name, *command)]
    students: dict[str, dict] = {}
    for student in options.students:
        command = ["distill.py", "--config", options.distill, "--student", student]
        students[student] = {ALONE: go(f"{plain(student)}-{ALONE}", *command, "--method", "none")}
        for name in recipes:
            teacher = folder / (f"seed{seed}-{name}-{plain(student)}" if each[name] else f"seed{seed}-{name}")
            students[student][name] = go(f"{plain(student)}-{name}", *command, "--teacher", str(teacher))
    return {"teachers": teachers, "students": students}


def run(*command: str, seed: int, output: Path) -> dict:
    """Run one script, unless its run is finished, and return its summary."""
    summary = output / "summary.json"
    if not summary.is_file():
        command = (*LAUNCH, *command, "--seed", str(seed), "--output_dir", str(output))
        resume = ("--resume_from_checkpoint", "latest") if (output / "config.yaml").is_file() else ()
        print(f"\n$ {shlex.join((*command, *resume))}", flush=True)
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
        done = subprocess.run((*command, *resume), env=os.environ | {"PATH": path})
        if done.returncode:
            sys.exit(f"compare: the command above failed with exit code {done.returncode}")
    return json.loads(summary.read_text())


def tabulate(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """By row and source, a number a seed: top-1 in percent of teachers and students, seconds of teachers' training."""
    sources = list(runs[0]["teachers"])
    rows = {
        "teacher": {s: [statistics.mean(t["top1"] for t in run["teachers"][s]) for run in runs] for s in sources},
        **{
            student: {
                source: [run["students"][student][source]["top1"] for run in runs] for source in (ALONE, *sources)
            }
            for student in runs[0]["students"]
        },
    }
    rows["students' mean"] = {
        source: [statistics.mean(s[source]["top1"] for s in run["students"].values()) for run in runs]
        for source in (ALONE, *sources)
    }
    rows["seconds"] = {s: [sum(t["seconds"] for t in run["teachers"][s]) for run in runs] for s in sources}
    return rows


def as_markdown(rows: dict[str, dict[str, list[float]]], seeds: list[int]) -> str:
    """Mean (and standard deviation over seeds) of top-1 on the test split at the last epoch."""

    def cell(values: list[float] | None, digits: int) -> str:
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    note = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    )
    sources = list(rows["students' mean"])
    titles = ["trained alone" if source == ALONE else f"from {source}" for source in sources]
    lines = [f"Top-1 on the test split at the last epoch, in percent; {note}.", ""]
    lines += [f"|  | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for name, row in rows.items():
        name, digits = ("teachers' training, seconds", 0) if name == "seconds" else (name, 2)
        lines.append(f"| {name} | {' | '.join(cell(row.get(source), digits) for source in sources)} |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Bars of the students' mean top-1, for each of their teachers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in rows.items() if name != "seconds"}
    sources = list(rows["students' mean"])
    width = 0.8 / len(sources)
    figure, axis = plt.subplots(figsize=(0.6 * len(rows) * len(sources) + 2, 3.6))
    for place, source in enumerate(sources):
        bars = [(i, row[source]) for i, row in enumerate(rows.values()) if source in row]
        errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in bars]
        places = [i + (place - (len(sources) - 1) / 2) * width for i, _ in bars]
        label = "trained alone" if source == ALONE else f"from {source}"
        heights = [statistics.mean(values) for _, values in bars]
        axis.bar(places, heights, 0.93 * width, yerr=errors, capsize=3, label=label)
    every = [value for row in rows.values() for values in row.values() for value in values]
    axis.set_ylim(max(0.0, min(every) - 2), min(100.2, max(every) + 2))
    axis.set_xticks(range(len(rows)), rows)
    axis.set_ylabel("top-1 on the test split, %")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
