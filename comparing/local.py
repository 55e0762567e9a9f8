"""Runs on this machine: each in a fork of one process that has imported all it needs, several at a time where asked.

A fork starts in a hundredth of the time that Python and PyTorch take to start anew. It is safe because this process
computes nothing itself: forks find no thread and no GPU in use (engine/forks.py).
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml

import distill
import train_teacher
from common import UserError, write_atomically
from comparing.planned import PLACES, PlannedRun
from comparing.records import describe, recorded
from engine.config import NOT_COMPUTED
from engine.distributed import run_script
from engine.forks import Fork

MAINS = {"train_teacher.py": train_teacher.main, "distill.py": distill.main}
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Places:
    """Where a comparison's run folders and records are, and whether the user sees what runs print."""

    runs: Path
    records: Path
    verbose: bool = False


@dataclass(frozen=True)
class Slot:
    """What one run at a time has for itself: cores, or a GPU."""

    cores: frozenset[int]
    gpu: str | None = None


@dataclass
class Outcome:
    """What came of a plan's runs: names made, reasons of failures by name, names left, and whether by Ctrl-C."""

    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False


def slots(jobs: int) -> list[Slot]:
    """One for each GPU; where there is none, `jobs` that share the cores. Raises UserError for more than cores."""
    cores = sorted(os.sched_getaffinity(0))
    if count := torch.cuda.device_count():
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return [Slot(frozenset(cores), name) for name in (named or map(str, range(count)))]
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs {jobs}: must be between 1 and the {len(cores)} cores")
    return [Slot(frozenset(cores[number::jobs])) for number in range(jobs)]


def work_list(runs: Sequence[PlannedRun], places: Places) -> list[PlannedRun]:
    """The runs to be made: those without a record and, before them, those that they read and whose folders are gone."""
    found: dict[str, PlannedRun] = {}

    def add(run: PlannedRun) -> None:
        if not finished(run, places.runs):
            for each in run.needs:
                if not finished(each, places.runs):
                    add(each)
        found.setdefault(run.name, run)

    for run in runs:
        if recorded(run, places.records) is None:
            add(run)
    return list(found.values())


def finished(run: PlannedRun, runs: Path) -> bool:
    """Whether its folder below `runs` is."""
    return (runs / run.folder / "summary.json").is_file()


def execute(
    runs: Sequence[PlannedRun],
    places: Places,
    slots: Sequence[Slot],
    deadline: float,
    tell: Callable[[PlannedRun, str | None], None],
) -> Outcome:
    """Make runs, each when what it reads is there.

    Args:
        runs: in an order in which they could be made.
        places: where.
        slots: as many runs go on at a time.
        deadline: by time.monotonic(); runs under way are stopped then, and save themselves.
        tell: called with every run that has ended and the reason if it failed.
    """
    outcome, left, running = Outcome(), list(runs), {}
    try:
        while left or running:
            for slot in [each for each in slots if each not in running]:
                if (run := _next(left, [run for run, _ in running.values()], outcome, tell)) is not None:
                    left.remove(run)
                    running[slot] = run, _start(run, places, slot)
            for slot, (run, fork) in list(running.items()):
                if (code := fork.poll()) is not None:
                    del running[slot]
                    _settle(run, code, places, outcome, tell)
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        for _, fork in running.values():
            fork.send_signal(signal.SIGTERM)
        for run, fork in running.values():
            fork.wait()
            left.insert(0, run)
        outcome.left = [run.name for run in left]
    return outcome


def _next(left: list[PlannedRun], running: list[PlannedRun], outcome: Outcome, tell: Callable) -> PlannedRun | None:
    """The first run that need not wait for another; those that wait for one that failed have failed."""
    for run in list(left):
        if lost := next((each.name for each in run.needs if each.name in outcome.failed), None):
            left.remove(run)
            outcome.failed[run.name] = f"needs {lost}, which failed"
            tell(run, outcome.failed[run.name])
            continue
        before = [*running, *left[: left.index(run)]]
        awaited = {run.key, *(each.key for each in run.needs)}
        if not any(each.key in awaited for each in before):
            return run
    return None


def _settle(run: PlannedRun, code: int, places: Places, outcome: Outcome, tell: Callable) -> None:
    if code == 0:
        outcome.made.append(run.name)
        tell(run, None)
        return
    log = log_of(run, places.runs)
    said = log.read_text().strip().splitlines()[-1:] if log.is_file() and not places.verbose else []
    outcome.failed[run.name] = f"exit code {code}{': ' if said else ''}{''.join(said)}"
    tell(run, outcome.failed[run.name])


def log_of(run: PlannedRun, runs: Path) -> Path:
    """What the run has printed, where the user did not see it."""
    return runs / f"{run.folder}.log"


def _start(run: PlannedRun, places: Places, slot: Slot) -> Fork:
    places.runs.mkdir(parents=True, exist_ok=True)
    log = log_of(run, places.runs)
    output = None if places.verbose else (log, log)
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu else {})
    return Fork(partial(_make, run, places), output, environment, set(slot.cores), dies_with=signal.SIGTERM)


def _make(run: PlannedRun, places: Places) -> None:
    """In a fork: train the run unless its folder is finished, and write its record."""
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
        if recorded(run, places.records) is None:
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
        known = type(value) in (bool, int, float, str) and name not in NOT_COMPUTED | PLACES | {"seed"}
        if known and there.get(name, value) != value:
            raise UserError(
                f"{folder}: was made with {name} {there[name]}, not {value}; move it away, or choose another --runs"
            )
