"""What a frozen teacher costs on a GPU: as it is and fused (models/fused.py), alone and with its student.

python -m benchmarks.fused    on an NVIDIA GPU

Milliseconds of the device alone, by CUDA graphs, of resnet32x4 in bf16: its forward pass, and that with resnet8x4's
passes and plain KD, one after the other and side by side (engine.cuda_graph.beside). The error is that of the logits,
||found - exact|| / ||exact|| against float64 in plain layers.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import kernels
from benchmarks.gpu_clock import device_time, device_work
from common import UserError, write_atomically
from engine.cuda_graph import beside
from engine.distributed import run_script
from engine.run_folder import machine
from models import create_model
from models.fused import fuse

TEACHER, STUDENT, CLASSES, SIDE = "resnet32x4", "resnet8x4", 100, 32
SIZES = (64, 256, 1024)
TEMPERATURE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/fused.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks.fused: needs an NVIDIA GPU")
    kernels.use("auto", "cuda")
    torch.backends.cudnn.benchmark = True  # as the loop does
    torch.manual_seed(0)
    student = create_model(STUDENT, CLASSES, image_size=SIDE).to("cuda", memory_format=torch.channels_last)
    rows = []
    for form, teacher in teachers().items():
        for size in SIZES:
            row = {"teacher": form, "batch": size, **measure(teacher, student, size)}
            figures = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
            print(f"{form}, batch {size}: {figures}, {row['teacher_kernels']} kernels", flush=True)
            rows.append(row)
    report = {"command": " ".join(["python -m benchmarks.fused", *sys.argv[1:]]), **machine(), "rows": rows}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"written: {options.output}")


def teachers() -> dict[str, nn.Module]:
    """One teacher by form, with statistics that are not those of a fresh network."""
    plain = create_model(TEACHER, CLASSES, image_size=SIDE)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    plain = plain.eval().requires_grad_(False).to("cuda", memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return {"plain": plain, "fused": fused}


def measure(teacher: nn.Module, student: nn.Module, size: int) -> dict[str, float | int]:
    """Milliseconds, kernels of the teacher's pass, and its error."""
    images = torch.randn(size, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (size,), device="cuda")

    def teach() -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return teacher(images)

    def learn(asked) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = student(images)
        ce, kl = kernels.kd_loss(logits, asked(), labels, temperature=TEMPERATURE)
        (0.1 * ce.mean() + 0.9 * TEMPERATURE**2 * kl.mean()).backward()
        student.zero_grad()

    def in_turn() -> None:
        logits = teach()
        learn(lambda: logits)

    error = relative_error(teacher, images[:64], teach()[:64])
    times = {"teacher_ms": teach, "in_turn_ms": in_turn, "side_by_side_ms": lambda: learn(beside(teach, images.device))}
    measured = {name: device_time([run]) for name, run in times.items()}
    if not all(graphed for _, graphed in measured.values()):
        raise RuntimeError("a pass could not be captured, and what is not captured runs nothing side by side")
    found = {name: time["p50"] for name, (time, _) in measured.items()}
    return found | {"teacher_kernels": len(device_work(teach)), "error": error}


@torch.no_grad()
def relative_error(teacher: nn.Module, images: Tensor, found: Tensor) -> float:
    """||found - exact|| / ||exact||, exact by the layers of `teacher` in float64, unfused on a CPU."""
    exact = copy.deepcopy(teacher).cpu().double()(images.cpu().double())
    return ((found.cpu().double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    run_script(main)
