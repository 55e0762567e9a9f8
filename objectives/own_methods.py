"""Methods of the user's own (--method FILE.py:CLASS): what is wrong in them is said as theirs, with file and line."""

import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from common import OWN, UserError
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
        raise _theirs(method, error) from None


@contextmanager
def run_with(methods: Sequence[type[Method]]) -> Iterator[None]:
    """Within it, what is raised in a file of the user's own methods becomes a UserError: of `after_step`, say, or of an
    autograd function in the backward pass, which nobody calls by name."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        for method in filter(_is_own, methods):
            if _line(method, error):
                raise _theirs(method, error) from None
        raise


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


def _theirs(method: type[Method], error: BaseException) -> UserError:
    line, said = _line(method, error), (str(error).splitlines() or [""])[0]
    where = f"{_file(method)}:{method.__name__}: fails{f', line {line}' if line else ''}"
    return UserError(f"--method {where}: {type(error).__name__}: {said}")


def _line(method: type[Method], error: BaseException) -> int | None:
    """The innermost line of the method's file that an error went through."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame.lineno for frame in frames if frame.filename == _file(method)), None)


def _file(method: type[Method]) -> str:
    return sys.modules[method.__module__].__file__


def _is_own(method: type[Method]) -> bool:
    return method.__module__.startswith(OWN)
