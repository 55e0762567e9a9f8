"""The launches of the Triton kernels without a GPU: recorded, and compiled for a GPU that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Launch = tuple[triton.JITFunction, dict]  # a kernel, and its arguments by name
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it nothing is launched: the list says what would have been."""
    launches, run = [], triton.JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


def specialisation(launch: Launch) -> tuple[dict, dict, dict, dict]:
    """(types, constants, divisibilities, options) that Triton compiles a launch for; one of equal ones is compiled."""
    kernel, arguments = launch[0], dict(launch[1])
    signature, constants, attributes = {}, {}, {}
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.is_constexpr
        signature[parameter.name] = (
            "constexpr" if fixed else _describe(value, (place,), attributes, parameter.do_not_specialize)
        )
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, tuple):
            constants |= {(place, i): None for i, each in enumerate(value) if each is None}
    return signature, constants, attributes, options


def compile_launch(launch: Launch, arch: int):
    """Triton's compiled kernel for compute capability `arch` / 10; its `asm` has "ptx" and "cubin"."""
    signature, constants, attributes, options = specialisation(launch)
    source = ASTSource(launch[0], signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _describe(value, path: tuple, attributes: dict, varies: bool):
    """A launch argument's type in a signature; pointers and integers that 16 divides are noted, as at run time."""
    if isinstance(value, tuple):
        return tuple(_describe(each, (*path, i), attributes, varies) for i, each in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not varies):
        return "constexpr"
    if value % 16 == 0 and not varies:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"
