"""What every package needs: an error for the user, names with the nearest known ones, the user's own modules, seeds,
locks, safe writing."""

import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO
from weakref import WeakSet

OWN = "own_"  # what the names of the user's own modules begin with
MOST_TEXT = 2**26  # bytes of a recipe, spec, summary or table of metrics
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system without locks says

_locks: WeakSet = WeakSet()  # of this process; a worker that outlives it must not hold them
os.register_at_fork(after_in_child=lambda: [each.close() for each in list(_locks)])


class UserError(ValueError):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


def check_name(argument: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`; otherwise raise UserError with the nearest known names."""
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"{argument}: unknown name '{name}'; {hint}")


@cache
def own_module(path: str, argument: str) -> ModuleType:
    """A file of the user's, which is executed because `argument` names it.

    Raises:
        UserError: there is no such file, or it cannot be imported.
    """
    if not Path(path).is_file():
        raise UserError(f"{argument}: there is no file '{path}'")
    name = f"{OWN}{Path(path).stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does at its top level
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        said = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}".rstrip(": ")
        raise UserError(f"{argument}: your file cannot be imported: {path}, line {line}: {said}") from None
    return module


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, the same on every machine and in every Python version.

    Everything random in a run is drawn from a generator seeded this way by what it is for, for example
    (run seed, "paths", iteration). Hence no generator has a state that a checkpoint would have to carry,
    and every process can draw the same numbers without talking to the others.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def without_waiting(name: str, flags: int) -> int:
    """An opener for `open`: a pipe that has no other end is empty, or an OSError, instead of waited for."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_text(path: str | Path) -> str:
    """The text of a file, or of a pipe that somebody writes to: `<(...)`.

    Raises:
        OSError: it cannot be read, or goes on after 64 MB.
        UnicodeDecodeError: it is no text.
    """
    with open(path, "rb", opener=without_waiting) as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content.decode()


def read_json(path: Path, argument: str = "") -> dict:
    """The object in a JSON file. Raises UserError, naming `argument`, where there is none."""
    where = f"{argument} {path}".strip()
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds no JSON object")
    return found


def lock(path: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> IO:
    """A file, made where there is none, that is locked until it is closed or this process ends.

    Raises:
        BlockingIOError: another has it.
        OSError: it cannot be opened, or its file system has no locks (NO_LOCKS).
    """
    file = open(path, "a", opener=without_waiting)  # noqa: SIM115 - the caller's to close
    _locks.add(file)
    fcntl.flock(file, kind)
    return file


def check_writable(argument: str, path: Path) -> None:
    """Raise UserError where neither the folder of `path` nor the nearest one above that exists can be written to."""
    place = next(each for each in path.absolute().parents if each.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"{argument} {path}: '{place}' cannot be written to")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds either the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        with suppress(OSError):  # on a file system that takes no writes
            temporary.unlink(missing_ok=True)
