"""The GPU benchmarks without a GPU: what they would measure, and how they read what they measured."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_steps, parts
from benchmarks.contestants import Gate, Loss, cases, eager_losses, providers
from benchmarks.data import random_set
from benchmarks.gpu_clock import percentiles
from benchmarks.kernels import (
    check,
    figures,
    find,
    line,
    main,
    plot,
    reached,
)
from models.pool import Pool

ROOT = Path(__file__).parents[1]
BF16, F32 = torch.bfloat16, torch.float32


def synthetic_rows() -> list[dict]:
    """A row for all that would be measured: fused in 1 ms, torch.compile in 2, eager in 5, Liger in 3."""
    milliseconds, rows = {"fused": 1.0, "compile": 2.0, "eager": 5.0, "liger": 3.0}, []
    for case in cases(BF16):
        for provider in providers(case, liger=True):
            time = dict.fromkeys(("p20", "p50", "p80"), milliseconds[provider])
            row = {"op": type(case).__name__.lower(), "provider": provider, **asdict(case)}
            row |= {"dtype": str(case.dtype).removeprefix("torch."), "device_ms": time, "wall_ms": time, "error": 0.0}
            row |= {"launches": 3, "peak_bytes": 100 if provider == "fused" else 300, "share": 0.9}
            rows.append(row | {"gigabytes_per_second": 1.0, "minimum_bytes": case.minimum_bytes()})
    return [*rows, {"op": "update", "provider": "host", "launches": 2, "waits": 1, "wall_ms": 0.1}]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Loss(3, 8192, 1000, BF16), 3 * 4 * 8192 * 1000 * 2),
        (Loss(1, 64, 10, F32, backward=False), 2 * 64 * 10 * 4),
        (Gate(256, 64, 32, BF16), 6 * 256 * 64 * 1024 * 2),  # a, x -> y; dy, a, b
        (Gate(1, 2, 3, F32, relu=True), 8 * 18 * 4),  # and y -> dz
        (Gate(1, 2, 3, F32, soft=True), 9 * 18 * 4),  # a, b, x -> y; dy, a, b -> da, db
    ],
)
def test_the_fewest_bytes(case, expected):
    assert case.minimum_bytes() == expected


def test_the_grid_is_the_one_promised():
    losses = {(c.K, c.N, c.C, c.dtype) for c in cases(BF16) if isinstance(c, Loss) and c.backward}
    assert {
        (K, N, C, BF16) for K in (1, 3) for N in (64, 128, 256, 1024, 8192) for C in (10, 100, 200, 1000, 32000)
    } <= losses
    gates = {(c.batch, c.channels, c.side) for c in cases(BF16) if isinstance(c, Gate)}
    assert gates == {(n, *size) for n in (64, 256, 1024) for size in ((64, 32), (128, 16), (256, 8))}
    assert len(cases(BF16)) == len(set(cases(BF16)))


def test_every_target_is_measured_and_judged_by_what_was_measured():
    rows = synthetic_rows()
    targets = figures(rows, "bfloat16")
    assert len(targets) == 5 + 6 + 6 + 2
    assert all(reached(value, comparison, target) for _, value, comparison, target in targets)
    slow = find(rows, "fused", op="loss", K=3, N=8192, C=1000, dtype="bfloat16", backward=True)
    slow |= {"device_ms": {"p50": 2.5}, "share": 0.36}
    values = {
        what: (value, reached(value, comparison, target))
        for what, value, comparison, target in figures(rows, "bfloat16")
    }
    assert values["loss 3x8192x1000, share of copy bandwidth"] == (0.36, False)
    assert values["loss 3x8192x1000, times eager"] == (2.0, False)
    assert values["loss 3x8192x1000, times torch.compile"] == (0.8, False)
    assert sum(not fine for _, fine in values.values()) == 3
    slow["skipped"] = "out of memory"
    assert [value for what, value, *_ in figures(rows, "bfloat16") if "8192x1000" in what] == [None, None, None]


def test_rows_and_plots_are_drawn(tmp_path):
    rows = synthetic_rows()
    assert "5.0000 ms" in line(find(rows, "eager", op="loss")) and "soft" in line(find(rows, "fused", soft=True))
    assert line(rows[0] | {"skipped": "out of memory"}).endswith("out of memory")
    plot(rows, "bfloat16", 4e12, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_percentiles_are_milliseconds():
    assert percentiles([0.001 * i for i in range(1, 12)]) == pytest.approx({"p20": 3.0, "p50": 6.0, "p80": 9.0})


def test_the_baseline_computes_the_papers_loss():
    s, t = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    y = torch.tensor([0, 6, 3, 3, 1])
    ce, kl = eager_losses(s, t, y)
    p, q = (t / 4).softmax(-1), (s / 4).softmax(-1)
    assert torch.allclose(kl, (p * (p / q).log()).sum(-1).mean(-1))
    assert torch.allclose(ce, torch.stack([-row.softmax(-1)[range(5), y].log().mean() for row in s]))


def test_contestants_agree(capsys):
    assert check("cpu")
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


SMALL = Pool(stem=4, widths=[4, 4, 8, 8], strides=[1, 2, 2, 1], head=8, candidates=["res3x2", "identity"])


def test_a_gpus_steps_are_the_loops(monkeypatch, tmp_path):
    """Phases by themselves: of GTN weights change in the weight steps of the real loop alone, gates in the others."""
    config = parts.make_config("gtn", "", 4, "no", tmp_path, pool=SMALL)
    loop, seen = parts.make_loop("gtn", "resnet8", config, random_set(20)), []
    monkeypatch.setattr(gpu_steps, "READ_EVERY", 2)
    monkeypatch.setattr(gpu_steps, "on_device", lambda run, steps: run() or {"kernels": steps})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(state(loop)))
    phases = gpu_steps.measure(loop, windows=3)
    assert list(phases) == ["weights", "gates"] and all(len(of["steps_ms"]) == 3 for of in phases.values())
    weights, gates = (
        [not torch.equal(a, b) for a, b in zip(of[::2], of[1::2], strict=True)] for of in zip(*seen, strict=True)
    )
    assert weights == [True] * 3 + [False] * 3 and gates == [False] * 3 + [True] * 3


def state(loop) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.cat([p.detach().flatten() for p in loop.objective.parameters()])
    return weights.clone(), loop.objective.gates.phi.detach().clone()


def test_figures_of_a_gpus_steps():
    def row(images_per_second, **phases):
        return {
            "images_per_second": images_per_second,
            "phases": {n: {"step_ms": ms, "matrix_ms": 3.0} for n, ms in phases.items()},
        }

    rows = {
        "plain script": {"images_per_second": 1000.0},
        "kd": row(2000.0, weights=6.0),
        "kd, one CUDA graph": row(6000.0, weights=2.0),
    }
    rows |= {"kd, batch 1024": row(1.0, weights=6.0), "gtn": row(1.0, weights=12.0, gates=6.0)}
    rows |= {"sftn of pool:1": row(1.0, weights=8.0), "sftn of pool:2": row(1.0, weights=12.0)}
    found = {what: value for what, value, *_ in gpu_steps.figures(rows)}
    assert found["kd, one CUDA graph: images/s, times the plain script's"] == 6
    assert found["240 epochs of 50,000 images, minutes"] == pytest.approx(240 * 50_000 / 6000 / 60)
    assert found["kd, batch 1024: share of time in matrix kernels"] == 0.5
    assert (
        found["gtn: step of the weights over SFTN's"] == 1.2
        and found["gtn: step of the gates over one of the weights"] == 0.5
    )
    assert (
        found["gtn: an epoch over SFTN's"] == 0.9 and found["gtn, graphs of its pieces: an epoch over SFTN's"] is None
    )
