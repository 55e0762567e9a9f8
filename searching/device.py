"""Measure blocks and whole members of a pool, exported as ONNX, on this device.

python profile_device.py --output profile.json

Needs Python, onnxruntime and numpy alone, and the folder that this file was written to. One thread; of each file the
least processor time of many calls, which other programs on the machine hardly change, in three passes over all files.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import onnxruntime

PASSES = 3
SECONDS, LEAST_CALLS = 0.2, 5  # a file, a pass
DESIGN = ("CPU implementer", "CPU part", "CPU variant")  # what /proc/cpuinfo says of an ARM core
SAMPLE = 5e-4  # seconds at least between two looks at the clock, which takes a microsecond itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="profile.json", help="the file to write, for search.py --profile")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a file and pass")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    profile = measure(folder, options.seconds, lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr))
    print(file=sys.stderr)
    temporary = f"{options.output}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(profile, indent=1) + "\n")
    os.replace(temporary, options.output)
    print(f"written: {options.output}, of {profile['device']}")


def measure(folder: Path, seconds: float = SECONDS, told: Callable[[int, int], None] = lambda done, total: None):
    """The profile: what blocks.json says, the device, and milliseconds by file, the least and that of each pass.

    Args:
        folder: holds blocks.json and the files that it names.
        seconds: for a file and pass.
        told: called with the number of files measured and to be measured.
    """
    described = json.loads((folder / "blocks.json").read_text(encoding="utf-8"))
    shapes = described.pop("shapes")
    passes = {name: [] for name in shapes}
    for number in range(PASSES):
        for place, (name, shape) in enumerate(shapes.items(), start=1):
            passes[name].append(milliseconds(folder / f"{name}.onnx", shape, seconds))
            told(number * len(shapes) + place, PASSES * len(shapes))
    name, version = here()
    profile = {"device": name, "onnxruntime": version, "threads": 1, **described}
    return profile | {"ms": {name: min(times) for name, times in passes.items()}, "passes": passes}


def milliseconds(path: Path, shape: list[int], seconds: float) -> float:
    """The least processor time of a call for one image [1, *shape], with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = {"images": numpy.random.default_rng(0).standard_normal((1, *shape), dtype=numpy.float32)}
    session.run(None, images)
    sample = max(SAMPLE, 100 * time.get_clock_info("thread_time").resolution)
    calls = math.ceil(sample / max(1e-6, _sample(session, images, 1)))
    samples, end = [], time.perf_counter() + seconds
    while len(samples) * calls < LEAST_CALLS or time.perf_counter() < end:
        samples.append(_sample(session, images, calls))
    return 1000 * min(samples)


def _sample(session, images, calls: int) -> float:
    start = time.thread_time()  # one thread: it is this one
    for _ in range(calls):
        session.run(None, images)
    return (time.thread_time() - start) / calls


def here() -> tuple[str, str]:
    """This device, as far as a name tells, and the version of ONNX Runtime."""
    return device_name(), onnxruntime.__version__


def device_name() -> str:
    """The processor, as the system calls it; where it calls all of a kind alike, with the numbers of its design and a
    hash of the computer's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{platform.processor() or platform.machine()}, computer {_computer()}"
    if names := _values(lines, "model name", "Model", "Hardware"):
        return names[0]
    cores = [f"{name[4:]} {'/'.join(found)}" for name in DESIGN if (found := _values(lines, name))]
    return ", ".join([platform.machine(), *cores, f"computer {_computer()}"])


def _values(lines: list[str], *names: str) -> list[str]:
    """The different values of /proc/cpuinfo under one of these names, in order: cores may differ."""
    return list(dict.fromkeys(line.split(":", 1)[1].strip() for line in lines if line.startswith(names)))


def _computer() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
