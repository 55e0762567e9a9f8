"""A planned run as text, for a process on another machine."""

import json
from dataclasses import asdict
from pathlib import Path

from comparing.elsewhere import Task
from comparing.places import Places, log_of
from comparing.planned import PlannedRun


def task_of(run: PlannedRun, places: Places) -> Task:
    """What a job of a cluster is told."""
    records = str(places.records.resolve()) if places.records else None
    content = {"run": asdict(run), "runs": str(places.runs.resolve()), "records": records}
    return Task(json.dumps(content), str(log_of(run, places.runs)), str(Path.cwd()))


def read_task(text: str) -> tuple[PlannedRun, Places]:
    """The run of a task's text, and where it is made."""
    content = json.loads(text)
    records = Path(content["records"]) if content["records"] else None
    return _run(content["run"]), Places(Path(content["runs"]), records)


def _run(content: dict) -> PlannedRun:
    needs = {name: _run(content[name]) for name in ("teacher", "weights") if content[name]}
    return PlannedRun(**content | needs)


def complain(log: str, message: str) -> int:
    """Write into a run's log why its job was lost; the exit status of such a run."""
    with open(log, "a") as file:
        print(message, file=file)
    return 1
