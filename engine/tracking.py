"""Experiment trackers: what they are told of a run, by way of Accelerate."""

import threading
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from engine.checkpoint import Progress
from engine.config import RunConfig

# How each tracker's own library calls a run's name.
RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
# By which the library finds a run again; trackio does by its name, TensorBoard by its folder.
RUN_ID = {"wandb": lambda run: run.id, "mlflow": lambda run: run.info.run_id}


def start_trackers(accelerator: Accelerator, config: RunConfig, progress: Progress) -> None:
    """Open the run in every tracker, with its options, where --with_tracking asks for it.

    A resumed run goes on with its curve: what the trackers know it by is in `progress`, and so in checkpoints.
    """
    if not config.with_tracking:
        return
    name, known = config.run_name or Path(config.output_dir).name, progress.trackers
    arguments = {tracker: {keyword: name} for tracker, keyword in RUN_NAME.items()}
    for tracker in known:
        arguments[tracker] = arguments.get(tracker, {}) | _resumed(tracker, known[tracker], progress.epoch)
    threading.excepthook = _except_writers
    accelerator.init_trackers(config.tracker_project_name, None, arguments)
    for tracker in accelerator.trackers if accelerator.is_main_process else []:
        if tracker.name not in known:
            tracker.store_init_configuration(flat(config.as_dict()))
            known[tracker.name] = RUN_ID[tracker.name](tracker.tracker) if tracker.name in RUN_ID else name


def _resumed(tracker: str, run: str, epoch: int) -> dict:
    """What a tracker's library is told so that it goes on with a run after `epoch` epochs."""
    return {
        "tensorboard": {"purge_step": epoch + 1},  # what a killed run has said since its checkpoint
        "mlflow": {"run_id": run},
        "wandb": {"id": run, "resume": "allow"},
        "trackio": {"name": run, "resume": "allow"},
    }.get(tracker, {})


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
