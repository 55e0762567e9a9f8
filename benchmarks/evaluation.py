"""What evaluating costs over bare forward passes, and whether its memory grows with the set.

python -m benchmarks.evaluation --images 10000

Random images of 32x32 in memory, random weights. Batch by batch, in turn: the bare forward pass of a batch that is at
hand, and all that evaluate.py does with it (gather, normalise, forward, measures). What it does once a run, latency
and plots, is timed apart and counted in. The same for a pair: the two forward passes, and KL, agreement and CKA of all
stages besides. On a CPU seconds are the processor's. Memory: the peak over what the process held before, for a set and
one four times as large.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import write_atomically
from data.pipeline import Pipeline
from data.splits import ImageSet, Split
from engine.distributed import keep_freed_memory
from engine.run_folder import machine
from models import ModelInfo, create_model
from models.network import Network
from reports.evaluation import Evaluation
from reports.evaluation_plots import plot_evaluation
from reports.subject import ImageOptions

CLASSES, SIDE, BATCH = 100, 32, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4", help="of the pair; --model is its teacher")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--output", default="benchmarks/results/evaluation.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    used = memory(network("resnet8"), network("resnet14"), options.images)
    alone = cost(network(options.model), None, options.images, device)
    pair = cost(network(options.student), network(options.model), options.images, device)
    report = {"command": f"python -m benchmarks.evaluation --images {options.images}", **machine()}
    report |= {"model": options.model, "alone": alone, "student": options.student, "pair": pair, "memory": used}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.images} images of {SIDE}x{SIDE} in batches of {BATCH} on {report['device']}")
    for name, row in ((options.model, alone), (f"{options.student} and its teacher {options.model}", pair)):
        print(
            f"  {name}: {row['forward_seconds']:.1f} s forward, {row['pass_seconds']:.1f} s evaluated, and "
            f"{row['once_seconds']:.1f} s once: {row['ratio']:.3f} times, {row['ratio_of_10000']:.3f} for 10,000 images"
        )
    print("  memory of a pair's evaluation: " + ", ".join(f"{v / 1e6:.0f} MB for {k} images" for k, v in used.items()))
    print(f"written: {options.output}")


def network(name: str) -> Network:
    """Random weights, a hundred classes."""
    model = create_model(name, CLASSES).eval()
    model.info = ModelInfo(name, "random", CLASSES, SIDE, [0.5] * 3, [0.25] * 3)
    return model


def random_pipeline(images: int, device: torch.device) -> tuple[Pipeline, Split]:
    """Batches of random images, as evaluate.py gets them, and the split."""
    pixels = torch.randint(256, (images, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    split = Split(pixels, torch.randint(CLASSES, (images,)))
    data = ImageSet("random", CLASSES, SIDE, split, split, [0.5] * 3, [0.25] * 3, True)
    return Pipeline(data, ImageOptions(), device), split


@torch.no_grad()
def cost(model: Network, teacher: Network | None, images: int, device: torch.device) -> dict[str, float]:
    """Seconds of the bare forward passes, of evaluation's pass and of what it does once; their ratio."""
    pipeline, split = random_pipeline(images, device)
    evaluation = Evaluation(model, teacher, device)
    networks = [each for each in (model, teacher) if each]
    seconds = {"forward": 0.0, "pass": 0.0}
    batches = pipeline.evaluation(split, BATCH)
    total = -(-images // BATCH)
    for number in tqdm(range(total + 1), desc=model.info.name, leave=False, disable=None):
        ready = next(pipeline.evaluation(split, BATCH))[0]
        work = {
            "forward": lambda x=ready: [each(x) for each in networks],
            "pass": lambda: evaluation.run([next(batches)]),
        }
        if number == 0:  # warm-up
            work["pass"] = lambda x=ready: Evaluation(model, teacher, device).run(
                [(x, split.labels[: len(x)].to(device))]
            )
        for name in sorted(work, reverse=bool(number % 2)):
            spent = timed(work[name], device)
            seconds[name] += spent if number else 0.0

    def once() -> None:
        with tempfile.TemporaryDirectory() as folder:
            plot_evaluation(evaluation, evaluation.results() | evaluation.speed(), Path(folder), "evaluation")

    once_seconds = timed(once, device)
    scale = 10_000 / images
    ratios = {
        name: (times * seconds["pass"] + once_seconds) / (times * seconds["forward"])
        for name, times in (("ratio", 1), ("ratio_of_10000", scale))
    }
    found = {f"{name}_seconds": value for name, value in seconds.items()}
    return found | {"once_seconds": once_seconds, **ratios}


def timed(function, device: torch.device) -> float:
    """Seconds that a GPU took, or processor seconds, which other programs on the machine do not lengthen."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def memory(model: Network, teacher: Network, images: int) -> dict[str, int]:
    """Bytes by images: the peak of a pair's evaluation on the CPU over what the process held before it."""
    cpu, found = torch.device("cpu"), {}
    for number, count in enumerate((BATCH, images // 4, images)):  # the first leaves behind what any evaluation does
        pipeline, split = random_pipeline(count, cpu)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        Evaluation(model, teacher, cpu).run(pipeline.evaluation(split, BATCH))
        if number:
            found[str(count)] = resident("VmHWM") - before
    return found


def resident(what: str) -> int:
    """Bytes of this process by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
