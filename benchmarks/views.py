"""What few views cost a student in accuracy (--cache_teacher disk): digits, several seeds.

python -m benchmarks.views --output benchmarks/results/views.json

A teacher, and from it resnet8 by KD: joint, which is also what a view an epoch gives, to the bit, and with fewer views,
or the largest logits of an image alone. Top-1 on the test split at the last epoch; the differences are to the joint run
of the same seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from common import write_atomically
from engine.run_folder import machine

ROOT = Path(__file__).parents[1]
FIXED = ["--image_size", "16", "--batch_size", "64", "--lr_schedule", "cosine"]
JOINT = "joint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--train_fraction", default="0.3")
    parser.add_argument("--output", default="benchmarks/results/views.json")
    options = parser.parse_args()
    few = {f"{views} view{'s' * (views > 1)}": ["--cache_views", str(views)] for views in options.views}
    few[f"{options.epochs} views, top {options.top_k} logits"] = ["--cache_top_k", str(options.top_k)]
    found: dict[str, list[float]] = {name: [] for name in (JOINT, *few)}
    with tempfile.TemporaryDirectory() as folder:
        train("train_teacher.py", ["--model", "resnet20", "--epochs", "12"], f"{folder}/teacher")
        fixed = ["--teacher", f"{folder}/teacher", "--student", "resnet8", "--epochs", str(options.epochs)]
        fixed += ["--train_fraction", options.train_fraction]
        disk = ["--cache_teacher", "disk", "--cache_folder", f"{folder}/logits"]
        for seed in tqdm(range(options.seeds), desc="seeds", leave=False, disable=None):
            for name in found:
                flags = ["--cache_teacher", "no"] if name == JOINT else [*disk, *few[name]]
                run = f"{folder}/{seed}-{name.replace(' ', '-')}"
                found[name].append(train("distill.py", [*fixed, *flags, "--seed", str(seed)], run))
    rows = {name: row(each, found[JOINT]) for name, each in found.items()}
    command = f"python -m benchmarks.views {' '.join(sys.argv[1:])}".strip()
    report = {"command": command, **machine(), "epochs": options.epochs, "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"resnet20 -> resnet8 on digits, {options.epochs} epochs, {options.seeds} seeds, on {report['device']}")
    for name, each in rows.items():
        apart = f"{each['difference']:+.2f} ± {each['standard_error']:.2f}"
        print(f"  {name:<24} {each['mean']:.2f} ± {each['stdev']:.2f} %, to joint {apart}")
    print(f"written: {options.output}")


def row(top1: list[float], joint: list[float]) -> dict:
    """Means over seeds, and of the differences to joint runs."""
    apart = [one - other for one, other in zip(top1, joint, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    described = {"top1": top1, "mean": statistics.mean(top1), "stdev": statistics.stdev(top1)}
    return described | {"difference": statistics.mean(apart), "standard_error": error}


def train(script: str, flags: list[str], run: str) -> float:
    """Run a script; its top-1 on the test split at the last epoch."""
    command = [sys.executable, script, *FIXED, *flags, "--output_dir", run]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return json.loads((Path(run) / "summary.json").read_text())["top1"]


if __name__ == "__main__":
    main()
