"""Whether what makes training fast leaves accuracy alone: digits, several seeds, every option by itself.

python -m benchmarks.alike --output benchmarks/results/alike.json

A vanilla teacher resnet20, and from it resnet8 by KD, for every option and every seed. Top-1 on the test split at the
last epoch; the differences are to float32 without options, of the same seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from common import write_atomically
from engine.run_folder import machine

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "float32": [],
    "bf16": ["--mixed_precision", "bf16"],
    "compiled": ["--compile"],
    "teacher logits cached": ["--cache_teacher", "memory"],
    "in two parts": ["--gradient_accumulation_steps", "2"],
}
ON_A_GPU = {
    "fp16": ["--mixed_precision", "fp16"],
    "one CUDA graph": ["--cuda_graph"],
    "plain PyTorch instead of kernels": ["--kernels", "reference"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", default="benchmarks/results/alike.json")
    options = parser.parse_args()
    choices = OPTIONS | (ON_A_GPU if torch.cuda.is_available() else {})
    found: dict[str, list[float]] = {name: [] for name in choices}
    fixed = ["--image_size", "16", "--epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        top1("train_teacher.py", ["--model", "resnet20", *fixed], f"{folder}/teacher")
        student = ["--teacher", f"{folder}/teacher", "--student", "resnet8", *fixed]
        for seed in tqdm(range(options.seeds), desc="seeds", leave=False, disable=None):
            for name, flags in choices.items():
                run = f"{folder}/{seed}-{name.replace(' ', '-')}"
                found[name].append(top1("distill.py", [*student, *flags, "--seed", str(seed)], run))
    rows = {}
    for name, each in found.items():
        differences = [a - b for a, b in zip(each, found["float32"], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        rows[name] = {"top1": each, "mean": statistics.mean(each), "stdev": statistics.stdev(each)}
        rows[name] |= {"difference": statistics.mean(differences), "standard_error": error}
    report = {"command": "python -m benchmarks.alike", **machine(), "epochs": options.epochs, "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"resnet20 -> resnet8 on digits, {options.epochs} epochs, {options.seeds} seeds, on {report['device']}")
    for name, row in rows.items():
        apart = f"{row['difference']:+.2f} ± {row['standard_error']:.2f}"
        print(f"  {name:<34} {row['mean']:.2f} ± {row['stdev']:.2f} %, to float32 {apart}")
    print(f"written: {options.output}")


def top1(script: str, flags: list[str], run: str) -> float:
    """Run a script; its top-1 on the test split at the last epoch."""
    command = [sys.executable, script, *flags, "--output_dir", run]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return json.loads((Path(run) / "summary.json").read_text())["top1"]


if __name__ == "__main__":
    main()
