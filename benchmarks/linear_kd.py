"""Peak memory and time of the losses behind a large classifier: fused with it, and of logits.

python -m benchmarks.linear_kd

One forward and backward pass, each in a process of its own, on the GPU where there is one. Memory is the peak over what
the process held before: embeddings and classifiers, the same for both. Gradients of the classifier are in both peaks.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import linear

from common import write_atomically
from engine.run_folder import machine
from kernels import kd_loss, linear_kd_loss

CONTESTANTS = ("unfused", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256, help="of both embeddings")
    parser.add_argument("--only", choices=CONTESTANTS, help="in this process, its result on standard output")
    parser.add_argument("--output", default="benchmarks/results/linear_kd.json")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options)))
        return
    rows = {}
    for name in CONTESTANTS:
        words = [sys.executable, "-m", "benchmarks.linear_kd", *sys.argv[1:], "--only", name]
        rows[name] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        print(f"{name:8}  {rows[name]['peak_bytes'] / 2**20:8,.0f} MiB  {rows[name]['seconds']:6.2f} s")
    share = rows["fused"]["peak_bytes"] / rows["unfused"]["peak_bytes"]
    without = [row["peak_bytes"] - row["gradient_bytes"] for row in rows.values()]
    print(f"fused: {share:.0%} of the peak, {without[1] / without[0]:.1%} without the classifier's gradient")
    found = {"sizes": vars(options), "rows": rows, "share": share, **machine()}
    write_atomically(Path(options.output), json.dumps(found, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One pass of the contestant `only`: bytes over what was there before, those of the gradients, seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shapes = ((options.images, options.width), (options.classes, options.width))
    student = [(torch.randn(shape, device=device) / 16).requires_grad_() for shape in shapes]
    teacher = [torch.randn(shape, device=device) / 16 for shape in shapes]
    labels = torch.randint(0, options.classes, (options.images,), device=device)
    before, start = peak(device), time.perf_counter()
    if options.only == "fused":
        ce, kl = linear_kd_loss(*student, None, *teacher, None, labels, temperature=4.0)
    else:
        ce, kl = kd_loss(linear(*student), linear(*teacher), labels, temperature=4.0)
    (ce + kl).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gradients = sum(each.grad.nbytes for each in student)
    return {"peak_bytes": peak(device) - before, "gradient_bytes": gradients, "seconds": seconds}


def peak(device: torch.device) -> int:
    """Bytes: the most that the device held so far, or on a CPU the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
