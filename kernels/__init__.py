"""The public API of the operations that have kernels of their own; other packages import from here alone.

Every operation has a plain PyTorch reference, which is its specification, and Triton kernels; `use` chooses between
them, and on an NVIDIA GPU the kernels are the default.
"""

from kernels.dispatch import use
from kernels.gates import gate_gradient, gated_mix
from kernels.kd import DecoupledLoss, cross_entropy, decoupled_kd_loss, kd_loss
from kernels.linear_kd import linear_kd_loss

__all__ = ["DecoupledLoss", "cross_entropy", "decoupled_kd_loss", "gate_gradient", "gated_mix", "kd_loss"]
__all__ += ["linear_kd_loss", "use"]
