"""Which implementation an operation runs: its Triton kernels or its plain PyTorch reference."""

import functools
import importlib.util
import os
from contextlib import nullcontext

import torch
from torch import Tensor

CHOICES = ("auto", "triton", "reference")
TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)

_choice = "auto"


def use(choice: str, device: torch.device | str) -> str:
    """Set the implementation for this process; return which one will run on `device`, and why.

    Args:
        choice: "triton", "reference", or "auto": Triton wherever it runs, the reference elsewhere. float64
            tensors always go to the reference, since the kernels compute in float32.
        device: where the tensors will be.

    Raises:
        ValueError: an unknown choice, or "triton" where it cannot run.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}; got {choice!r}")
    obstacle = _obstacle(torch.device(device))
    if choice == "triton" and obstacle:
        raise ValueError(f"the Triton kernels cannot run: {obstacle}; 'auto' takes the reference instead")
    _choice = choice
    if choice == "reference":
        return "reference, as asked"
    return f"reference: {obstacle}" if obstacle or not _wanted(torch.device(device)) else "triton"


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the Triton kernels.

    Raises:
        ValueError: the choice is "triton", and they cannot.
    """
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    return _runs_triton(_choice, next(tensor.device for tensor in tensors if tensor is not None), frozenset(types))


@functools.lru_cache(maxsize=256)
def _runs_triton(choice: str, device: torch.device, types: frozenset[torch.dtype]) -> bool:
    if choice == "reference" or torch.float64 in types or not (choice == "triton" or device.type == "cuda"):
        return False
    obstacle = _obstacle(device)
    if obstacle is None and not types <= set(TRITON_TYPES):
        obstacle = f"no kernel for {types - set(TRITON_TYPES)}"
    if obstacle is None and torch.bfloat16 in types and device.type == "cuda" and _capability(device) < (8, 0):
        obstacle = "this GPU has no bfloat16: use float16"
    if obstacle and choice == "triton":
        raise ValueError(f"the Triton kernels cannot run: {obstacle}")
    return obstacle is None


def recorded(tensor: Tensor) -> bool:
    """Whether a graph is being recorded, by torch.compile or a tracer, that has to see operators.

    Otherwise the kernels are called around the operators: PyTorch's handling of operators written in Python
    takes longer than the kernels themselves.
    """
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def refuse_second_derivative(ctx, *grads):
    """The backward pass of a backward pass.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("the gradients of losses and gated_mix cannot be differentiated a second time")


class Final(torch.autograd.Function):
    """The first `count` of `tensors`, gradients that depend on the others: differentiating them raises RuntimeError."""

    backward = staticmethod(refuse_second_derivative)

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None):
        return tensors[:count]


def on_device_of(tensor: Tensor):
    """A context in which Triton, which launches on the current GPU, launches on the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _wanted(device: torch.device) -> bool:
    # The interpreter, which runs the kernels on a CPU, is far too slow to be anyone's default.
    return _choice == "triton" or device.type == "cuda"


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if not _installed():
        return "triton is not installed"
    if device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "no GPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device.type} is no NVIDIA GPU"
    if _capability(device) < (7, 0):
        return f"compute capability {'.'.join(map(str, _capability(device)))} is below 7.0"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
