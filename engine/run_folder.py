"""The run folder: its files, its lock, and what a summary says of the machine."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from common import UserError, write_atomically

OURS = ("config.yaml", "model.safetensors", "model.json", "metrics.jsonl", "summary.json", "supernet.safetensors")
OUR_FOLDERS = ("plots", "checkpoints", "tensorboard", "anchors")
LOCK = ".lock"
PACKAGES = ("torch", "torchvision", "triton", "accelerate", "safetensors")


class RunFolder:
    """A folder that belongs to one run at a time.

    Args:
        path: where; created when training starts.
        overwrite: an earlier run's files there may be replaced.
        resume: a run there is to be continued.

    Raises:
        UserError: the folder holds a run (and neither is set), another program's files, or is in use.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last, self.best = self.checkpoints / "last.safetensors", self.checkpoints / "best.safetensors"
        self.overwrite, self.resume = overwrite, resume
        self._check()

    def _check(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"--output_dir {path}: is a file")
        if not path.is_dir() or set(os.listdir(path)) <= {LOCK}:
            return
        if not (path / "config.yaml").is_file():
            raise UserError(f"--output_dir {path}: holds files that are no run's; choose another folder")
        if (path / "summary.json").is_file() and not self.overwrite:
            raise UserError(f"--output_dir {path}: holds a finished run; --overwrite replaces it")
        if not self.overwrite and not self.resume:
            raise UserError(
                f"--output_dir {path}: holds an unfinished run; --resume_from_checkpoint latest continues it, "
                "--overwrite replaces it"
            )

    def lock(self) -> None:
        """Claim the folder until the process ends. Raises UserError when another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "a")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output_dir {self.path}: another run is writing to it now") from None

    def begin(self, config: dict) -> None:
        """Remove what an earlier run left, if it may be replaced, and write config.yaml."""
        if not self.resume:
            for name in OURS:
                (self.path / name).unlink(missing_ok=True)
            for name in OUR_FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
        for leftover in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):  # of a killed process
            leftover.unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_history(self, history: list[dict]) -> None:
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def write_summary(self, summary: dict) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")


def default_folder(method: str, model: str, dataset: str) -> str:
    """runs/DATE-METHOD-MODEL-DATASET."""
    names = (date.today().isoformat(), method, Path(model).stem, Path(dataset.partition(":")[0]).stem)
    return "runs/" + "-".join(name.replace(":", "") for name in names)


def machine() -> dict:
    """Versions, device and git commit, for summaries and benchmark results."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads, {_cpu_name()}",
        "git_commit": _git_commit(),
    }


def peak_memory_bytes() -> int:
    """Peak memory of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # getrusage would count what the process was started from
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
