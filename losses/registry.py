"""Knowledge-distillation losses: one row in `METHODS` for each."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache

from common import UserError, check_name, own_module
from losses.contrastive import CRD
from losses.features import AB, AT, FT, NST, OH, VID, FitNets
from losses.logits import DKD, KD, RCO, SCKD, CrossEntropy
from losses.method import Method
from losses.options import LabelOptions, PeersOptions, TeacherOptions, TemperatureOptions, WarmupOptions
from losses.peers import DML, KDCL, KDCLGeneral, KDCLLinear, KDCLMinLogit
from losses.relations import CC, PKT, RKD, SP
from losses.review import ReviewKD
from losses.self_supervised import HSAKD, SSKD

METHODS: dict[str, type[Method]] = {
    "kd": KD,
    "none": CrossEntropy,
    "fitnets": FitNets,
    "at": AT,
    "sp": SP,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "ab": AB,
    "ft": FT,
    "crd": CRD,
    "sskd": SSKD,
    "oh": OH,
    "cc": CC,
    "nst": NST,
    "dkd": DKD,
    "sckd": SCKD,
    "reviewkd": ReviewKD,
    "hsakd": HSAKD,
    "rco": RCO,
    "dml": DML,
    "kdcl": KDCL,
    "kdcl_linear": KDCLLinear,
    "kdcl_minlogit": KDCLMinLogit,
    "kdcl_general": KDCLGeneral,
}


def find_methods(names: str) -> list[type[Method]]:
    """The classes of "NAME", "NAME+NAME" or "FILE.py:CLASS", which may be joined as well.

    Raises:
        UserError: an unknown name, one twice, `none` beside others, or a file without such a class.
    """
    parts = names.split("+")
    found = [_own_method(part) if ".py:" in part else METHODS[check_name("--method", part, METHODS)] for part in parts]
    if len(set(found)) < len(found) or (len(found) > 1 and not all(method.needs_teacher for method in found)):
        raise UserError(f"--method {names}: joins different methods, and those without a teacher stand alone")
    return found


def options_of(methods: Sequence[type[Method]], kd_weight: float | None = None) -> tuple[type, ...]:
    """The dataclasses of the options that methods read together; `kd_weight` is the one of the T^2 KL beside them."""
    found: list[type | None] = []
    for method in methods:
        joined = len(methods) > 1 and method.joined_options is not None
        found += [method.joined_options if joined else method.options]
        found += [WarmupOptions if method.warmup_epochs else None]
        found += [TemperatureOptions if method.needs_teacher and (kd_weight or method.kd_weight) else None]
        found += [TeacherOptions if method.needs_teacher else PeersOptions if method.peers else LabelOptions]
    return tuple(dict.fromkeys(each for each in found if each is not None))


@cache
def _own_method(place: str) -> type[Method]:
    """The class in a file of the user's, which is executed."""
    path, _, name = place.rpartition(":")
    found = getattr(own_module(path, f"--method {place}"), name, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"--method {place}: defines no class {name} that extends losses.method.Method")
    if found.forward is Method.forward:
        raise UserError(f"--method {place}: {name} has no forward(student, teacher, batch), which computes its terms")
    for options in (found.options, found.joined_options):
        if options is not None and not (isinstance(options, type) and is_dataclass(options)):
            raise UserError(f"--method {place}: {name}.options must be a dataclass")
    return found


def needs_of(method: type[Method]) -> str:
    """The networks' outputs that a method compares, for the table."""
    if not method.needs_teacher:
        return "peers' logits" if method.peers else "labels"
    words = {"": "logits", "embedding": "embedding", "maps": "maps", "preact": "pre-activations"}
    kinds = dict.fromkeys(words[each] for each in (method.student_features, method.teacher_features))
    return ", ".join(kinds) + (", 4 rotations" if method.rotations else "")


def describe_methods(markdown: bool = False) -> list[str]:
    """The table of the methods, header first, its columns aligned; or as Markdown, for the README."""
    rows = [("--method", "weight", "works on", "warm-up", "source")]
    for name, method in METHODS.items():
        warmup = f"{method.warmup_epochs} epochs" if method.warmup_epochs else ""
        rows.append((name, method.usual, needs_of(method), warmup, method.paper))
    if markdown:
        rows = [rows[0], ("---",) * len(rows[0]), *((f"`{name}`", *rest) for name, *rest in rows[1:])]
        return [f"| {' | '.join(row)} |" for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
