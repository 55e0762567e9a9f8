"""What the parts of modern recipes cost: a step of KD with each of them over the plain one; an epoch of a generic ViT.

python -m benchmarks.recipe_cost --output benchmarks/results/recipe_cost.json

Steps are the real loop's, on one batch of noise, a step of every recipe in each round, in changing order: medians of
ratios within a round, by the clock and in the processor's time, which other programs change little. "plain again" is a
second plain loop: what it differs by is the error of the measurement. Warm-up is a formula of the epoch and takes no
part in a step. The epoch is one of train_teacher.py --method gtn with the pool of recipes/make_generic.yaml, evaluation
of a fifth as many images included.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from benchmarks.data import MEAN, STD, random_set
from benchmarks.methods import make_objective
from benchmarks.parts import SIDE, Config, loop_of, make_config
from common import write_atomically
from engine.run_folder import machine
from engine.totals import Totals
from models import create_model
from models.pool import Pool
from models.preprocessing import Preprocessed, Preprocessing
from objectives.registry import TEACHERS

EMA, MIXUP, CLIP = {"model_ema_decay": 0.999}, {"mixup": 0.2}, {"clip_grad": 1.0}
RENORMALISED = "re-normalising teacher"
RECIPES: dict[str, dict] = {"plain": {}, "plain again": {}, "ema": EMA, "mixup": MIXUP, "clip": CLIP}
RECIPES |= {"ema, mixup, clip, warm-up": EMA | MIXUP | CLIP | {"lr_warmup_epochs": 5}, RENORMALISED: {}}
TARGETS = {"ema, mixup, clip, warm-up": 0.03, RENORMALISED: 0.01}  # of a plain step
VIT, VIT_SIDE, VIT_TARGET = "timm:vit_tiny_patch16_224", 64, 180  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each recipe")
    parser.add_argument("--images", type=int, default=1000, help="of the ViT's epoch")
    parser.add_argument("--output", default="benchmarks/results/recipe_cost.json")
    options = parser.parse_args()
    rows = measure(options.teacher, options.student, options.batch_size, options.rounds)
    given = {name: getattr(options, name) for name in ("teacher", "student", "batch_size", "rounds")}
    given |= {"command": " ".join(["python -m benchmarks.recipe_cost", *sys.argv[1:]])}
    epoch = vit_epoch(VIT, VIT_SIDE, options.images)
    report = {**machine(), **given, "rows": rows, "vit_epoch": epoch}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.teacher} -> {options.student}, batch {options.batch_size}, on {report['device']}")
    for row in rows:
        low, high = row["processor_quartiles"]
        target = "" if row["target"] is None else f"(target: below {row['target']:.0%})"
        spread = f"{row['overhead']:+7.2%}, processor {row['processor_overhead']:+.2%} [{low:+.2%}, {high:+.2%}]"
        print(f"  {row['recipe']:<26} {row['milliseconds']:>9.1f} ms  {spread} {target}")
    print(
        f"generic {VIT} at {VIT_SIDE}x{VIT_SIDE}, an epoch of {options.images} images: {epoch['seconds']:.0f} s, "
        f"{epoch['processor_seconds']:.0f} s of the processor (target for 1,000: below {VIT_TARGET} s)"
    )
    print(f"written: {options.output}")


def measure(teacher_name: str, student_name: str, batch_size: int, rounds: int) -> list[dict]:
    """A row for each recipe: milliseconds of a step, and by which part of the plain one's it is longer."""
    data = random_set(10 * batch_size)
    torch.manual_seed(0)
    teacher = create_model(teacher_name, data.num_classes, image_size=SIDE)
    seen = {RENORMALISED: Preprocessed(teacher, Preprocessing([0.5] * 3, [0.5] * 3, SIDE), MEAN, STD)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        loops = {}
        for name, changes in RECIPES.items():
            config = make_config("kd", student_name, batch_size, "no", f"{folder}/{name}", lr=1e-4, **changes)
            names = (student_name, teacher_name)
            objective = make_objective("kd", seen.get(name, teacher), names, data.train.labels, config)
            loops[name] = loop_of(objective, data, config)
            objective.begin_epoch(0)
            objective.train()
        batch, totals = loops["plain"].train.one(0), Totals({})
        for number in tqdm(range(-1, rounds), desc="rounds", leave=False, disable=None):  # the first warms up
            for name in RECIPES if number % 2 else reversed(RECIPES):
                took = clocks(lambda name=name: loops[name].step(batch, totals), loops[name].accelerator.device)
                if number >= 0:
                    times[name].append(took)
            totals.read()
    return [row(name, times[name], times["plain"]) for name in RECIPES]


def row(name: str, times: list[tuple[float, float]], plain: list[tuple[float, float]]) -> dict:
    """Of a recipe's steps: (seconds, seconds of the processor) each."""
    found = {"recipe": name, "target": TARGETS.get(name)}
    for prefix, of, others in zip(("", "processor_"), zip(*times, strict=True), zip(*plain, strict=True), strict=True):
        longer = [one / other - 1 for one, other in zip(of, others, strict=True)]
        found[f"{prefix}milliseconds"] = 1000 * statistics.median(of)
        found[f"{prefix}overhead"] = statistics.median(longer)
        found[f"{prefix}quartiles"] = statistics.quantiles(longer, n=4)[::2]
    return found


def vit_epoch(name: str, side: int, images: int) -> dict:
    """What a generic teacher's epoch takes, evaluation and checkpoint included."""
    recipe = yaml.safe_load(Path("recipes/make_generic.yaml").read_text())
    chosen = ("alpha", "teacher_kl_share", "gate_every", "gate_steps", "share_branches", "batch_size")
    data = random_set(images, side)
    data = replace(data, test=data.train.take(torch.arange(images // 5)))
    with tempfile.TemporaryDirectory() as folder:
        given = {option: recipe[option] for option in chosen} | {"epochs": 1}
        config = Config(
            **given, pool=Pool(**recipe["pool"]), image_size=side, mixed_precision="no", output_dir=f"{folder}/run"
        )
        torch.manual_seed(0)
        teacher = create_model(name, data.num_classes, image_size=side)
        loop = loop_of(TEACHERS["gtn"].objective(teacher, config, side), data, config)
        seconds, processor = clocks(loop.run, loop.accelerator.device)
        trained = loop.progress.seconds
    return {"model": name, "image_size": side, "images": images, "batch_size": config.batch_size} | {
        "seconds": seconds,
        "processor_seconds": processor,
        "training_seconds": trained,
        "target_seconds_of_1000": VIT_TARGET,
    }


def clocks(run, device: torch.device) -> tuple[float, float]:
    """Seconds, and seconds of the processor (all threads), that a call takes, its kernels waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    main()
