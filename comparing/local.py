"""Runs on this machine: each in a fork of one process that has imported all it needs, several at a time where asked.

A fork starts in a hundredth of the time that Python and PyTorch take to start anew. It is safe because this process
computes nothing itself: forks find no thread and no GPU in use (engine/forks.py).
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from common import UserError
from comparing.making import make
from comparing.places import Places, log_of
from comparing.planned import PlannedRun
from engine.forks import Fork


@dataclass(frozen=True)
class Slot:
    """What one run at a time has for itself: cores, or a GPU."""

    cores: frozenset[int]
    gpu: str | None = None


def slots(jobs: int) -> list[Slot]:
    """One for each GPU; where there is none, `jobs` that share the cores. Raises UserError for more than cores."""
    cores = sorted(os.sched_getaffinity(0))
    if count := torch.cuda.device_count():
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return [Slot(frozenset(cores), name) for name in (named or map(str, range(count)))]
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs {jobs}: must be between 1 and the {len(cores)} cores")
    return [Slot(frozenset(cores[number::jobs])) for number in range(jobs)]


class Forks:
    """The executor of this machine: a fork a run, one at a time in each slot."""

    pause = 0.02

    def __init__(self, slots: Sequence[Slot]):
        self.jobs: dict[Slot, ForkedRun | None] = dict.fromkeys(slots)

    def room(self) -> bool:
        return any(job is None or job.poll() is not None for job in self.jobs.values())

    def start(self, run: PlannedRun, places: Places) -> "ForkedRun":
        slot = next(slot for slot, job in self.jobs.items() if job is None or job.poll() is not None)
        self.jobs[slot] = ForkedRun(run, places, slot)
        return self.jobs[slot]


class ForkedRun(Fork):
    """A run in a fork that has a slot for itself."""

    def __init__(self, run: PlannedRun, places: Places, slot: Slot):
        log = log_of(run, places.runs)
        output = None if places.verbose else (log, log)
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu else {})
        super().__init__(partial(make, run, places), output, environment, set(slot.cores), dies_with=signal.SIGTERM)

    def stop(self) -> None:
        """Have it save itself and end."""
        self.send_signal(signal.SIGTERM)
