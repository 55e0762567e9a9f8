"""What the kernels cost on a GPU, against eager PyTorch, torch.compile and Liger-Kernel.

python -m benchmarks.kernels           on an NVIDIA GPU: measures, draws, and says which targets were reached
python -m benchmarks.kernels --check   anywhere: only whether every contestant computes the same

Two times are reported. "device" is the time of one call on the GPU alone: replays of a CUDA graph between two
events, over several sets of inputs in turn, so that large ones come from memory and not from the cache. "wall"
is the time of one call in a queue of many, as a training loop sees it, Python included. Each is a median with
the 20th and 80th percentile. Shares are of the bandwidth that a large copy reached in the same run, for the
fewest bytes that the operation could move: every input read once, every result written once, once a pass.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import kernels
from benchmarks.contestants import (
    CLASSES,
    MAPS,
    Case,
    Gate,
    Loss,
    cases,
    eager_losses,
    make_step,
    providers,
)
from benchmarks.gpu_clock import device_time, device_work, peak_bytes, timed, wall_time
from common import write_atomically
from engine.run_folder import machine
from objectives.gates import Gates

ROTATE_BYTES = 256 << 20  # inputs in turn exceed this, several times any cache


# Measuring.


def relative_error(case: Case, provider: str, device) -> float:
    """The largest ||out - exact|| / ||exact|| of the step's results, exact being the eager form in float64."""
    torch.manual_seed(0)
    case = case if provider == "compile" else case.small()  # another size would be compiled for twice
    inputs = case.inputs(device)
    found = make_step(case, provider, inputs)()
    wide = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    exact = make_step(case, "eager", wide)()
    if provider == "liger":
        _, kl, *gradients = exact
        if gradients:  # the students' gradient of the divergence alone
            kl = eager_losses(*wide[:3])[1]
            gradients = torch.autograd.grad(kl, wide[0], wide[4])
        exact = (kl, *gradients)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    return max(errors)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(timed([lambda: target.copy_(source)]))
    return 2 * source.numel() * source.itemsize / seconds


def measure(case: Case, provider: str, bandwidth: float) -> dict:
    """One row of the results."""
    row = {"op": type(case).__name__.lower(), "provider": provider, **asdict(case)}
    row["dtype"] = str(case.dtype).removeprefix("torch.")
    torch._dynamo.reset()  # or it stops compiling after a few shapes
    try:
        row["error"] = error = relative_error(case, provider, "cuda")
    except torch.cuda.OutOfMemoryError:
        return row | {"skipped": "out of memory"}
    if not error < (1e-4 if case.dtype == torch.float32 else 2e-2):
        return row | {"skipped": f"wrong: relative error {error:.1e}"}
    try:
        inputs = case.inputs("cuda")
        size = sum(x.numel() * x.itemsize for x in inputs)
        sets = [inputs] + [case.inputs("cuda") for _ in range(min(15, ROTATE_BYTES // size))]
        # torch.compile is timed on one set: every set would be compiled for again.
        steps = [make_step(case, provider, each) for each in (sets[:1] if provider == "compile" else sets)]
        peak, work = peak_bytes(steps[0]), device_work(steps[0])
        wall = wall_time(steps[0])
        device, graphed = device_time(steps)
    except torch.cuda.OutOfMemoryError:
        return row | {"skipped": "out of memory"}
    finally:
        sets = steps = inputs = None
        torch.cuda.empty_cache()
    rate = case.minimum_bytes() / (device["p50"] / 1e3)
    row |= {"device_ms": device, "graphed": graphed, "wall_ms": wall, "launches": len(work), "peak_bytes": peak}
    row["kernels_us"] = [(name[:80], round(microseconds, 2)) for name, microseconds in work] * (len(work) < 8)
    row |= {"minimum_bytes": case.minimum_bytes(), "gigabytes_per_second": rate / 1e9, "share": rate / bandwidth}
    return row


def measure_gate_update() -> dict:
    """Draw, gradient of all gates, Adam, rescaling, for six layers of twelve candidates."""
    gates, like = Gates([12] * 6), torch.empty(0, device="cuda")
    adam = torch.optim.Adam([gates.phi], lr=1e-3, betas=(0.0, 0.999))
    generator = torch.Generator().manual_seed(0)

    def begin():
        draws = gates.draw_gate_step(generator, like)
        gates.leaf().grad = torch.randn(gates.leaf().shape, device="cuda")
        return draws

    def finish():
        gates.set_gradient(lambda gradient: gradient)
        adam.step()
        gates.finish_update()

    begin()
    finish()
    gates.draw_gate_step(generator, like)
    drawn = device_work(lambda: gates.draw_gate_step(generator, like))
    begin()
    work = drawn + device_work(finish)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        begin()
        finish()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) * 10
    waits = sum("DtoH" in name or "Device -> " in name for name, _ in work)
    return {"op": "update", "provider": "host", "launches": len(work), "waits": waits, "wall_ms": milliseconds}


# Reading the results.


def find(rows: list[dict], provider: str, **wanted) -> dict | None:
    """The measured row of a provider with these values, if there is one."""
    for row in rows:
        if row["provider"] == provider and "skipped" not in row and all(row.get(k) == v for k, v in wanted.items()):
            return row
    return None


def figures(rows: list[dict], half: str) -> list[tuple[str, float | None, str, float]]:
    """(what, measured value or None, "at least" or "at most", target) of every target that the kernels have."""
    found = []

    def compare(what: str, comparison: str, target: float, value: Callable, *needed: dict | None) -> None:
        found.append((what, None if None in needed else value(*needed), comparison, target))

    def times(name: str) -> Callable:
        return lambda ours, other: other[name]["p50"] / ours[name]["p50"]

    big = {"op": "loss", "K": 3, "N": 8192, "dtype": half, "backward": True}
    ours, eager, compiled = (find(rows, name, C=1000, **big) for name in ("fused", "eager", "compile"))
    compare("loss 3x8192x1000, share of copy bandwidth", "at least", 0.8, lambda row: row["share"], ours)
    compare("loss 3x8192x1000, times eager", "at least", 4.0, times("device_ms"), ours, eager)
    compare("loss 3x8192x1000, times torch.compile", "at least", 1.0, times("device_ms"), ours, compiled)
    ours, eager, compiled = (find(rows, name, C=32000, **big) for name in ("fused", "eager", "compile"))
    compare("loss 3x8192x32000, times torch.compile", "at least", 1.2, times("device_ms"), ours, compiled)
    what = "loss 3x8192x32000, peak memory of eager's"
    compare(what, "at most", 0.5, lambda ours, eager: ours["peak_bytes"] / eager["peak_bytes"], ours, eager)
    for size in (64, 128, 256):
        small = big | {"N": size, "C": 100}
        ours, eager = (find(rows, name, **small) for name in ("fused", "eager"))
        compare(f"loss 3x{size}x100, wall, times eager", "at least", 3.0, times("wall_ms"), ours, eager)
        compare(f"loss 3x{size}x100, launches", "at most", 4, lambda row: row["launches"], ours)
    for channels, side in MAPS:
        gate = {"op": "gate", "batch": 256, "channels": channels, "dtype": half, "relu": False, "soft": False}
        ours, eager = (find(rows, name, **gate) for name in ("fused", "eager"))
        name = f"gate 256x{channels}x{side}x{side}"
        compare(f"{name}, share of copy bandwidth", "at least", 0.7, lambda row: row["share"], ours)
        compare(f"{name}, times eager", "at least", 3.0, times("device_ms"), ours, eager)
    update = find(rows, "host", op="update")
    compare("gate update, launches", "at most", 10, lambda row: row["launches"], update)
    compare("gate update, waits for the device", "at most", 1, lambda row: row["waits"], update)
    return found


def reached(value: float, comparison: str, target: float) -> bool:
    """Whether a figure meets its target."""
    return value >= target if comparison == "at least" else value <= target


def print_verdicts(found: list[tuple[str, float | None, str, float]]) -> None:
    """A line for each of a benchmark's figures: (what, measured value or None, "at least" or "at most", target)."""
    for what, value, comparison, target in found:
        verdict = (
            "not measured" if value is None else "reached" if reached(value, comparison, target) else "NOT REACHED"
        )
        print(f"{what:60} {'-' if value is None else f'{value:.2f}':>8}  ({comparison} {target:g})  {verdict}")


def line(row: dict) -> str:
    """A row of the table."""
    if row["op"] == "loss":
        name = f"loss {row['K']}x{row['N']}x{row['C']} {'forward+backward' if row['backward'] else 'forward'}"
    else:
        kind = "soft " * row["soft"] + "relu " * row["relu"]
        name = f"gate {row['batch']}x{row['channels']}x{row['side']}x{row['side']} {kind}".rstrip()
    start = f"{name:38} {row['dtype']:8} {row['provider']:8}"
    if "skipped" in row:
        return f"{start} {row['skipped']}"
    device = row["device_ms"]
    return (
        f"{start} device {device['p50']:8.4f} ms ({device['p20']:.4f}-{device['p80']:.4f})  "
        f"wall {row['wall_ms']['p50']:8.4f} ms  "
        f"{row['launches']:3} launches  {row['gigabytes_per_second']:6.0f} GB/s ({100 * row['share']:3.0f}% of copy)  "
        f"peak {row['peak_bytes'] / 2**20:8.1f} MiB  error {row['error']:.0e}"
    )


def plot(rows: list[dict], half: str, bandwidth: float, path: Path) -> None:
    """Time of the losses against the number of classes, for many rows and for a training batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for panel, size, time_name in zip(panels, (8192, 256), ("device_ms", "wall_ms"), strict=False):
        for provider in ("eager", "compile", "liger", "fused"):
            case = {"op": "loss", "K": 3, "N": size, "dtype": half, "backward": True}
            points = [(C, row[time_name]["p50"]) for C in CLASSES if (row := find(rows, provider, C=C, **case))]
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=provider)
        floor = [1e3 * Loss(3, size, C, getattr(torch, half)).minimum_bytes() / bandwidth for C in CLASSES]
        panel.loglog(CLASSES, floor, "k:", label="copy bandwidth")
        panel.set(xlabel="classes", ylabel="ms", title=f"losses, K=3, N={size}, {half}: {time_name.split('_')[0]}")
        panel.legend()
    shown = ("eager", "compile", "fused")
    for place, provider in enumerate(shown):
        case = {"op": "gate", "batch": 256, "dtype": half, "relu": False, "soft": False}
        heights = [(find(rows, provider, channels=channels, **case) or {}) for channels, _ in MAPS]
        heights = [row["device_ms"]["p50"] if row else 0.0 for row in heights]
        panels[2].bar([i + place / 4 for i in range(len(MAPS))], heights, width=0.24, label=provider)
    panels[2].set_xticks([i + 0.25 for i in range(len(MAPS))], [f"{c}x{s}x{s}" for c, s in MAPS])
    panels[2].set(ylabel="ms", title=f"gate of two candidates, batch 256, {half}: device")
    panels[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check(device: str) -> bool:
    """Whether all contestants agree with float64 on a few shapes; prints a line each."""
    fine = True
    dtypes, kinds = (torch.bfloat16, torch.float32), ((False, False), (True, False), (False, True))
    small = [Loss(3, 16, C, dtype) for C in (10, 1000) for dtype in dtypes]
    small += [Gate(2, 16, 8, dtype, relu, soft) for dtype in dtypes for relu, soft in kinds]
    for case in small:
        for provider in ("fused", "eager"):
            error = relative_error(case, provider, device)
            fine &= error < (1e-4 if case.dtype == torch.float32 else 2e-2)
            print(f"{provider:6} {case}: relative error {error:.1e}, at least {case.minimum_bytes():,} bytes")
    return fine


def has_liger() -> bool:
    """Whether Liger-Kernel is installed; says so if not."""
    try:
        import liger_kernel.transformers  # noqa: F401 - whether it is there is the question
    except ImportError:
        print("Liger-Kernel is not installed: left out (pip install liger-kernel)")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare results, on whatever machine this is")
    parser.add_argument("--minutes", type=float, default=7, help="no case is begun after these")
    parser.add_argument("--output", default="benchmarks/results/kernels.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementation = kernels.use("auto", device)
    if options.check:
        print(f"fused is: {implementation}")
        sys.exit(0 if check(device) else 1)
    if implementation != "triton":
        print(f"benchmarks.kernels: needs an NVIDIA GPU ({implementation}); --check runs anywhere", file=sys.stderr)
        sys.exit(2)

    half = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    name = str(half).removeprefix("torch.")
    liger, start = has_liger(), time.perf_counter()
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s read and written")
    rows, wanted = [], cases(half)
    for number, case in enumerate(wanted):
        if time.perf_counter() - start > 60 * options.minutes:
            print(f"left out after {options.minutes:g} minutes: the last {len(wanted) - number} of {len(wanted)} cases")
            break
        for provider in providers(case, liger):
            rows.append(measure(case, provider, bandwidth))
            print(line(rows[-1]), flush=True)
    rows.append(measure_gate_update())
    again = copy_bandwidth()  # whether the device was in the same state at the end
    print(f"copy at the end: {again / 1e9:.0f} GB/s; {time.perf_counter() - start:.0f} s in all\n")
    targets = figures(rows, name)
    print_verdicts(targets)
    report = {
        "command": " ".join(["python -m benchmarks.kernels", *sys.argv[1:]]),
        **machine(),
        "copy_bytes_per_second": [bandwidth, again],
        "figures": [dict(zip(("what", "value", "comparison", "target"), each, strict=True)) for each in targets],
        "rows": rows,
    }
    output = Path(options.output)
    write_atomically(output, json.dumps(report, indent=1) + "\n")
    plot(rows, name, bandwidth, output.with_suffix(".png"))
    print(f"written: {output}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
