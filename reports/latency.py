"""How long a network takes for a batch, on the device where it is."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls that are not counted
FEW, MANY = 10, 100  # calls that are counted, of long ones and of short ones
SECONDS = 1.0  # after which no further call is started


class Stopwatch:
    """Times calls without making the host wait for a GPU between them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, function: Callable, *arguments):
        """What the function returns."""
        if not self.cuda:
            start = time.perf_counter()
            result = function(*arguments)
            self._seconds.append(time.perf_counter() - start)
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function(*arguments)
        end.record()
        self._events.append((start, end))
        return result

    def __len__(self) -> int:
        return len(self._seconds) + len(self._events)

    def milliseconds(self) -> list[float]:
        """Of every call, in order."""
        if not self.cuda:
            return [1000 * each for each in self._seconds]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self._events]


@torch.no_grad()
def repeat(network: nn.Module, images: Tensor, watch: Stopwatch, calls: int) -> None:
    """Call the network on the same images until `watch` has this many times behind the warm-up, or for SECONDS."""
    end = time.perf_counter() + SECONDS
    while len(watch) < WARM_UP + calls and time.perf_counter() < end:
        watch(network, images)


def describe(milliseconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of the times behind the warm-up (all, where there are no others)."""
    counted = milliseconds[WARM_UP:] or milliseconds
    if len(counted) == 1:
        return dict.fromkeys(("p50", "p90", "p99"), counted[0])
    cuts = quantiles(counted, n=100, method="inclusive")
    return {"p50": median(counted), "p90": cuts[89], "p99": cuts[98]}
