"""Whether what makes training fast leaves accuracy alone: digits, several seeds, every option by itself.

python -m benchmarks.alike --output benchmarks/results/alike.json

A vanilla teacher resnet20, and from it resnet8 by KD, for every option and every seed. Top-1 on the test split at the
last epoch; the differences are to float32 without options, of the same seed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.seeds import report, top1

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
    report(found, "float32", options.epochs, "benchmarks.alike", Path(options.output))


if __name__ == "__main__":
    main()
