"""Methods of the user's own (--method FILE.py:CLASS): what is wrong in them is said as theirs, with file and line."""

import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from common import UserError
from losses.method import Method


@contextmanager
def as_theirs(method: type[Method]) -> Iterator[None]:
    """Within it, what the code of a method of the user's own raises becomes a UserError."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if not _is_own(method):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        path = sys.modules[method.__module__].__file__
        line = next((f", line {frame.lineno}" for frame in reversed(frames) if frame.filename == path), "")
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"--method {path}:{method.__name__}: fails{line}: {type(error).__name__}: {said}") from None


def check_weights(method: Method) -> None:
    """Raise UserError unless the method's terms have finite numbers as weights."""
    for name, terms in (("terms", method.terms), ("warmup_terms", method.warmup_terms)):
        if not isinstance(terms, Mapping) or any(
            not isinstance(weight, (int, float)) or not math.isfinite(weight) for weight in terms.values()
        ):
            raise UserError(f"--method {type(method).__name__}: its `{name}` are no names with a number each: {terms}")
    if not (method.terms or method.warmup_terms):
        raise UserError(f"--method {type(method).__name__}: has no `terms`, the names of its losses and their weights")


def check_terms(method: Method, terms: dict[str, Tensor], names: Mapping[str, float]) -> dict[str, Tensor]:
    """The terms that a method of the user's own gave, if they are what they must be: scalars by its `names`."""
    if not _is_own(type(method)):
        return terms
    if not isinstance(terms, dict) or terms.keys() != names.keys():
        given = ", ".join(map(str, terms)) if isinstance(terms, dict) else type(terms).__name__
        raise UserError(f"--method {type(method).__name__}: gives {given or 'nothing'} instead of {', '.join(names)}")
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim or not term.is_floating_point():
            what = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise UserError(f"--method {type(method).__name__}: its term '{name}' is {what}, no scalar tensor")
    return terms


def _is_own(method: type[Method]) -> bool:
    return method.__module__.startswith("method_")  # losses.registry names their modules so
