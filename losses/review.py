"""ReviewKD: stages of the student, fused from the deepest on, against those of the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from losses.adapters import Resize, pair_stages
from losses.method import Method, MethodContext, Outputs, full_precision

WEIGHTS = {("resnet32x4", "resnet8x4"): 5.0}  # (teacher, student)
RAMP = 20  # epochs


class ReviewKD(Method):
    """Sum over levels of HCL(ABF output, teacher's pre-activations) (Chen et al., section 3).

    Levels are the paired stages and the embedding as a 1x1 map, deepest first; each attention-based fusion
    (ABF) mixes its stage with the fused map of the deeper level. The weight rises from 0 over 20 epochs.

    Raises:
        UserError: a single image in a process, of which BatchNorm has one value a channel of the 1x1 map.
    """

    paper = "Chen et al.: Distilling Knowledge via Knowledge Review (2021)"
    weight, terms = 1.0, {"reviewkd": 1.0}
    usual = "1; 5 for resnet32x4 to resnet8x4"
    student_features, teacher_features = "maps", "preact"
    WIDEST = 512

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.weight = WEIGHTS.get((context.teacher_name, context.student_name), self.weight)
        self.pairs = pair_stages(context.student_outputs.maps, context.teacher_outputs.preact)
        student, teacher = (self._levels(outputs) for outputs in (context.student_outputs, context.teacher_outputs))
        middle = min(self.WIDEST, student[0].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(own.shape[1], middle, target.shape[1], own.shape[-1], target.shape[-1], first=level == 0)
            for level, (own, target) in enumerate(zip(student, teacher, strict=True))
        )

    def _levels(self, outputs: Outputs) -> list[Tensor]:
        side = 0 if outputs.maps else 1  # the student's are maps, the teacher's pre-activations
        stages = [(outputs.maps or outputs.preact)[pair[side]] for pair in reversed(self.pairs)]
        return [outputs.embedding[:, :, None, None], *stages]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.training:
            _check_values(len(student.logits))
        total, deeper = 0, None
        for fusion, own, target in zip(self.fusions, self._levels(student), self._levels(teacher), strict=True):
            fused, deeper = fusion(own, deeper, last=fusion is self.fusions[-1])
            total = total + hierarchical_context(fused, target)
        return {"reviewkd": min((batch.epoch + 1) / RAMP, 1.0) * total}


class Fusion(nn.Module):
    """ABF: (own map [N, C, h, h], fused map of the deeper level or None) -> (map like the teacher's, fused map)."""

    def __init__(self, channels: int, middle: int, out: int, side: int, target_side: int, first: bool):
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        convolution = nn.Conv2d(middle, out, 3, padding=1, bias=False)
        self.out = nn.Sequential(Resize(target_side), convolution, nn.BatchNorm2d(out))
        self.enlarge, self.gates = Resize(side), None if first else nn.Conv2d(2 * middle, 2, 1)
        for layer in (self.narrow[0], convolution):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, own: Tensor, deeper: Tensor | None, last: bool = False) -> tuple[Tensor, Tensor | None]:
        if self.gates is None:
            x = self.narrow(own)
            return self.out(x), x
        # A 1x1 convolution of two joined maps is the sum of its halves, and that of the smaller map may come
        # before the pixels are repeated: nothing of full size and double width is made.
        of_own, of_deeper = self.gates.weight.chunk(2, 1)
        if last:
            return self._narrowed_late(own, deeper, of_own, of_deeper), None
        x = self.narrow(own)
        own_gate, deeper_gate = self._gates(F.conv2d(x, of_own, self.gates.bias), deeper, of_deeper)
        x = torch.addcmul(x * own_gate, self.enlarge(deeper), deeper_gate)
        return self.out(x), x

    def _gates(self, part: Tensor, deeper: Tensor, of_deeper: Tensor) -> tuple[Tensor, Tensor]:
        return (part + self.enlarge(F.conv2d(deeper, of_deeper))).sigmoid().chunk(2, 1)

    def _narrowed_late(self, own: Tensor, deeper: Tensor, of_own: Tensor, of_deeper: Tensor) -> Tensor:
        """The same at the last level, whose fused map no other needs. All up to the 3x3 convolution is linear in
        the narrowed map W s + b, so W and b go into the weights of what follows, and that map, wide and the largest
        of all, is never made."""
        weight, bias = narrowing(own, *self.narrow)
        gate_bias = self.gates.bias + (of_own[:, :, 0, 0] @ bias)
        own_gate, deeper_gate = self._gates(
            F.conv2d(own, of_own[:, :, 0, 0].mm(weight)[..., None, None], gate_bias), deeper, of_deeper
        )
        resize, convolution, norm = self.out
        joined = torch.cat(
            [torch.einsum("omhw,mc->ochw", convolution.weight, part) for part in (weight, bias[:, None])], 1
        )
        fused = F.conv2d(resize(torch.cat([own * own_gate, own_gate], 1)), joined, padding=1)
        return norm(fused + convolution(resize(self.enlarge(deeper) * deeper_gate)))


def _check_values(values: int) -> None:
    """Raise UserError where BatchNorm in training would have a single value a channel."""
    if values < 2:
        raise UserError(
            "--batch_size: --method reviewkd needs at least 2 images in each process, as BatchNorm has one value a "
            "channel of a single image's 1x1 map; give --batch_size twice the processes or more"
        )


@full_precision
def narrowing(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight [M, C], bias [M]) of a 1x1 convolution and the BatchNorm behind it, for x [N, C, H, W].

    In training the variance of W x over pixels is diag(W Cov(x) W^T), and counts for the running statistics.

    Raises:
        UserError: a single pixel in training.
    """
    weight = convolution.weight[:, :, 0, 0]
    if norm.training:
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
        count, centre = len(pixels), pixels.mean(0)
        _check_values(count)
        centred = pixels - centre
        mean, variance = weight @ centre, ((weight @ (centred.T @ centred / count)) * weight).sum(1)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
            norm.num_batches_tracked += 1
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return scale[:, None] * weight, norm.bias - scale * mean


@full_precision
def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL: mean squares at full size and averaged to 4x4, 2x2 and 1x1, each with half the weight of the one
    before, over the sum of the weights; levels not smaller than the map are left out."""
    apart = student - teacher  # averages are linear: those of the difference
    total, weights, weight = mean_square(apart), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[-1]:
            weight /= 2
            total, weights = total + weight * mean_square(averaged_to(apart, side)), weights + weight
    return total / weights


# The gradients of Tensor.mean, mse_loss and pooling to 1x1 are laid out channels first whatever the map is, and all
# layers that they reach would go through memory in the wrong order; those of the two functions below keep its order.


def mean_square(x: Tensor) -> Tensor:
    """The mean of the squared elements."""
    return x.square().sum() / x.numel()


def averaged_to(maps: Tensor, side: int) -> Tensor:
    """As adaptive_avg_pool2d, for square maps."""
    times, rest = divmod(maps.shape[-1], side)
    return F.adaptive_avg_pool2d(maps, side) if rest else F.avg_pool2d(maps, times)
