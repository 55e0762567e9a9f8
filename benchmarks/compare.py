"""The comparison that the method is about: students trained alone, distilled from a vanilla and from a GTN teacher.

python -m benchmarks.compare --students pool:1 pool:3 --seeds 0 --output_dir runs/demo

It runs the two scripts as anybody would, prints each command, and skips runs that are already finished, so
that an interrupted comparison goes on where it stopped.
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

SOURCES = {"alone": "trained alone", "vanilla": "from the vanilla teacher", "gtn": "from the GTN teacher"}
LAUNCH = ("accelerate", "launch", "-q", "--config_file", "accelerate_config.yaml")


def main() -> None:
    options = parse()
    start = time.perf_counter()
    folder = Path(options.output_dir)
    results = [run_seed(options, folder, seed) for seed in options.seeds]
    rows = tabulate(results, options.students)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({"seeds": options.seeds, "rows": rows}, indent=1) + "\n")
    (folder / "comparison.md").write_text(as_markdown(rows, options.seeds))
    plot(rows, folder / "comparison.png")
    print(f"\n{as_markdown(rows, options.seeds)}")
    print(f"written in {time.perf_counter() - start:.0f} s:")
    print(f"  table   {folder}/comparison.md, {folder}/comparison.json, {folder}/comparison.png")
    print(f"  teacher {folder}/seed{options.seeds[0]}-gtn/plots: accuracy of teacher and branches, losses, gates")
    print("next: your own images, on one GPU or on this CPU:")
    print(f"  {shlex.join(LAUNCH)} train_teacher.py --method gtn --model resnet32 --dataset folder:PATH \\")
    print("      --image_size 32 --epochs 60 --output_dir runs/mine")
    print("  add --multi_gpu --num_processes 4 after `launch` for four GPUs; recipes/ has the paper's settings")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["pool:1", "pool:3"], help="names as distill.py takes them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--gtn", default="recipes/digits_gtn.yaml", help="recipe of the GTN teacher")
    parser.add_argument("--vanilla", default="recipes/digits_vanilla.yaml", help="recipe of the vanilla teacher")
    parser.add_argument("--distill", default="recipes/digits_kd.yaml", help="recipe of the students")
    parser.add_argument("--output_dir", default="runs/compare")
    return parser.parse_args()


def run_seed(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Both teachers and every student for one seed; top-1 in percent by run name."""
    teachers = {name: folder / f"seed{seed}-{name}" for name in ("vanilla", "gtn")}
    top1 = {
        "vanilla": run("train_teacher.py", "--config", options.vanilla, seed=seed, output=teachers["vanilla"]),
        "gtn": run(
            "train_teacher.py",
            *("--config", options.gtn, "--vanilla_run", str(teachers["vanilla"])),
            seed=seed,
            output=teachers["gtn"],
        ),
    }
    for student in options.students:
        for source in SOURCES:
            how = ["--method", "none"] if source == "alone" else ["--teacher", str(teachers[source])]
            command = ["distill.py", "--config", options.distill, "--student", student, *how]
            output = folder / f"seed{seed}-{Path(student).stem.replace(':', '')}-{source}"
            top1[f"{student}/{source}"] = run(*command, seed=seed, output=output)
    return top1


def run(*command: str, seed: int, output: Path) -> float:
    """Run one script, unless its run is finished, and return its test accuracy in percent."""
    summary = output / "summary.json"
    if not summary.is_file():
        command = (*LAUNCH, *command, "--seed", str(seed), "--output_dir", str(output))
        resume = ("--resume_from_checkpoint", "latest") if (output / "config.yaml").is_file() else ()
        print(f"\n$ {shlex.join((*command, *resume))}", flush=True)
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
        done = subprocess.run((*command, *resume), env=os.environ | {"PATH": path})
        if done.returncode:
            sys.exit(f"compare: the command above failed with exit code {done.returncode}")
    return json.loads(summary.read_text())["top1"]


def tabulate(results: list[dict[str, float]], students: list[str]) -> dict[str, dict[str, list[float]]]:
    """Top-1 of every seed by row (teachers, then students) and column."""
    rows = {"teacher": {name: [result[name] for result in results] for name in ("vanilla", "gtn")}}
    for student in students:
        rows[student] = {source: [result[f"{student}/{source}"] for result in results] for source in SOURCES}
    mean = {
        source: [statistics.mean(seed) for seed in zip(*(rows[s][source] for s in students), strict=True)]
        for source in SOURCES
    }
    return rows | {"students' mean": mean}


def as_markdown(rows: dict[str, dict[str, list[float]]], seeds: list[int]) -> str:
    """Mean (and standard deviation over seeds) of top-1 on the test split at the last epoch."""

    def cell(values: list[float] | None) -> str:
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    note = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    )
    lines = [f"Top-1 on the test split at the last epoch, in percent; {note}.", ""]
    lines += [f"|  | {' | '.join(SOURCES.values())} |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {' | '.join(cell(row.get(source)) for source in SOURCES)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.8 * len(rows) + 2, 3.6))
    for shift, (source, label) in enumerate(SOURCES.items()):
        bars = [(i, row[source]) for i, row in enumerate(rows.values()) if source in row]
        errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in bars]
        places = [i + (shift - 1) * 0.27 for i, _ in bars]
        axis.bar(places, [statistics.mean(v) for _, v in bars], 0.25, yerr=errors, capsize=3, label=label)
    lowest = min(min(values) for row in rows.values() for values in row.values())
    axis.set_ylim(max(0.0, lowest - 2), 100.2)
    axis.set_xticks(range(len(rows)), rows)
    axis.set_ylabel("top-1 on the test split, %")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
