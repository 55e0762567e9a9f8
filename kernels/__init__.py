"""The one door to the operations that are worth a kernel of their own.

Callers import from here and nowhere deeper. Today every operation runs its plain PyTorch reference,
which is also the specification that a faster implementation has to meet.
"""

from kernels.gates import gate_gradient, gated_mix
from kernels.kd import cross_entropy, kd_loss

__all__ = ["cross_entropy", "gate_gradient", "gated_mix", "kd_loss"]
