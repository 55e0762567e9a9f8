"""The run folder: its files, its lock, and what a summary says of the machine."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from common import NO_LOCKS, UserError, lock, read_text, write_atomically

OURS = ("summary.json", "model.safetensors", "model.json", "metrics.jsonl", "supernet.safetensors")
OURS += ("evaluation.json", "evaluation.parquet", "report.html")
OUR_FOLDERS = ("plots", "checkpoints", "tensorboard", "anchors", "students", "export", "search")
LOCK = ".lock"
RUN_KEYS = {"method", "dataset", "seed", "epochs", "output_dir", "checkpointing_epochs"}  # of any run's config.yaml
PACKAGES = ("torch", "torchvision", "triton", "accelerate", "safetensors")


class RunFolder:
    """A folder that belongs to one run at a time.

    Args:
        path: where; created when training starts.
        overwrite: an earlier run's files there may be replaced.
        resume: the checkpoint that a run there is to be continued from: a file, or "latest" for its own last one.
        inputs: folders and files that the run reads, by the option that names them.

    Raises:
        UserError: the folder holds a run that may not be replaced, another program's files, or what the run reads.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        resume: str | None = None,
        inputs: Mapping[str, Sequence[str | Path]] | None = None,
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last, self.best = self.checkpoints / "last.safetensors", self.checkpoints / "best.safetensors"
        self.overwrite, self.resume = overwrite, resume
        self._check_inputs(inputs or {})
        self._check()

    def _check_inputs(self, inputs: Mapping[str, Sequence[str | Path]]) -> None:
        own = _real(self.path)
        for option, places in inputs.items():
            for place in places:
                if own in (found := _real(place), *found.parents) and Path(place).exists():
                    raise UserError(f"--output_dir {self.path}: holds {option} {place}, which the run reads")

    def _check(self) -> None:
        path = self.path
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"--output_dir {path}: cannot be used as a folder ({error.strerror})") from None
        if all(name == LOCK or _is_temporary(name) for name in names):
            return
        if not _is_run(path):
            raise UserError(f"--output_dir {path}: holds files that are no run's; choose another folder")
        if self.overwrite:
            return
        going_on = self.resume == "latest" and self.last.is_file()  # a finished run has nothing left to do
        if (path / "summary.json").is_file() and not going_on:
            raise UserError(f"--output_dir {path}: holds a finished run; --overwrite replaces it")
        if self.resume is None:
            raise UserError(
                f"--output_dir {path}: holds an unfinished run; --resume_from_checkpoint latest continues it, "
                "--overwrite replaces it"
            )
        if self.resume != "latest" and _real(self.resume).parent != _real(self.checkpoints):
            raise UserError(
                f"--output_dir {path}: holds another run than --resume_from_checkpoint {self.resume} is of; choose "
                "another folder, or --overwrite replaces it"
            )

    def lock(self) -> None:
        """Claim the folder until the process ends.

        Raises:
            UserError: another process has it, or has left a run in it since it was first looked at.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.path}: cannot be made ({error.strerror})") from None
        try:
            self._lock = lock(self.path / LOCK)
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path}: another run is writing to it now") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"--output_dir {self.path}: cannot be written to ({error.strerror})") from None
        self._check()

    def begin(self, config: dict) -> None:
        """Remove what an earlier run left, if it may be replaced, and write config.yaml.

        A run killed in here leaves a folder that is known as a run's (config.yaml is never missing) and not taken for
        a finished one (summary.json goes first).
        """
        if self.resume is None:
            for name in OURS:
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.path / name for name in OUR_FOLDERS):
                if folder.is_symlink():
                    folder.unlink()
                elif folder.exists():
                    shutil.rmtree(folder)
        for folder in (self.path, self.checkpoints):  # of a killed process
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_history(self, history: list[dict]) -> None:
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def write_summary(self, summary: dict) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")


def _real(place: str | Path) -> Path:
    """Where a path leads, through links; a link to itself stays (Path.resolve raises RuntimeError)."""
    return Path(os.path.realpath(place))


def _is_temporary(name: str) -> bool:
    """Whether `write_atomically` would write under this name: a killed process leaves such files."""
    return name.startswith(".") and name.endswith(".tmp")


def _is_run(path: Path) -> bool:
    """Whether a folder's config.yaml is a run's: nobody else's has all of these keys."""
    try:
        config = yaml.safe_load(read_text(path / "config.yaml"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.keys() >= RUN_KEYS


def default_folder(method: str, model: str, dataset: str) -> str:
    """runs/DATE-METHOD-MODEL-DATASET."""
    names = (date.today().isoformat(), method, Path(model).stem, Path(dataset.partition(":")[0]).stem)
    return "runs/" + "-".join(name.replace(":", "") for name in names)


def plain(name: str) -> str:
    """A name in names of folders and files."""
    kept = Path(name).stem if name.endswith((".json", ".yaml")) else name
    return "".join(each if each.isalnum() or each in "._+=" else "_" for each in kept.replace(":", ""))


def machine() -> dict:
    """Versions, device and git commit, for summaries and benchmark results."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads, {cpu_name()}",
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


def cpu_name() -> str:
    """The processor, as the system calls it."""
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
