"""The folder of a fleet: what it was begun with, and that nobody else writes to it."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

import yaml

from common import UserError, read_text, write_atomically
from search import remove_earlier

OPTIONS, RESULT, PAGE, LOCK = "fleet.yaml", "fleet.json", "report.html", ".lock"
SEARCH, STUDENTS, GONE = "search", "students", ".students.tmp"
OURS = {OPTIONS, RESULT, PAGE, LOCK, SEARCH, STUDENTS}
ANEW = "choose another folder, or --overwrite replaces it"


def check_folder(folder: Path, teacher: Path) -> None:
    """Raise UserError for a folder that is not a fleet's to write, or holds the teacher."""
    if os.path.realpath(folder) in (found := os.path.realpath(teacher), *map(str, Path(found).parents)):
        raise UserError(f"--output_dir {folder}: holds --teacher {teacher}, which is read")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file")
    names = {name for name in os.listdir(folder) if not name.endswith(".tmp")} if folder.is_dir() else set()
    if names - OURS or (names - {LOCK} and OPTIONS not in names):
        raise UserError(f"--output_dir {folder}: holds files that are no fleet's; choose another folder")


def begin(folder: Path, options: dict, overwrite: bool) -> IO:
    """Claim the folder, and go on with the fleet there or, where it may be replaced or has found nothing yet, anew.

    Returns:
        The lock: the folder is claimed until it is closed.

    Raises:
        UserError: another process has it, or its fleet was made with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "a")  # noqa: SIM115 - held by the caller
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: another fleet is written to it now") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise
    shutil.rmtree(folder / GONE, ignore_errors=True)  # left by a kill
    if overwrite:
        _remove(folder)
    elif (folder / SEARCH / "search.json").is_file():
        _check_same(folder, options)
    write_atomically(folder / OPTIONS, yaml.safe_dump(options, sort_keys=False))
    return lock


def _remove(folder: Path) -> None:
    """Remove a fleet but for the latencies that were measured: killed in here it leaves no student without its search,
    which another fleet would take for its own, and none of which a part is missing."""
    for name in (RESULT, PAGE):
        (folder / name).unlink(missing_ok=True)
    if (folder / STUDENTS).is_dir():
        (folder / STUDENTS).rename(folder / GONE)
        shutil.rmtree(folder / GONE)
    remove_earlier(folder / SEARCH)


def _check_same(folder: Path, options: dict) -> None:
    try:
        before = yaml.safe_load(read_text(folder / OPTIONS))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"--output_dir {folder}: its {OPTIONS} cannot be read; {ANEW}")
    for name in {**options, **before}:
        if (now := options.get(name)) != (then := before.get(name)):
            raise UserError(f"--output_dir {folder}: was made with {name} {then}, not {now}; {ANEW}")
