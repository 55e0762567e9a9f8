"""How fast a student is distilled: distill.py against a training script as any PyTorch user writes it.

python -m benchmarks.training --output benchmarks/results/training.json

The same pair, batch and images for all, in turns: the plain script (DataLoader workers, PIL transforms, float32,
losses of torch.nn.functional, networks in their default memory format), then distill.py in float32 and in bf16, started
as anybody starts it. Images a second are those of its metrics.jsonl, without the first epoch. Then the parts of one
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.data import PillowDataset
from benchmarks.steps import clock
from common import write_atomically
from engine.data import Split, load_images
from engine.loader import Augmentation, DeviceLoader, Normalise
from engine.processes import keep_freed_memory
from engine.tracking import machine
from kernels import kd_loss
from models import ModelInfo, create_model, save_pretrained

SIDE, WORKERS, LR, ALPHA, TEMPERATURE = 32, 2, 0.05, 0.9, 4.0
TARGETS = {"cpu": {"float32": 1.8, "bf16": 3.5}, "cuda": {"float32": None, "bf16": 5.0}}  # times the plain script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each script")
    parser.add_argument("--output", default="benchmarks/results/training.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = (options.teacher, options.student, options.batch_size)
    speeds = compare(*pair, options.rounds, device)
    parts = {name: step_parts(*pair, name, device) for name in TARGETS[device.type]}
    rows = {name: {"images_per_second": statistics.median(each), "rounds": each} for name, each in speeds.items()}
    for name in TARGETS[device.type]:
        ratios = [ours / plain for ours, plain in zip(speeds[name], speeds["plain"], strict=True)]
        rows[name] |= {"over_plain": statistics.median(ratios), "target": TARGETS[device.type][name]}
        rows[name] |= {"step_ms": parts[name]}
    setting = {"teacher": options.teacher, "student": options.student, "batch_size": options.batch_size}
    report = {"command": "python -m benchmarks.training", **machine(), **setting, "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.teacher} -> {options.student}, batch {options.batch_size}, {SIDE}x{SIDE}, on {report['device']}")
    print(f"  plain script   {rows['plain']['images_per_second']:>9,.0f} images/s")
    for name in TARGETS[device.type]:
        row = rows[name]
        aim = "" if row["target"] is None else f" (target: at least {row['target']})"
        speed = f"{row['images_per_second']:>9,.0f} images/s, {row['over_plain']:.2f} times the plain"
        print(f"  ours, {name:<8} {speed}{aim}")
        print("     " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in row["step_ms"].items()))
    print(f"written: {options.output}")


def compare(teacher: str, student: str, batch_size: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Images a second of every script in every round."""
    names = list(TARGETS[device.type])
    speeds: dict[str, list[float]] = {name: [] for name in ("plain", *names)}
    data = load_images("digits", SIDE)
    pixels, labels = data.train.pixels.permute(0, 2, 3, 1).contiguous().numpy(), data.train.labels.tolist()
    networks = [create_model(name, data.num_classes, image_size=SIDE) for name in (teacher, student)]
    with tempfile.TemporaryDirectory() as folder:
        info = ModelInfo(teacher, "digits", data.num_classes, SIDE, data.mean, data.std)
        save_pretrained(networks[0], info, Path(folder) / "teacher")
        for number in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            speeds["plain"].append(plain_script(*networks, PillowDataset(pixels, labels), batch_size, device))
            for name in names:
                speeds[name].append(our_script(Path(folder), student, batch_size, name, number))
    return speeds


def our_script(folder: Path, student: str, batch_size: int, precision: str, number: int) -> float:
    run = folder / f"{precision}{number}"
    command = [sys.executable, "distill.py", "--teacher", folder / "teacher", "--student", student]
    command += ["--image_size", SIDE, "--batch_size", batch_size, "--epochs", 3, "--lr", LR]
    command += ["--crop_padding", 4, "--flip", "true"]
    command += ["--mixed_precision", "no" if precision == "float32" else precision, "--output_dir", run]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=Path(__file__).parents[1])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(row["images_per_second"] for row in rows[1:])


def plain_script(teacher, student, dataset: PillowDataset, batch_size: int, device: torch.device) -> float:
    """KD as it is usually written; two epochs after one that starts the workers."""
    teacher, student = teacher.to(device).eval(), student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    pinned = device.type == "cuda"
    loader = DataLoader(
        dataset, batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True, pin_memory=pinned
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                taught = teacher(images)
            logits = student(images)
            kl = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1), F.softmax(taught / TEMPERATURE, 1), reduction="batchmean"
            )
            loss = (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # for the progress bar that such scripts have
        seconds.append(time.perf_counter() - start)
    return 2 * len(dataset) / sum(seconds[1:])


def step_parts(teacher: str, student: str, batch_size: int, precision: str, device: torch.device) -> dict[str, float]:
    """Milliseconds of the parts of a step, medians of 9, each run and waited for by itself."""
    if device.type == "cpu":
        keep_freed_memory()  # as the loop does
    data = load_images("digits", SIDE)
    split = Split(data.train.pixels.to(device), data.train.labels.to(device))
    loader = DeviceLoader(split, batch_size, Normalise(data.mean, data.std, device), Augmentation(SIDE, padding=4), 0)
    networks = (create_model(name, data.num_classes, image_size=SIDE) for name in (teacher, student))
    teacher, student = (each.to(device, memory_format=torch.channels_last) for each in networks)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    made: dict[str, object] = {}  # by the part that made it

    def loss() -> Tensor:
        ce, kl = kd_loss(made["student"], made["teacher"], made["data"].labels, temperature=TEMPERATURE)
        return (1 - ALPHA) * ce[0] + ALPHA * TEMPERATURE**2 * kl[0]

    parts = {
        "data": lambda: loader.one(len(milliseconds["data"])),
        "teacher": lambda: teacher(made["data"].images),
        "student": lambda: student(made["data"].images),
        "loss": loss,
        "backward": lambda: made["loss"].backward(),
        "optimiser": lambda: (optimizer.step(), optimizer.zero_grad()),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in parts}

    def run(name: str) -> None:
        made[name] = parts[name]()

    for _ in range(12):  # the first three warm up
        for name in parts:
            with autocast if name in ("teacher", "student") else nullcontext():
                milliseconds[name].append(1000 * clock(partial(run, name), device))
    return {name: statistics.median(each[3:]) for name, each in milliseconds.items()}


if __name__ == "__main__":
    main()
