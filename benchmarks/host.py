"""What a call of kd_loss with its gradients costs the host: everything but the launches, which are left out.

python -m benchmarks.host

At a batch of 64 this, and not the device, is what a training step waits for. Needs no GPU: the launches are replaced by
nothing, and the processor's time is measured, of which other programs take no part; the least of many repetitions.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: Triton's kernels are then taken on a CPU too

import time
from collections.abc import Callable

import torch
from triton.runtime.interpreter import InterpretedFunction

import kernels

CALLS, REPETITIONS = 20, 60


def launch_nothing(*_, **__) -> None:
    """In place of Triton's launch."""


def step() -> Callable[[], object]:
    """Losses of three students and their teacher, and all gradients."""
    students = torch.randn(3, 64, 100, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    labels, upstream = torch.randint(0, 100, (64,)), [torch.ones(3), torch.ones(3)]

    def run():
        losses = kernels.kd_loss(students, teacher, labels, temperature=4.0)
        return torch.autograd.grad(losses, [students, teacher], upstream)

    return run


def least_seconds(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    times = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        for _ in range(CALLS):
            run()
        times.append((time.process_time() - start) / CALLS)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    kernels.use("triton", "cpu")
    InterpretedFunction.run = launch_nothing
    print(f"kd_loss, 3x64x100, forward and backward: {1e6 * least_seconds(step()):.0f} microseconds of the host")


if __name__ == "__main__":
    main()
