"""What a process of its own does to make a run, on this machine or another: train it once, and write its record."""

import contextlib
import errno
import fcntl
import json
import shutil
import sys
from pathlib import Path

import yaml

import distill
import train_teacher
from common import UserError, write_atomically
from comparing.places import Places, finished
from comparing.planned import PlannedRun
from comparing.records import describe, recorded
from engine.config import INPUTS, NOT_COMPUTED
from engine.distributed import run_script

MAINS = {"train_teacher.py": train_teacher.main, "distill.py": distill.main}


def make(run: PlannedRun, places: Places) -> None:
    """Train the run unless its folder is finished, and write its record if that is wanted; go on from its checkpoint if
    there is one."""
    folder = places.runs / run.folder
    with _locked(folder):
        if finished(run, places.runs):
            check_folder(run, folder)
        else:
            words = run.command(places.runs)
            words += ["--resume_from_checkpoint", "latest"] if (folder / "config.yaml").is_file() else []
            print(f"\n$ python {' '.join(words)}", flush=True)
            sys.argv = words
            run_script(MAINS[run.script])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only its model is needed from now on
        if places.records and recorded(run, places.records) is None:
            record = describe(run, places.runs)
            write_atomically(places.records / f"{run.name}.json", json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def _locked(folder: Path):
    """Wait until no other comparison makes this run."""
    with open(f"{folder}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


def check_folder(run: PlannedRun, folder: Path) -> None:
    """Raise UserError if a finished folder was made with other options: of a default that has changed since, say."""
    there = yaml.safe_load((folder / "config.yaml").read_text())
    wanted = run.config.as_dict() | ({"dataset": run.dataset} if run.dataset else {})
    for name, value in wanted.items():
        known = type(value) in (bool, int, float, str) and name not in NOT_COMPUTED | INPUTS | {"seed"}
        if known and there.get(name, value) != value:
            raise UserError(
                f"{folder}: was made with {name} {there[name]}, not {value}; move it away, or choose another --runs"
            )
