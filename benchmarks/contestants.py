"""What benchmarks/kernels.py compares: the kernels, eager PyTorch, torch.compile and Liger-Kernel, on these cases.

A contestant makes a step, from a case and its inputs, that returns losses and gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

TEMPERATURE = 4.0
SIZES, CLASSES, STUDENTS = (64, 128, 256, 1024, 8192), (10, 100, 200, 1000, 32000), (1, 3)
COMPILED = {(256, 100), (256, 1000), (8192, 100), (8192, 1000), (8192, 32000)}  # (N, C): every shape takes seconds
TARGETS = [(8192, 1000), (8192, 32000), (64, 100), (128, 100), (256, 100)]  # (N, C) of benchmarks/kernels.py's figures
MAPS, BATCHES = ((64, 32), (128, 16), (256, 8)), (64, 256, 1024)  # (channels, side) of the supernet's layers


@dataclass(frozen=True)
class Loss:
    """kd_loss on students [K, N, C] and a teacher [N, C]."""

    K: int
    N: int
    C: int
    dtype: torch.dtype
    backward: bool = True

    def minimum_bytes(self) -> int:
        """Every logit read once a pass, every gradient written."""
        logits = (self.K + 1) * self.N * self.C * self.dtype.itemsize
        return 3 * logits if self.backward else logits

    def inputs(self, device) -> tuple[Tensor, ...]:
        students = torch.randn(self.K, self.N, self.C, device=device).mul(3).to(self.dtype).requires_grad_()
        teacher = torch.randn(self.N, self.C, device=device).mul(3).to(self.dtype).requires_grad_()
        labels = torch.randint(0, self.C, (self.N,), device=device)
        return students, teacher, labels, torch.rand(self.K, device=device), torch.rand(self.K, device=device)

    def small(self) -> "Loss":
        return Loss(self.K, min(self.N, 32), self.C, self.dtype, self.backward)


@dataclass(frozen=True)
class Gate:
    """gated_mix of two candidates, one of them active (or both weighted), and a shortcut."""

    batch: int
    channels: int
    side: int
    dtype: torch.dtype
    relu: bool = False
    soft: bool = False

    def minimum_bytes(self) -> int:
        """In maps: forward reads what is summed and writes y, backward reads dL/dy and both outputs; with a ReLU it
        also reads y and writes the clipped gradient, and weighted outputs have gradients of their own."""
        maps = (4 if self.soft else 3) + 3 + 2 * self.relu + 2 * self.soft
        return maps * self.batch * self.channels * self.side**2 * self.dtype.itemsize

    def inputs(self, device) -> tuple[Tensor, ...]:
        shape = (self.batch, self.channels, self.side, self.side)
        maps = [torch.randn(shape, device=device).to(self.dtype) for _ in range(4)]
        a, b, shortcut, upstream = (each.contiguous(memory_format=torch.channels_last) for each in maps)
        gates = torch.tensor([0.6, 0.4] if self.soft else [1.0, 0.0], device=device)
        leaves = (a.requires_grad_(), b.requires_grad_(self.soft), shortcut.requires_grad_(), gates.requires_grad_())
        return *leaves, upstream

    def small(self) -> "Gate":
        return Gate(min(self.batch, 2), self.channels, self.side, self.dtype, self.relu, self.soft)


Case = Loss | Gate
Step = Callable[[], tuple[Tensor, ...]]


def loss_step(case: Loss, inputs, losses) -> Step:
    """Losses of both kinds, and their gradients, as a function without arguments."""
    students, teacher, labels, *upstream = inputs

    def step():
        terms = losses(students, teacher, labels)
        if not case.backward:
            return terms
        return *terms, *torch.autograd.grad(terms, [students, teacher], upstream)

    return step


def fused_losses(students, teacher, labels):
    """Cross-entropies and divergences of the kernels under test."""
    return kernels.kd_loss(students, teacher, labels, temperature=TEMPERATURE)


def eager_losses(students, teacher, labels):
    """Logarithmic target: the other form of F.kl_div moves more. Half precision is upcast, as autocast does."""
    wide = torch.promote_types(students.dtype, torch.float32)
    s, t = students.to(wide), teacher.to(wide)
    log_p, log_q = (t / TEMPERATURE).log_softmax(-1), (s / TEMPERATURE).log_softmax(-1)
    kl = F.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True).sum(-1).mean(-1)
    ce = F.cross_entropy(s.flatten(0, 1), labels.repeat(len(s)), reduction="none").view(s.shape[:2]).mean(-1)
    return ce, kl


def liger_step(case: Loss, inputs) -> Step:
    """KL alone, gradient for the students alone: Liger-Kernel has no other."""
    from liger_kernel.transformers import LigerKLDIVLoss

    students, teacher, _, _, upstream = inputs
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def step():
        log_p = (teacher.detach().float() / TEMPERATURE).log_softmax(-1)
        log_q = (students.float() / TEMPERATURE).log_softmax(-1)
        kl = torch.stack([divergence(row, log_p) for row in log_q])
        return (kl, torch.autograd.grad(kl, students, upstream)[0]) if case.backward else (kl,)

    return step


def gate_step(case: Gate, inputs, mix) -> Step:
    """A gated mix and its gradients, as a function without arguments."""
    a, b, shortcut, gates, upstream = inputs
    leaves = [a, b, shortcut, gates] if case.soft else [a, shortcut, gates]

    def step():
        y = mix(a, b, shortcut, gates)
        return y, *torch.autograd.grad(y, leaves, upstream)

    return step


def fused_mix(case: Gate):
    """The mix of the kernels under test."""
    active = None if case.soft else 0
    return lambda a, b, shortcut, gates: kernels.gated_mix([a, b], gates, active, shortcut, case.relu)


def eager_mix(case: Gate):
    """The gates as ProxylessNAS writes them: they multiply, and the inactive output is detached."""

    def mix(a, b, shortcut, gates):
        y = gates[0] * a + gates[1] * (b if case.soft else b.detach()) + shortcut
        y = y.to(a.dtype)
        return y.relu() if case.relu else y

    return mix


def make_step(case: Case, provider: str, inputs) -> Step:
    """What is timed of one contestant."""
    if provider == "liger":
        return liger_step(case, inputs)
    fused = provider == "fused"
    if isinstance(case, Loss):
        function = fused_losses if fused else eager_losses
    else:
        function = fused_mix(case) if fused else eager_mix(case)
    if provider == "compile":
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return (loss_step if isinstance(case, Loss) else gate_step)(case, inputs, function)


def providers(case: Case, liger: bool) -> list[str]:
    """The contestants of a case."""
    names = ["fused", "eager"]
    half = case.dtype != torch.float32
    if isinstance(case, Gate):
        return names + ["compile"] * (half and case.batch == 256 and not case.relu and not case.soft)
    full = half and case.backward and case.K == 3
    names += ["compile"] * (full and (case.N, case.C) in COMPILED)
    return names + ["liger"] * (full and liger and case.N == 8192)


def cases(half: torch.dtype) -> list[Case]:
    """Everything that is measured, `half` being the half precision of the device; first what has targets."""
    first = [Loss(3, N, C, half) for N, C in TARGETS] + [Gate(256, *size, half) for size in MAPS]
    first += [Loss(3, 8192, C, half, False) for C in (1000, 32000)]
    losses = [Loss(K, N, C, half) for K in STUDENTS for N in SIZES for C in CLASSES]
    losses += [Loss(K, N, C, half, False) for K in STUDENTS for N in (256, 8192) for C in CLASSES]
    losses += [Loss(K, N, C, torch.float32) for K in STUDENTS for N in (256, 8192) for C in CLASSES]
    gates = [Gate(batch, *size, half, relu) for batch in BATCHES for size in MAPS for relu in (False, True)]
    gates += [Gate(256, *size, torch.float32) for size in MAPS] + [Gate(256, *size, half, soft=True) for size in MAPS]
    return list(dict.fromkeys(first + losses + gates))
