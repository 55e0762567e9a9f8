"""What the losses' and the gates' kernels take on this GPU by the shape of their programs: how the shapes were chosen.

python -m benchmarks.shapes --output benchmarks/results/shapes.json

Of each shape, the microseconds of a launch, by CUDA graphs of many, for bf16 logits, forward once where all students'
rows are far from their teacher's and once where all are near (kernels/kd_triton.py sums those again).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.contestants import MAPS, Gate, make_step
from benchmarks.gpu_clock import device_time
from common import UserError, write_atomically
from engine.distributed import run_script
from engine.run_folder import machine
from kernels import gates_triton, kd_triton

CASES = [(3, 8192, 100), (3, 8192, 1000), (3, 4096, 4096), (3, 8192, 32000)]  # (students, rows, classes)
OPTIONS = {"temperature": 4.0, "form": "forward", "label_smoothing": 0.0, "ignore_index": -100}
SETS = 2  # of inputs, in turn
Shape = tuple[int, int, int, int | None]  # rows, classes, warps, registers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/shapes.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks.shapes: needs an NVIDIA GPU")
    rows = []
    jobs = [(case, part, shape) for case in CASES for part in ("forward", "backward") for shape in shapes(part, case)]
    for case, part, shape in tqdm(jobs, leave=False, disable=None):
        with shaped(part, shape):
            far = microseconds(case, part, noise=1.0)
            near = microseconds(case, part, noise=0.2) if part == "forward" else None
        rows.append({"case": case, "pass": part, "shape": shape, "far_us": far, "near_us": near})
    for (channels, side), block in product(MAPS, (1024, 2048, 4096, 8192)):
        gates_triton.BLOCK, before = block, gates_triton.BLOCK
        case = Gate(256, channels, side, torch.bfloat16)
        time, _ = device_time([make_step(case, "fused", case.inputs("cuda")) for _ in range(8)])
        gates_triton.BLOCK = before
        rows.append({"case": (256, channels, side), "pass": "gate", "shape": block, "far_us": 1000 * time["p50"]})
    for row in rows:
        near = "" if row.get("near_us") is None else f", near rows {row['near_us']:.1f}"
        print(f"{row['pass']:9} {row['case']!s:18} {row['shape']!s:22} {row['far_us']:8.1f} us{near}")
    report = {"command": " ".join(["python -m benchmarks.shapes", *sys.argv[1:]]), **machine(), "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"written: {options.output}")


def shapes(part: str, case: tuple[int, int, int]) -> list[Shape]:
    """Those tried for a pass: the one in use, and its neighbours."""
    block_n, block_c, warps, registers = used = getattr(kd_triton, f"{part}_shape")(case[2])
    found = [used, (block_n, block_c, 2 * warps, registers), (2 * block_n, block_c, 2 * warps, registers)]
    found += [(block_n, block_c, max(1, warps // 2), registers), (block_n, block_c, warps, None)]
    if case[2] > block_c:
        found += [(block_n, 2 * block_c, 2 * warps, registers), (block_n, block_c // 2, max(1, warps // 2), registers)]
    return list(dict.fromkeys(found))


@contextmanager
def shaped(part: str, shape: Shape) -> Iterator[None]:
    """Within it a pass of the losses is launched in this shape."""
    name = f"{part}_shape"
    before = getattr(kd_triton, name)
    setattr(kd_triton, name, lambda classes: shape)
    kd_triton._plan.cache_clear()
    try:
        yield
    finally:
        setattr(kd_triton, name, before)
        kd_triton._plan.cache_clear()


def microseconds(case: tuple[int, int, int], part: str, noise: float) -> float:
    """Of a pass; students' logits are their teacher's and `noise` times such noise, or, at 1, noise alone."""
    return 1000 * statistics.median(device_time(launches(case, part, noise))[0].values())


def launches(case: tuple[int, int, int], part: str, noise: float) -> list[Callable[[], object]]:
    """A launch for each set of inputs."""
    K, N, C = case
    found = []
    for _ in range(SETS):
        teacher = 3 * torch.randn(N, C, device="cuda")
        students = 3 * noise * torch.randn(K, N, C, device="cuda") + (teacher if noise < 1 else 0)
        logits = students.bfloat16(), teacher.bfloat16(), torch.randint(0, C, (N,), device="cuda")
        if part == "forward":
            found.append(lambda logits=logits: kd_triton.forward(*logits, **OPTIONS, mean=True))
            continue
        rows, ones = kd_triton.forward(*logits, **OPTIONS, mean=True)[3], torch.ones(K, device="cuda")
        wanted = OPTIONS | {"mean": True, "for_students": True, "for_teacher": True}
        found.append(lambda ones=ones, args=(*logits, rows), w=wanted: kd_triton.backward(ones, ones, None, *args, **w))
    return found


if __name__ == "__main__":
    run_script(main)
