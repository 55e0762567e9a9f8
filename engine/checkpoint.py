"""The complete state of a run in one safetensors file: tensors, and JSON in the file's metadata.

One file, so that replacing it is atomic; no pickle, so that loading it runs nothing. Generators have no
state worth saving: whatever is drawn is a function of the run's seed and of the position stored here.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from common import UserError, write_atomically

LOCAL = "local_buffers"


@dataclass
class Progress:
    """Where a run is.

    epoch, batch: the next batch to train on; iteration: batches trained on so far, gate batches included.
    best: top-1 in percent and epoch chosen so far. history: rows of metrics.jsonl. seconds: of training.
    partial: sums of the epoch under way, where a run was stopped inside one. trackers: by what each knows the run.
    """

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    best: dict = field(default_factory=lambda: {"top1": -1.0, "epoch": -1})
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    partial: dict = field(default_factory=dict)
    trackers: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for values that no run writes."""
        numbers = (self.epoch, self.batch, self.iteration)
        if any(type(number) is not int or not 0 <= number < 2**53 for number in numbers):
            raise ValueError(f"its place is epoch {self.epoch}, batch {self.batch}, iteration {self.iteration}")
        if not isinstance(self.history, list) or not all(_is_row(row) for row in self.history):
            raise ValueError("its history is no list of rows")
        if len({str(_names(row | {"losses": {}})) for row in self.history if row["accuracy"]}) > 1:
            raise ValueError("the rows of its history differ in what they tell")
        if len(self.history) != self.epoch:
            raise ValueError(f"its history has {len(self.history)} rows after {self.epoch} epochs")
        best = self.best if isinstance(self.best, dict) else {}
        if not (_is_number(best.get("top1")) and type(best.get("epoch")) is int):
            raise ValueError("it has no best epoch")
        if not _is_number(self.seconds) or not _is_partial(self.partial):
            raise ValueError("its times or sums are no numbers")
        if not isinstance(self.trackers, dict) or any(type(each) is not str for each in self.trackers.values()):
            raise ValueError("its trackers have no names")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63  # nan is not


def _is_row(row: object) -> bool:
    """Whether all of a history's row is numbers, by name and in mappings, the loop's own among them."""
    names = ("epoch", "lr", "images", "images_per_second", "seconds")
    if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in names):
        return False
    return all(isinstance(row.get(name), dict) for name in ("losses", "accuracy")) and _is_numbers(row)


def _is_partial(value: object) -> bool:
    """Whether it is what Totals.as_dict gives, or nothing."""
    sums = value.get("sums", {}) if isinstance(value, dict) else None
    pairs = sums.values() if isinstance(sums, dict) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs):
        return False
    return all(_is_number(value.get(name, 0)) for name in ("images", "seconds"))


def _is_numbers(value: object) -> bool:
    return all(map(_is_numbers, value.values())) if isinstance(value, dict) else _is_number(value)


def _names(value: object) -> object:
    """The names in nested mappings."""
    return {name: _names(value[name]) for name in sorted(value)} if isinstance(value, dict) else None


def save_checkpoint(
    path: Path,
    objective: nn.Module,
    optimizers: Mapping[str, Optimizer],
    others: Mapping[str, object],
    progress: Progress,
    config: Mapping,
    fingerprints: Mapping[str, str] | None = None,
    local_buffers: Tensor | None = None,
) -> None:
    """Write everything a run needs to go on, atomically.

    `others` are things with a JSON-ready state_dict: schedulers, a gradient scaler. `local_buffers` [processes, n] are
    what each process has of its own (BatchNorm statistics within an epoch).
    """
    tensors = {f"objective/{name}": tensor for name, tensor in state_tensors(objective).items()}
    if local_buffers is not None:
        tensors[LOCAL] = local_buffers
    groups = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        groups[name] = state["param_groups"]
        for index, values in state["state"].items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    state = {
        "progress": asdict(progress),
        "config": dict(config),
        "fingerprints": dict(fingerprints or {}),
        "param_groups": groups,
        "others": {name: other.state_dict() for name, other in others.items()},
    }
    document = json.dumps(state, default=Tensor.item)  # LAMB counts its steps in a tensor of the group
    metadata = {"state": document, "sha256": _digest(tensors, document)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_checkpoint(
    path: Path,
    objective: nn.Module,
    optimizers: Mapping[str, Optimizer],
    others: Mapping[str, object],
    config: Mapping,
    free: set[str],
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[Progress, Tensor | None]:
    """Restore what `save_checkpoint` wrote, in place, and return where the run was, and its local buffers if any.

    Args:
        config: that of the run to be resumed; it must equal the checkpoint's but for the keys in `free`.
        fingerprints: of what the run is made from, by name; they must be the checkpoint's.

    Raises:
        UserError: no such file, a damaged file or one of another kind, or a configuration that differs (the
            field is named). Nothing is changed then.
    """
    if not path.is_file():
        raise UserError(f"--resume_from_checkpoint: there is no checkpoint '{path}'")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        document = metadata["state"]
        if metadata["sha256"] != _digest(tensors, document):
            raise UserError(f"--resume_from_checkpoint: '{path}' is damaged: its checksum does not fit")
        state = json.loads(document)
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"--resume_from_checkpoint: '{path}' cannot be loaded as a checkpoint ({reason})") from None
    try:
        _check_config(state["config"], config, free)
        _check_fingerprints(state["fingerprints"], fingerprints or {})
        progress = Progress(**state["progress"])
        progress.check()
        _check_optimizers(optimizers, tensors, state["param_groups"])
        if others.keys() != state["others"].keys():
            raise UserError("--resume_from_checkpoint: the checkpoint was made with another --mixed_precision")
        _restore(objective, _under(tensors, "objective"))
        for name, optimizer in optimizers.items():
            values = _optimizer_state(tensors, name)
            optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"][name]})
        for name, other in others.items():
            other.load_state_dict(state["others"][name])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--resume_from_checkpoint: '{path}' is no checkpoint of this run ({error})") from None
    return progress, tensors.get(LOCAL)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically and without a second copy of the bytes where the
    file system can link."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state themselves, by name; what two modules share appears once."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


@torch.no_grad()
def _restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = state_tensors(module)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise UserError("--resume_from_checkpoint: the checkpoint's networks are not those of this run")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _optimizer_state(tensors: Mapping[str, Tensor], name: str) -> dict[int, dict[str, Tensor]]:
    """An optimiser's state by the number of the parameter, as `save_checkpoint` stored it."""
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _under(tensors, f"optimizer/{name}").items():
        index, _, what = key.partition("/")
        values.setdefault(int(index), {})[what] = tensor
    return values


def _check_optimizers(optimizers: Mapping[str, Optimizer], tensors: Mapping[str, Tensor], groups: Mapping) -> None:
    """Raise ValueError unless the saved states fit the optimisers: nothing has been changed yet."""
    if groups.keys() != optimizers.keys():
        raise ValueError(f"it has the optimisers {', '.join(groups)}")
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in _optimizer_state(tensors, name).items():
            shapes = {tuple(tensor.shape) for tensor in values.values()} - {()}
            if not 0 <= index < len(parameters) or shapes - {tuple(parameters[index].shape)}:
                raise ValueError(f"the state of the optimiser '{name}' does not fit parameter {index}")


def _check_fingerprints(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise UserError(f"--resume_from_checkpoint: {name} has changed: now {value}, before {saved.get(name)}")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + "/")}


def _check_config(saved: Mapping, now: Mapping, free: set[str]) -> None:
    for key in sorted((saved.keys() | now.keys()) - free):
        if saved.get(key) != now.get(key):
            before, after = saved.get(key), now.get(key)
            raise UserError(f"--resume_from_checkpoint: --{key} is {after}, but the checkpoint was made with {before}")


def _digest(tensors: Mapping[str, Tensor], document: str) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(str((tensors[name].dtype, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
