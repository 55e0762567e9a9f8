"""The order of a matrix's runs: each when what it reads is there; what needs a run that failed fails with it.

Where runs go on, and how many at a time, is an executor's affair: comparing/local.py, ray_cluster.py or slurm.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from comparing.places import Places, log_of
from comparing.planned import PlannedRun


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it waits or runs."""

    def stop(self) -> None:
        """Ask it to save itself and to end."""

    def wait(self) -> int:
        """Its exit status, once it has ended."""


class Executor(Protocol):
    """Makes runs, each in a process of its own.

    Attributes:
        pause: seconds between two looks at its jobs.
    """

    pause: float

    def room(self) -> bool:
        """Whether it takes another run now."""

    def start(self, run: PlannedRun, places: Places) -> Job: ...


@dataclass
class Outcome:
    """What came of a plan's runs: names made, reasons of failures by name, names left, and whether by Ctrl-C."""

    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False


def execute(
    runs: Sequence[PlannedRun],
    places: Places,
    executor: Executor,
    deadline: float,
    tell: Callable[[PlannedRun, str | None], None],
) -> Outcome:
    """Make runs, each when what it reads is there.

    Args:
        runs: in an order in which they could be made.
        places: where.
        executor: by what.
        deadline: by time.monotonic(); runs under way are stopped then, and save themselves.
        tell: called with every run that has ended and the reason if it failed.
    """
    places.runs.mkdir(parents=True, exist_ok=True)
    outcome, left, running = Outcome(), list(runs), []
    try:
        while left or running:
            while executor.room() and (run := _next(left, [run for run, _ in running], outcome, tell)):
                left.remove(run)
                running.append((run, executor.start(run, places)))
            for run, job in list(running):
                if (code := job.poll()) is not None:
                    running.remove((run, job))
                    _settle(run, code, places, outcome, tell)
            if time.monotonic() > deadline:
                break
            time.sleep(executor.pause)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        for _, job in running:
            job.stop()
        for run, job in running:
            job.wait()
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
