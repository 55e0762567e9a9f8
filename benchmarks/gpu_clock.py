"""Times on a GPU: of the device alone, by CUDA graphs and events, and in a queue as a training loop sees them."""

import statistics
import time
from collections.abc import Callable

import torch

IN_A_GRAPH = 16  # calls
LONGEST = 0.1  # seconds of measurement for each time
Step = Callable[[], object]


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    low, _, _, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"p20": 1e3 * low, "p50": 1e3 * statistics.median(seconds), "p80": 1e3 * high}


def device_time(steps: list[Step]) -> tuple[dict[str, float], bool]:
    """Time of a step on the device alone, and whether steps were replayed from a CUDA graph (else launched)."""
    try:
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                steps[0]()
        torch.cuda.current_stream().wait_stream(side)
        # Short ones often: a launch takes the host longer than them the device.
        calls = len(steps) * (1 if min(timed(steps[:1])) > 1e-3 else max(1, IN_A_GRAPH // len(steps)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for number in range(calls):
                steps[number % len(steps)]()
        seconds = [each / calls for each in timed([graph.replay])]
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # what waits for the device, or allocates outside, cannot be captured
        torch.cuda.synchronize()
        return percentiles(timed(steps)), False
    return percentiles(seconds), True


def timed(runs: list[Callable]) -> list[float]:
    """Seconds of each call, by events, for LONGEST seconds and 5 calls or more."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    events, start, number = [], time.perf_counter(), 0
    while number < 5 or (time.perf_counter() - start < LONGEST and number < 1000):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        runs[number % len(runs)]()
        end.record()
        events.append((begin, end))
        number += 1
        if number % 20 == 0 or number < 6:
            torch.cuda.synchronize()  # the clock above is to see the work, not the queue
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def wall_time(step: Step) -> dict[str, float]:
    """Time of a call among many that wait in the queue."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    calls = max(3, min(100, int(LONGEST / 9 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return percentiles(seconds)


def device_work(run: Callable) -> list[tuple[str, float]]:
    """(name, microseconds) of the kernels, copies and fills that a call gives the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.device_time) for event in found]


def peak_bytes(step: Step) -> int:
    """Memory at the peak of a step, above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
