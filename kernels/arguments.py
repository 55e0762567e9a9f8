"""Numbers that the operations are given: one type for every implementation, or an error that names the argument."""

import numbers


def number(name: str, value) -> float:
    """A real number as float.

    Raises:
        ValueError: a tensor, which would look as if it could be trained, a bool, or no number at all.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number; got {_described(value)}")
    return float(value)


def whole_number(name: str, value) -> int:
    """A whole number as int; ValueError as in `number`."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number; got {_described(value)}")
    return int(value)


def _described(value) -> str:
    kind = type(value).__name__
    return f"a {kind}, give its .item()" if hasattr(value, "item") else f"{value!r} ({kind})"
