"""How fast images come: the set in memory, augmented as tensors, against DataLoader workers with PIL transforms.

python -m benchmarks.data --output benchmarks/results/data.json

Both deliver the same thing: batches of 32x32 images, padded by 4, cropped, mirrored, normalised, as float32.
The rival is torch.utils.data.DataLoader with torchvision's PIL transforms. The two take turns. Then the memory that a
data set takes on its way in, in a process of its own, and, on a GPU, what waiting for data adds to a training step.
"""

import argparse
import ctypes
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from common import write_atomically
from data.datasets import load_images
from data.options import DataOptions
from data.pipeline import Pipeline
from data.splits import ImageSet, Split
from engine.run_folder import machine
from models import create_model

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
SIDE, PADDING, WORKERS, SPEED_BATCH, STEP_BATCH = 32, 4, 2, 128, 512


@dataclass
class Options(DataOptions):
    """Of a run, as far as the pipeline reads them."""

    seed: int = 0


class PillowDataset(Dataset):
    """What one would write for torchvision: an array of images, PIL transforms."""

    def __init__(self, pixels: np.ndarray, labels: list[int]):
        from torchvision import transforms

        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIDE, padding=PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="images an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each pipeline")
    parser.add_argument("--output", default="benchmarks/results/data.json")
    options = parser.parse_args()
    results = {
        "cpu": speed(options.images, options.rounds, torch.device("cpu")),
        "memory": memory(options.images),
        "gpu": share_of_a_step(options.images) if torch.cuda.is_available() else None,
    }
    report = {"command": "python -m benchmarks.data", **machine(), "results": results}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    cpu, used, gpu = results.values()
    ours, rival = cpu["device_images_per_second"], cpu["workers_images_per_second"]
    print(f"{cpu['images']:,} images of {SIDE}x{SIDE}, batches of {SPEED_BATCH}, medians of {cpu['rounds']} epochs:")
    print(f"  in memory, augmented as tensors          {ours:>9,.0f} images/s ({torch.get_num_threads()} threads)")
    print(f"  DataLoader, {WORKERS} workers, PIL transforms     {rival:>9,.0f} images/s")
    print(f"  {ours / rival:.1f} times as fast (median of rounds {cpu['times']:.1f}; target: at least 10)")
    print(f"memory for the set and an epoch of it: {used['ratio']:.2f} times its raw bytes (target: at most 1.3)")
    if gpu is None:
        print("share of a training step: needs an NVIDIA GPU, not measured")
    else:
        print(f"resnet8x4, batch {STEP_BATCH}: step {gpu['step_ms']:.2f} ms, of which data {100 * gpu['share']:.1f}% "
              "(target: under 5%)")  # fmt: skip
    print(f"written: {options.output}")


def random_set(images: int, side: int = SIDE) -> ImageSet:
    """Noise: neither pipeline looks at what is in the pictures."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    labels = torch.from_numpy(generator.integers(0, 100, images))
    train = Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)
    return ImageSet("noise", 100, side, train, train, MEAN, STD, flip=True)


def speed(images: int, rounds: int, device: torch.device) -> dict:
    """Images a second of both pipelines, which take turns."""
    data = random_set(images)
    pipeline = Pipeline(data, Options(crop_padding=PADDING), device)
    ours = pipeline.training(data.train, SPEED_BATCH)
    pillow = PillowDataset(data.train.pixels.permute(0, 2, 3, 1).numpy(), data.train.labels.tolist())
    rival = DataLoader(
        pillow, SPEED_BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, multiprocessing_context="fork"
    )

    def epoch_of_ours(number: int) -> int:
        return sum(len(batch.labels) for batch in ours.epoch(number))

    def epoch_of_rival(_: int) -> int:
        return sum(len(labels) for _, labels in rival)

    seconds: dict[str, list[float]] = {"device": [], "workers": []}
    for number in range(rounds + 1):  # the first round starts the workers
        for name, epoch in (("device", epoch_of_ours), ("workers", epoch_of_rival)):
            start = time.perf_counter()
            seen = epoch(number)
            if seen != images:
                raise RuntimeError(f"{name}: {seen} images instead of {images}")
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {
        "images": images,
        "rounds": rounds,
        **{f"{name}_images_per_second": images / statistics.median(times) for name, times in seconds.items()},
        "times": statistics.median(w / d for d, w in zip(seconds["device"], seconds["workers"], strict=True)),
    }


def memory(images: int, side: int = SIDE) -> dict:
    """Of loading a parquet file of PNG images and running through an epoch, above what the imports take."""
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(Path(folder) / "train.parquet", images, side)
        write_parquet(Path(folder) / "test.parquet", images // 5, side)
        code = f"import benchmarks.data as d; print(d.peak_over_baseline({folder + '/*.parquet'!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peak = int(done.stdout)
    raw = (images + images // 5) * 3 * side * side
    return {"images": images + images // 5, "raw_bytes": raw, "peak_bytes": peak, "ratio": peak / raw}


def write_parquet(path: Path, images: int, side: int = SIDE) -> None:
    """Noise as PNG: nothing can be compressed, the file is as large as the pixels."""
    generator = np.random.default_rng(images)
    cells = []
    for _ in range(images):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "png", compress_level=0)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"image": cells, "label": [index % 100 for index in range(images)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)  # as Hugging Face datasets writes images


def peak_over_baseline(pattern: str) -> int:
    """Bytes of resident memory, at the most, above what this process holds once all is imported and has run."""
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(Path(folder) / "few.parquet", 1000)
        _load_and_run(f"{folder}/*.parquet")
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not count as there already
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    _load_and_run(pattern)
    return _resident("VmHWM") - before


def _load_and_run(pattern: str) -> None:
    data = load_images(f"parquet:{pattern}", progress=False, options=DataOptions(pipeline="device"))
    for _ in Pipeline(data, Options(), torch.device("cpu")).training(data.train, SPEED_BATCH).epoch(0):
        pass


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def share_of_a_step(images: int, steps: int = 60) -> dict:
    """A training step of resnet8x4 with fresh batches, against the same step on one batch again and again."""
    device = torch.device("cuda")
    data = random_set(images)
    loader = Pipeline(data, Options(crop_padding=PADDING), device).training(data.train, STEP_BATCH)
    model = create_model("resnet8x4", 100).to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def train(batch) -> None:
        sgd.zero_grad()
        cross_entropy(model(batch.images), batch.labels).backward()
        sgd.step()

    same = loader.one(0)
    sources = {"fixed": lambda number: same, "fresh": loader.one}
    seconds: dict[str, list[float]] = {"fixed": [], "fresh": []}
    first = 0
    for turn in range(7):  # the first turn warms up
        for name, batch_of in sources.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for number in range(first, first + steps):
                train(batch_of(number))
            torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - start) / steps)
        first += steps
    fixed, fresh = (statistics.median(times) for times in seconds.values())
    return {"batch": STEP_BATCH, "step_ms": 1000 * fresh, "fixed_ms": 1000 * fixed, "share": (fresh - fixed) / fresh}


if __name__ == "__main__":
    main()
