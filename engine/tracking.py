"""Experiment trackers: what they are told of a run, by way of Accelerate."""

import threading
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from engine.config import RunConfig

# How each tracker's own library calls a run's name.
RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Open the run in every tracker, with its options, where --with_tracking asks for it."""
    if not config.with_tracking:
        return
    name = config.run_name or Path(config.output_dir).name
    names = {tracker: {keyword: name} for tracker, keyword in RUN_NAME.items()}
    threading.excepthook = _except_writers
    accelerator.init_trackers(config.tracker_project_name, flat(config.as_dict()), names)


def _except_writers(failure: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's writing thread: what it could not write it raises again in the run's own."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


def flat(options: Mapping, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Options as trackers take them: plain numbers and strings, nested ones by dotted names."""
    found = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (bool, int, float)) else str(value)
    return found


def log_epoch(accelerator: Accelerator, row: dict, step: int) -> None:
    """An epoch's row of metrics.jsonl: trackers want flat plain numbers."""
    values = {f"loss/{name}": value for name, value in row["losses"].items()}
    values |= {f"accuracy/{name}": value for name, value in row["accuracy"].items()}
    values |= {name: row[name] for name in ("lr", "images_per_second")}
    accelerator.log(values, step=step)
