"""The JSON spec of a student: read, and checked before a network is built from it."""

import json
from pathlib import Path

from common import UserError, check_name, read_text

# What is beyond was hardly meant, and would fill any memory: channels, side of a kernel, stride, convolutions a layer.
LIMITS = {"in": 2**14, "out": 2**14, "kernel": 63, "stride": 2**8, "depth": 1000}


def check_spec(spec: dict) -> None:
    """Raise UserError, naming the layer, unless `spec` describes a network that can be built."""
    try:
        stem, *layers, head, linear = spec["layers"]
        for index, layer in enumerate(spec["layers"]):
            _check_numbers(index, layer)
        if stem["type"] != "conv" or head["type"] != "conv" or linear["type"] != "linear" or not layers:
            raise UserError("spec: layers must be a conv, the reconfigurable layers, a conv and a linear")
        if (stem["in"], stem["kernel"]) != (3, 3) or not power_of_2(stem["stride"]):
            raise UserError("spec: the first conv takes 3 channels with kernel 3 and a stride of 1, 2, 4, ...")
        if (head["kernel"], head["stride"]) != (1, 1):
            raise UserError("spec: the last conv has kernel 1 and stride 1")
        channels = stem["out"]
        for index, layer in enumerate(layers, start=1):
            where = f"spec: layer {index} ({layer['type']})"
            check_name(f"{where}: type", layer["type"], ["res", "identity", "zero"])
            if layer["in"] != channels or layer["stride"] not in (1, 2) or layer["out"] < 1:
                raise UserError(f"{where} must take {channels} channels, with stride 1 or 2")
            same = layer["stride"] == 1 and layer["in"] == layer["out"]
            if (layer["shortcut"] and not same) or (layer["type"] == "zero" and not layer["shortcut"]):
                raise UserError(f"{where}: a shortcut needs an unchanged shape, and zero needs a shortcut")
            if layer["type"] == "res" and (layer["kernel"] % 2 == 0 or layer["depth"] % 2 or layer["depth"] < 2):
                raise UserError(f"{where} needs an odd kernel and an even depth")
            channels = layer["out"]
        if head["in"] != channels or linear["in"] != head["out"]:
            raise UserError("spec: the channels of the last conv and the linear layer do not fit")
        if (
            any(type(size) is not int for size in spec["blocks"])
            or sum(spec["blocks"]) != len(layers)
            or len(spec["blocks"]) < 2
            or min(spec["blocks"]) < 0
        ):
            raise UserError(f"spec: blocks {spec['blocks']} must sum to {len(layers)} layers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"spec: not a student's spec ({type(error).__name__}: {error})") from None


def power_of_2(number: object) -> bool:
    """Whether a stem can have this stride."""
    return type(number) is int and 0 < number <= LIMITS["stride"] and number.bit_count() == 1


def _check_numbers(index: int, layer: dict) -> None:
    for key, most in LIMITS.items():
        if key in layer and (type(layer[key]) is not int or not 1 <= layer[key] <= most):
            raise UserError(f"spec: layer {index} has {key} {layer[key]!r}; it must be a whole number from 1 to {most}")
    if type(layer.get("shortcut", False)) is not bool:
        raise UserError(f"spec: layer {index} has shortcut {layer['shortcut']!r}; it must be true or false")


def read_spec(path: Path, argument: str = "model") -> dict:
    """A spec from a JSON file: a spec itself, or a trained student's model.json, which holds one.

    Raises UserError when the file is missing or holds no spec.
    """
    try:
        spec = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{argument} {path}: cannot read the spec file ({reason})") from None
    spec = spec.get("spec", spec) if isinstance(spec, dict) else spec
    try:
        check_spec(spec)
    except UserError as error:
        raise UserError(f"{argument} {path}: {error}") from None
    return spec
