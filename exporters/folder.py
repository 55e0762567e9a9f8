"""The folder of an export: whose it is, where it is made, and how it takes its place."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import UserError, check_writable, lock
from exporters.hub import OURS

WRITTEN = {*OURS, "export.json", "README.md", "model.safetensors", "model.json"}
NEW, OLD, LOCK = "export", "old", ".lock"  # of a workplace


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for a folder that is not export.py's to write."""
    if target.is_dir() and any(target.iterdir()):
        if not (target / "export.json").is_file():
            raise UserError(f"--output_dir {target}: holds files that are no export's; choose another folder")
        if not overwrite:
            raise UserError(f"--output_dir {target}: holds an export; --overwrite replaces it")
        if others := {each.name for each in target.iterdir()} - WRITTEN:
            raise UserError(
                f"--output_dir {target}: holds {min(others)}, which is no export's and --overwrite would remove; move "
                "it away, or choose another folder"
            )
    elif target.exists() and not target.is_dir():
        raise UserError(f"--output_dir {target}: is a file")
    check_writable("--output_dir", target)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, gone in the end. Those that killed exports have left there are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for each in target.parent.iterdir():
        if re.fullmatch(re.escape(f".{target.name}-") + r"\w{8}", each.name):
            _remove_leftover(each, target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as place:
        with suppress(OSError):  # on a file system without locks, where nobody removes what is left
            held = lock(Path(place, LOCK))  # noqa: F841 - until this returns
        folder = Path(place, NEW)
        folder.mkdir()
        yield folder


def replace_folder(source: Path, target: Path) -> None:
    """Put a workplace's finished folder where `target` is; an earlier one is gone only when the new one is there."""
    if target.is_dir():
        old = source.parent / OLD
        os.rename(target, old)
        os.rename(source, target)
        shutil.rmtree(old)
    else:
        os.rename(source, target)


def _remove_leftover(place: Path, target: Path) -> None:
    """Remove a workplace of `target` that nobody works in. What was there before it and not yet replaced goes back."""
    if not (place / LOCK).is_file() or {each.name for each in place.iterdir()} - {NEW, OLD, LOCK}:
        return
    with suppress(OSError), lock(place / LOCK):  # somebody has it, or nobody can tell
        if (place / OLD).is_dir() and not target.exists():
            os.rename(place / OLD, target)
        shutil.rmtree(place)
