"""Where a comparison's runs are, and which of them are still to be made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparing.planned import PlannedRun
from comparing.records import recorded


@dataclass(frozen=True)
class Places:
    """Where run folders are, and their records if any are wanted, and whether the user sees what runs print."""

    runs: Path
    records: Path | None
    verbose: bool = False


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


def log_of(run: PlannedRun, runs: Path) -> Path:
    """What the run has printed, where the user did not see it."""
    return runs / f"{run.folder}.log"
