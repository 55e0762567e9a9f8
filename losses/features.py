"""Methods that compare feature maps: FitNets, AT, NST, VID, AB, FT, OH."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from losses.adapters import by_pixel, is_rectified, pair_stages, regressor, same_size
from losses.method import Method, MethodContext, Outputs, full_precision


class FitNets(Method):
    """mean (r(f_S) - f_T)^2 over one hint layer, the second stage (Romero et al., eq. 3).

    The regressor r ends in a ReLU where the teacher's map does: the paper wants the same nonlinearity on
    both sides, and no ReLU can reach the signed maps of WRNs. It trains together with the student, as in the
    field's benchmarks, not before it.
    """

    paper = "Romero et al.: FitNets: Hints for Thin Deep Nets (2015)"
    weight, terms = 100.0, {"fitnets": 1.0}
    student_features = teacher_features = "maps"
    HINT = 2  # stages are counted from the stem's, 0

    def __init__(self, context: MethodContext):
        super().__init__(context)
        student, teacher = context.student_outputs.maps, context.teacher_outputs.maps
        pairs = pair_stages(student, teacher)
        self.pair = pairs[min(self.HINT, len(pairs)) - 1]
        guided, hint = student[self.pair[0]], teacher[self.pair[1]]
        self.regressor = regressor(guided, hint, is_rectified(hint))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        guided = self.regressor(student.maps[self.pair[0]])
        return {"fitnets": mean_squares(guided, teacher.maps[self.pair[1]])}


@full_precision
def mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared error of two tensors of one shape, with a gradient in the order of their elements in memory,
    which that of Tensor.mean has not."""
    return (a - b).square().sum() / a.numel()


class Stagewise(Method):
    """A loss summed over paired stages; subclasses define it for one pair of maps."""

    student_features = teacher_features = "maps"

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.pairs = pair_stages(context.student_outputs.maps, context.teacher_outputs.maps)

    def matched(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        return [(student.maps[s], teacher.maps[t]) for s, t in self.pairs]


class AT(Stagewise):
    """sum over stages of mean (A_S - A_T)^2, A the l2-normalised mean over channels of f^2, as a vector of
    pixels (Zagoruyko and Komodakis, eq. 2 with p = 2; the mean over pixels and the weight are the field's).

    Of maps of two sizes the larger is averaged down before it is squared.
    """

    paper = "Zagoruyko, Komodakis: Paying More Attention to Attention (2017)"
    weight, terms = 1000.0, {"at": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"at": sum(attention_transfer(*pair) for pair in self.matched(student, teacher))}


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Of maps [N, C, H, W], whose channels need not agree."""
    student, teacher = same_size(student, teacher)
    return (attention(student) - attention(teacher)).square().mean()


def attention(maps: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W], of length 1: a sum over channels is as good as their mean."""
    return F.normalize(maps.square().sum(1).flatten(1), dim=1)


class NST(Stagewise):
    """sum over stages of the squared maximum mean discrepancy between the channels' maps, kernel (a . b)^2 on
    l2-normalised maps (Huang and Wang, eq. 6 with the polynomial kernel d = 2, c = 0)."""

    paper = "Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (2017)"
    weight, terms = 50.0, {"nst": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"nst": sum(neuron_selectivity(*pair) for pair in self.matched(student, teacher))}


@full_precision
def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Of maps [N, C, H, W], whose channels need not agree."""
    student, teacher = (F.normalize(maps.flatten(2), dim=2) for maps in same_size(student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b.transpose(1, 2)).square().mean()  # products of channels: no pixel is broadcast

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


class VID(Stagewise):
    """sum over stages of mean [(mu(f_S) - f_T)^2 / (2 v) + log(v) / 2] (Ahn et al., eq. 4, without constants).

    mu: 1x1 convolutions C_S -> C_T -> C_T -> C_T with ReLUs between; v, one a channel of the teacher's, is
    softplus(rho) + 1e-5, trained from v = 5 on. The loss may be negative.
    """

    paper = "Ahn et al.: Variational Information Distillation for Knowledge Transfer (2019)"
    weight, terms = 1.0, {"vid": 1.0}
    START, SMALLEST = 5.0, 1e-5

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.means, self.rhos = nn.ModuleList(), nn.ParameterList()
        for student, teacher in self.matched(context.student_outputs, context.teacher_outputs):
            channels, wanted = student.shape[1], teacher.shape[1]
            first, second, third = (nn.Conv2d(c, wanted, 1, bias=False) for c in (channels, wanted, wanted))
            self.means.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            rho = math.log(math.expm1(self.START - self.SMALLEST))
            self.rhos.append(nn.Parameter(torch.full((wanted,), rho)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        total = 0
        for mean, rho, pair in zip(self.means, self.rhos, self.matched(student, teacher), strict=True):
            source, target = same_size(*pair)
            total = total + gaussian_likelihood(mean(source), target, rho, self.SMALLEST)
        return {"vid": total}


@full_precision
def gaussian_likelihood(mean: Tensor, maps: Tensor, rho: Tensor, smallest: float) -> Tensor:
    """Negative log-likelihood, without its constant, of maps [N, C, H, W] under variances from rho [C]."""
    variance = F.softplus(rho) + smallest
    squares = (mean - maps).square().sum((0, 2, 3)) / variance
    return 0.5 * (squares.sum() / maps.numel() + variance.log().mean())


class AB(Method):
    """Activation boundaries (Heo et al., AAAI 2019, eq. 4), in a warm-up of their own: whether the teacher's
    neuron is active is made the student's, by squared hinges of margin 1 on pre-activations.

    Summed over everything and divided by N; weight 2^-(stages behind) and 3/1000 over all. The warm-up
    trains the student's stages and connectors (none where shapes agree); afterwards the student trains with
    the labels, and with KD where --kd_weight is set. `--method_weights` scales the warm-up's loss.
    """

    paper = "Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries (2019)"
    usual = "1, in the warm-up"
    student_features = teacher_features = "preact"
    warmup_epochs, warmup_student, warmup_terms = 30, True, {"ab": 1.0}
    MARGIN, SCALE = 1.0, 3e-3

    def __init__(self, context: MethodContext):
        super().__init__(context)
        student, teacher = context.student_outputs.preact, context.teacher_outputs.preact
        self.pairs = pair_stages(student, teacher)
        matched = [(student[s], teacher[t]) for s, t in self.pairs]
        self.connectors = nn.ModuleList(
            nn.Identity() if a.shape == b.shape else regressor(a, b, rectified=False) for a, b in matched
        )
        self._student = (context.student,)  # no submodule

    def warmup(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        last, total = len(self.pairs) - 1, 0
        for stage, (connector, (s, t)) in enumerate(zip(self.connectors, self.pairs, strict=True)):
            hinges = activation_boundaries(connector(student.preact[s]), teacher.preact[t], self.MARGIN)
            total = total + 2.0 ** (stage - last) * hinges
        return {"ab": self.SCALE * total}

    def warmup_parameters(self) -> list[nn.Parameter]:
        stages = self._student[0].preact[: self.pairs[-1][0] + 1]  # not what follows the last of them
        once = {id(parameter): parameter for stage in stages for parameter in stage.parameters()}
        return [*once.values(), *self.connectors.parameters()]

    def warmup_only(self) -> list[nn.Module]:
        return [self.connectors]


@full_precision
def activation_boundaries(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Pre-activations of one shape [N, ...] -> the sum of squared hinges over N."""
    off = (student + margin).clamp(min=0).square()  # the teacher's neuron is off
    on = (margin - student).clamp(min=0).square()
    return torch.where(teacher > 0, on, off).sum() / len(student)


class FT(Method):
    """Factor transfer (Kim et al., eq. 3 and 4): mean |F_S / ||F_S|| - F_T / ||F_T|||, factors flattened.

    F_T comes from a paraphraser, an autoencoder of the teacher's last map trained in a warm-up and frozen
    then, F_S from a translator on the student's, with BatchNorm. Factors have half the teacher's channels.
    The field's benchmarks compare attention maps of the factors instead, with a weight of 200; the paper's
    definition is taken here.
    """

    paper = "Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer (2018)"
    weight, terms = 500.0, {"ft": 1.0}
    student_features = teacher_features = "maps"
    warmup_epochs, warmup_terms = 30, {"paraphraser": 1.0}
    SHARE = 0.5

    def __init__(self, context: MethodContext):
        super().__init__(context)
        width, channels = context.student_outputs.maps[-1].shape[1], context.teacher_outputs.maps[-1].shape[1]
        factors = max(1, round(self.SHARE * channels))
        self.encoder = convolutions(channels, channels, factors, norm=False)
        self.decoder = convolutions(factors, factors, channels, norm=False, transposed=True)
        self.translator = convolutions(width, width, factors, norm=True)
        # The paper's rate for the paraphraser is below the usual one of ResNets.
        self.slow = context.student_name.startswith(("resnet", "wrn"))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            factors = self.encoder(teacher.maps[-1])
        return {"ft": factor_transfer(*same_size(self.translator(student.maps[-1]), factors))}

    def warmup(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        maps = teacher.maps[-1]
        return {"paraphraser": mean_squares(self.decoder(self.encoder(maps)), maps)}

    def warmup_only(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def warmup_lr(self, epoch: int, lr: float) -> float:
        return min(lr, 0.01) if self.slow else lr


def convolutions(channels: int, middle: int, out: int, norm: bool, transposed: bool = False) -> nn.Sequential:
    """Three 3x3 convolutions, each with a leaky ReLU behind it."""
    kind, parts = nn.ConvTranspose2d if transposed else nn.Conv2d, []
    for before, after in ((channels, middle), (middle, out), (out, out)):
        parts += [kind(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)


@full_precision
def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean distance of two factors, each of unit length."""
    student, teacher = (F.normalize(by_pixel(factors), dim=1) for factors in (student, teacher))
    return (student - teacher).abs().mean()


class OH(Method):
    """The overhaul (Heo et al., ICCV 2019, eq. 3 to 6), also called OFD: partial l2 distance on pre-activations.

    The student's, through a 1x1 convolution and BatchNorm, shall equal max(teacher's, margin), but no loss
    is taken where it lies below a target that is not positive. The margin of a channel is the mean of a
    rectified-away normal distribution with the mean and deviation of the teacher's last BatchNorm. Summed
    over C, H, W, averaged over images; a stage weighs half of the one behind it. The teacher stays in eval
    mode.
    """

    paper = "Heo et al.: A Comprehensive Overhaul of Feature Distillation (2019)"
    weight, terms = 1e-3, {"oh": 1.0}
    student_features = teacher_features = "preact"

    def __init__(self, context: MethodContext):
        super().__init__(context)
        student, teacher = context.student_outputs.preact, context.teacher_outputs.preact
        self.pairs = pair_stages(student, teacher)
        self.connectors = nn.ModuleList()
        for index, (s, t) in enumerate(self.pairs):
            width, channels = student[s].shape[1], teacher[t].shape[1]
            convolution = nn.Conv2d(width, channels, 1, bias=False)
            nn.init.normal_(convolution.weight, 0.0, math.sqrt(2.0 / channels))
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(channels)))
            self.register_buffer(f"margin{index}", margins(last_norm(context.teacher, t, channels)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        last, total = len(self.pairs) - 1, 0
        for index, (connector, (s, t)) in enumerate(zip(self.connectors, self.pairs, strict=True)):
            pair = same_size(connector(student.preact[s]), teacher.preact[t])
            total = total + 2.0 ** (index - last) * partial_distance(*pair, getattr(self, f"margin{index}"))
        return {"oh": total}


@full_precision
def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Pre-activations [N, C, H, W] and margins [C], not positive -> a scalar, the mean over images."""
    target = torch.maximum(teacher, margin[:, None, None])
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).sum() / len(student)


def margins(norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] for x ~ N(beta, gamma^2), by channel; -3 |gamma| where x < 0 is rarer than 1 in 1000."""
    mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    deviation = deviation.clamp(min=1e-12)
    z = -mean / deviation
    below = 0.5 * torch.erfc(-z / math.sqrt(2))
    expected = mean - deviation * torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * below)
    return torch.where(below > 1e-3, expected, -3 * deviation).to(norm.bias.dtype)


def last_norm(network: nn.Module, stage: int, channels: int) -> nn.BatchNorm2d:
    """The BatchNorm that the pre-activations of a stage come out of; that of a shortcut does not count.

    Raises:
        UserError: there is none of that width, as where halves of the channels are joined.
    """
    found = [
        module
        for name, module in network.preact[stage].named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.num_features == channels and "downsample" not in name
    ]
    if not found:
        raise UserError(f"--method oh: stage {stage} of the teacher ends in no BatchNorm of {channels} channels")
    return found[-1]
