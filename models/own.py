"""Networks of the user's own, FILE.py:FUNCTION, and which of their files may be executed."""

import inspect
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from common import UserError, own_module

TRUSTED = "TRUSTED_CODE"  # environment variable: files that a model.json may have executed, separated as in PATH
_named: set[Path] = set()


def is_own(name: str) -> bool:
    """Whether a network's name is FILE.py:FUNCTION."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def trust(names: Iterable[str | None]) -> None:
    """Networks that the user names: their files may be executed."""
    _named.update(_file(name) for name in names if name and is_own(name))


def check_trusted(name: str) -> None:
    """Raise UserError for a network of a model.json whose file nobody has named in this process or in TRUSTED_CODE."""
    trusted = {Path(each).resolve() for each in os.environ.get(TRUSTED, "").split(os.pathsep) if each}
    if _file(name) not in _named | trusted:
        path = name.rpartition(":")[0]
        raise UserError(f"is made by code in '{path}'; if it is yours, set {TRUSTED}={path} to have it executed")


def build_own(name: str, num_classes: int, image_size: int, argument: str) -> nn.Module:
    """What the function gives, called with `num_classes` and `image_size` as far as it takes them. It is executed.

    Raises:
        UserError: no such file or function, one that fails, or that gives no module.
    """
    path, _, function = name.rpartition(":")
    build = getattr(own_module(path, f"{argument} {name}"), function, None)
    if not callable(build):
        raise UserError(f"{argument} {name}: defines no function {function}")
    try:
        takes = inspect.signature(build).parameters.values()
        everything = any(each.kind is each.VAR_KEYWORD for each in takes)
        facts = {"num_classes": num_classes, "image_size": image_size}
        found = build(**{each: facts[each] for each in facts if everything or each in {one.name for one in takes}})
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{argument} {name}: fails{where}: {reason}") from None
    if not isinstance(found, nn.Module):
        raise UserError(f"{argument} {name}: gives {type(found).__name__} instead of a torch.nn.Module")
    return found


def _file(name: str) -> Path:
    return Path(name.rpartition(":")[0]).resolve()
