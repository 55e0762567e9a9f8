"""Methods on logits: cross-entropy alone, KD, RCO, DKD and SCKD."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from kernels import cross_entropy, decoupled_kd_loss, kd_loss
from losses.method import Method, MethodContext, Outputs
from losses.mixed import with_partners
from losses.options import TemperatureOptions, check_weights

# beta by (teacher, student), as in the paper's Tables 6 and 7.
DKD_BETAS = {
    ("resnet32x4", "resnet8x4"): 8.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet56", "resnet20"): 2.0,
    ("wrn40_2", "wrn16_2"): 6.0,
    ("wrn40_2", "wrn40_1"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
    ("resnet50", "mobilenetv2"): 8.0,
}
DKD_BETA = 8.0  # of all other pairs
DKD_RAMP = 20  # epochs
SCKD_SCALE = 2.0**12  # of the losses whose gradients are compared


class CrossEntropy(Method):
    """CE(q, y): the student trained alone, the baseline of every method, and a term beside most of them."""

    paper = "no distillation: the student trained alone"
    usual = ""
    terms: Mapping[str, float] = MappingProxyType({"ce": 1.0})
    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": with_partners(cross_entropy(student.logits, batch.labels), student.logits, batch)}


@dataclass
class KDOptions(TemperatureOptions):
    """Options of plain KD.

    Args:
        alpha: weight of T^2 KL; the cross-entropy with the labels gets 1 - alpha.
    """

    alpha: float = 0.9

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}: must be in [0, 1]")


class KD(Method):
    """(1 - alpha) CE(q, y) + alpha T^2 KL(p_T || q_T), p_T and q_T the softmax of teacher's and student's logits over T
    (Hinton et al., 2015, section 2). Both are computed in one pass over the logits."""

    paper = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015)"
    usual = "0.9 KD, 0.1 labels"
    options, joined_options = KDOptions, TemperatureOptions

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.temperature = context.options.temperature
        self.ce_weight, self.kd_weight = 1.0 - context.options.alpha, context.options.alpha
        self.weigh(self.ce_weight, self.kd_weight)

    def weigh(self, ce_weight: float, kd_weight: float) -> "KD":
        """L = ce_weight CE + kd_weight T^2 KL, as beside other methods."""
        self.terms = {"ce": ce_weight, "kl": kd_weight * self.temperature**2}
        return self

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ce, kl = kd_loss(student.logits, teacher.logits, batch.labels, temperature=self.temperature)
        return {"ce": with_partners(ce[0], student.logits, batch), "kl": kl[0]}


def with_labels(methods: Sequence[Method], context: MethodContext, ce_weight: float, kd_weight: float) -> list[Method]:
    """The methods, behind one cross-entropy for all of them: in KD's pass, if that has a weight, else alone."""
    others = [method for method in methods if not isinstance(method, (KD, CrossEntropy))]
    own = next((method for method in methods if isinstance(method, KD)), None)
    if kd_weight:
        return [(own or KD(context)).weigh(ce_weight, kd_weight), *others]
    base = CrossEntropy(context)
    base.terms = {"ce": ce_weight}
    return [base, *others]


class RCO(KD):
    """KD from checkpoints of the teacher's own training, its anchors, one after the other, each for an
    equal share of the epochs (Jin et al., section 3, anchors at equal intervals).

    The learning rate's schedule starts anew at each anchor (--lr_restarts). With one anchor it is plain KD.
    """

    paper = "Jin et al.: Knowledge Distillation via Route Constrained Optimization (2019)"
    anchors = True


@dataclass
class DKDOptions(TemperatureOptions):
    """Options of DKD.

    Args:
        dkd_alpha: weight of the target's part.
        dkd_beta: weight of the other classes' part; default: the paper's for the pair, else 8.
    """

    dkd_alpha: float = 1.0
    dkd_beta: float | None = None

    def check(self) -> None:
        check_weights(self, "dkd_alpha", "dkd_beta")


class DKD(Method):
    """T^2 (alpha TCKD + beta NCKD) (Zhao et al., eq. 7): the divergence between target and others, and that
    among the others, at alpha 1 and beta by pair (--dkd_alpha, --dkd_beta). It rises from 0 over 20 epochs."""

    paper = "Zhao et al.: Decoupled Knowledge Distillation (2022)"
    usual = "1 target, 8 non-target (the paper's for its own pairs)"
    options = DKDOptions
    mixable = False

    def __init__(self, context: MethodContext):
        super().__init__(context)
        options = context.options
        pair = (context.teacher_name, context.student_name)
        beta = DKD_BETAS.get(pair, DKD_BETA) if options.dkd_beta is None else options.dkd_beta
        self.temperature = options.temperature
        square = self.temperature**2
        self.terms = {"dkd_target": options.dkd_alpha * square, "dkd_others": beta * square}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, target, others = decoupled_kd_loss(
            student.logits, teacher.logits, batch.labels, temperature=self.temperature
        )
        ramp = min((batch.epoch + 1) / DKD_RAMP, 1.0)
        return {"dkd_target": ramp * target[0], "dkd_others": ramp * others[0]}


class SCKD(Method):
    """T^2 KL while it helps: only in steps in which its gradient does not point against the cross-entropy's
    (Zhu and Wang, section 3: transfer where the gradients are similar).

    The similarity is the cosine of the two gradients with respect to the student's last block, of the whole
    global batch; the paper's text leaves open which parameters and whether the cosine is smoothed.
    """

    paper = "Zhu, Wang: Student Customized Knowledge Distillation (2021)"
    mixable = False
    options = TemperatureOptions

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.temperature = context.options.temperature
        self.terms = {"sckd": self.temperature**2}
        self._last = tuple(context.student.last_block.parameters())  # no parameters of the method's own

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, kl = kd_loss(student.logits, teacher.logits, batch.labels, temperature=self.temperature)
        if not kl.requires_grad:
            return {"sckd": kl[0]}
        ce = cross_entropy(student.logits, batch.labels)
        # In float16 gradients on the way would underflow, without GradScaler's scale; the cosine does not depend on it.
        tasks = (self._gradient(SCKD_SCALE * each.sum()) for each in (ce, kl))
        helps = (torch.dot(*tasks) > 0).to(kl.dtype)
        return {"sckd": kl[0] * helps}

    def _gradient(self, loss: Tensor) -> Tensor:
        """Of the mean over all processes, as one vector in float32, of length 1."""
        parts = torch.autograd.grad(loss, self._last, retain_graph=True, allow_unused=True)
        flat = torch.cat([part.flatten().float() for part in parts if part is not None])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        return nn.functional.normalize(flat, dim=0)
