"""What few views cost a student in accuracy (--cache_teacher disk): digits, several seeds.

python -m benchmarks.views --output benchmarks/results/views.json

A teacher, and from it resnet8 by KD: joint, which is also what a view an epoch gives, to the bit, and with fewer views,
or the largest logits of an image alone. Top-1 on the test split at the last epoch; the differences are to the joint run
of the same seed.
"""

import argparse
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.seeds import report, top1

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
        top1("train_teacher.py", [*FIXED, "--model", "resnet20", "--epochs", "12"], f"{folder}/teacher")
        fixed = [*FIXED, "--teacher", f"{folder}/teacher", "--student", "resnet8", "--epochs", str(options.epochs)]
        fixed += ["--train_fraction", options.train_fraction]
        disk = ["--cache_teacher", "disk", "--cache_folder", f"{folder}/logits"]
        for seed in tqdm(range(options.seeds), desc="seeds", leave=False, disable=None):
            for name in found:
                flags = ["--cache_teacher", "no"] if name == JOINT else [*disk, *few[name]]
                run = f"{folder}/{seed}-{name.replace(' ', '-')}"
                found[name].append(top1("distill.py", [*fixed, *flags, "--seed", str(seed)], run))
    report(found, JOINT, options.epochs, "benchmarks.views", Path(options.output))


if __name__ == "__main__":
    main()
