"""Accuracies of real runs over several seeds, held against those of one of the ways."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import write_atomically
from engine.run_folder import machine

ROOT = Path(__file__).parents[1]


def top1(script: str, flags: Sequence[str], run: str) -> float:
    """Run a script; its top-1 in percent on the test split at the last epoch."""
    command = [sys.executable, script, *flags, "--output_dir", run]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return json.loads((Path(run) / "summary.json").read_text())["top1"]


def report(found: Mapping[str, Sequence[float]], baseline: str, epochs: int, module: str, output: Path) -> None:
    """Print and write means over seeds, and of the differences to `baseline`, seed by seed, with their standard error.

    `found` holds each way's top-1, a seed each; `module` is the benchmark's.
    """
    rows = {name: _row(each, found[baseline]) for name, each in found.items()}
    command = f"python -m {module} {' '.join(sys.argv[1:])}".strip()
    written = {"command": command, **machine(), "epochs": epochs, "rows": rows}
    write_atomically(output, json.dumps(written, indent=1) + "\n")
    seeds = len(found[baseline])
    print(f"resnet20 -> resnet8 on digits, {epochs} epochs, {seeds} seeds, on {written['device']}")
    for name, row in rows.items():
        apart = f"{row['difference']:+.2f} ± {row['standard_error']:.2f}"
        print(f"  {name:<34} {row['mean']:.2f} ± {row['stdev']:.2f} %, to {baseline} {apart}")
    print(f"written: {output}")


def _row(each: Sequence[float], baseline: Sequence[float]) -> dict:
    differences = [one - other for one, other in zip(each, baseline, strict=True)]
    described = {"top1": list(each), "mean": statistics.mean(each), "stdev": statistics.stdev(each)}
    described["difference"] = statistics.mean(differences)
    return described | {"standard_error": statistics.stdev(differences) / len(differences) ** 0.5}
