"""Several students of one teacher: trained together (distill.py --students) and one after the other.

python -m benchmarks.together --output benchmarks/results/together.json

An epoch of noise under the real loop, with the evaluation of a fifth as many images, by the clock and in the
processor's time, which other programs change little; rounds of both take turns. Memory is the peak of a process that
trains one student, and of one that trains all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.data import random_set
from benchmarks.methods import make_objective
from benchmarks.parts import SIDE, make_config
from common import write_atomically
from engine.console import Console
from engine.distributed import start_accelerator
from engine.loop import Loop
from engine.run_folder import RunFolder, machine, peak_memory_bytes
from engine.together import run_together
from models import create_model
from objectives.shared import SharedOutputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--count", type=int, default=4, help="students")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=int, help="only print the peak memory of training so many students, in bytes")
    parser.add_argument("--output", default="benchmarks/results/together.json")
    options = parser.parse_args()
    if options.peak:
        train(options, options.peak)
        print(peak_memory_bytes())
        return
    times: dict[str, list[tuple[float, float]]] = {"together": [], "apart": []}
    for number in range(options.rounds + 1):  # the first warms up
        together = train(options, options.count)
        apart = [sum(each) for each in zip(*(train(options, 1) for _ in range(options.count)), strict=True)]
        if number:
            times["together"].append(together)
            times["apart"].append(tuple(apart))
    found = {"teacher": options.teacher, "student": options.student, "students": options.count, **machine()}
    for place, clock in enumerate(("seconds", "processor_seconds")):
        medians = {name: statistics.median(each[place] for each in values) for name, values in times.items()}
        found |= {clock: medians, f"{clock}_ratio": medians["apart"] / medians["together"]}
    found["peak_memory_bytes"] = {count: peak(options, count) for count in (1, options.count)}
    write_atomically(Path(options.output), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def train(options: argparse.Namespace, count: int) -> tuple[float, float]:
    """Seconds, and seconds of the processor, that `count` students take together."""
    teacher, shared = create_model(options.teacher, 100, image_size=SIDE), SharedOutputs() if count > 1 else None
    loops, data = {}, random_set(options.images)
    data = replace(data, test=data.train.take(torch.arange(options.images // 5)))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            config = make_config("kd", options.student, 64, "no", f"{folder}/{number}", epochs=1)
            torch.manual_seed(0)
            objective = make_objective("kd", teacher, (options.student, options.teacher), data.train.labels, config)
            objective.shared = shared
            accelerator = start_accelerator(config.mixed_precision, None, config.output_dir)
            place = RunFolder(config.output_dir)
            loops[str(number)] = Loop(objective, data, config, accelerator, place, Console(False))
        start = time.perf_counter(), time.process_time()
        if count == 1:
            loops["0"].run()
        else:
            run_together(loops, shared.next_batch)
        return time.perf_counter() - start[0], time.process_time() - start[1]


def peak(options: argparse.Namespace, count: int) -> int:
    """Of a process that does nothing else."""
    given = [f"--{name}={getattr(options, name)}" for name in ("teacher", "student", "images")]
    words = [sys.executable, "-m", "benchmarks.together", *given, "--peak", str(count)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
