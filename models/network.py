"""The contract of every network: stages, an embedding, a classifier, and blocks to cut at."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu
from torch.utils.flop_counter import FlopCounterMode


class Network(nn.Module):
    """A classifier made of stages, an `embed` head and a linear layer `fc`.

    A subclass builds its modules and then calls `set_stages`. After that

    - `model(x)` gives logits [N, C] for images [N, 3, H, W];
    - `model(x, features=True)` gives (logits, [one feature map a stage], embedding [N, D]);
    - `model(x, features="preact")` gives the same with the maps before the last ReLU of each stage; for
      networks whose maps are raw sums (WRN, DenseNet) it is the next BatchNorm of the map. It is one
      forward pass: every BatchNorm runs, and updates its statistics, once;
    - `model(x, features="both")` gives (logits, maps, maps before their last ReLU, embedding), in one pass;
    - `model.blocks` is the tuple of the 4 blocks that SFTN and GTN cut at (a pool's students: as many as
      the pool says); running them in order is the forward pass, so the last one ends in the logits.

    Stages, blocks and `embed` are not registered as submodules a second time: what they are made of is
    registered by the subclass, so that parameter names stay those of the field's published checkpoints.
    Where those call the classifier otherwise, `fc` is a property.

    `published` names the weights that `--pretrained` loads (models/weights.py); None: there are none. `named_stages`
    and `architecture` are those that `create_model` was given, for networks of other libraries. `frozen` are parts that
    stay without gradients and in eval mode, whatever the network as a whole is told (models/freezing.py).
    """

    fc: nn.Linear
    published: str | None = None
    named_stages: tuple[str, ...] = ()
    architecture: dict | None = None
    frozen: tuple[nn.Module | nn.Parameter, ...] = ()

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        for part in self.frozen:
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Network":
        super().requires_grad_(requires_grad)
        for part in self.frozen:
            part.requires_grad_(False)
        return self

    def set_stages(
        self,
        stages: Sequence[nn.Module],
        embed: nn.Module,
        preact: Sequence[nn.Module] | None = None,
        first: int = 1,
        normalised: bool = False,
    ) -> None:
        """Declare what the forward pass is made of.

        Args:
            stages: modules to run in order; their outputs are the feature maps.
            embed: from the last map to the embedding [N, D].
            preact: a second cut of the same modules: len(stages) pieces whose outputs are the
                pre-activations, and one from the last of them to the embedding. By default the last ReLU
                of each stage moves to the next piece.
            first: how many stages the first block is made of.
            normalised: the pieces of `preact` behind the first end in the next BatchNorm of the map, not at
                its last ReLU.
        """
        self.stages = tuple(stages)
        object.__setattr__(self, "embed", embed)
        self.preact, self.normalised = tuple(preact or cut_before_relu(stages, embed)), normalised
        start = stages[0] if first == 1 else nn.Sequential(*stages[:first])
        self.blocks = (start, *self.stages[first:-1], nn.Sequential(self.stages[-1], embed, self.fc))

    def forward(self, x: Tensor, features: bool | Literal["preact", "both"] = False):
        if features not in (False, True, "preact", "both"):
            raise ValueError(f"features must be False, True, 'preact' or 'both'; got {features!r}")
        if features == "both":
            return self._both(x)
        *pieces, embed = self.preact if features == "preact" else (*self.stages, self.embed)
        maps = []
        for piece in pieces:
            x = piece(x)
            maps.append(x)
        embedding = embed(x)
        logits = self.fc(embedding)
        return (logits, maps, embedding) if features else logits

    def run_blocks(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, x = [], images
        for block in self.blocks[:-1]:
            x = block(x)
            maps.append(x)
        return maps, self.blocks[-1](x)

    @property
    def last_block(self) -> nn.Module:
        """What the logits come out of; of networks that cannot be cut the classifier."""
        return self.blocks[-1]

    def _both(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        maps, preact = [], []
        for index, (piece, following) in enumerate(pairwise(self.preact)):
            if self.normalised and index:
                for part in piece[:-1]:
                    x = part(x)
                maps.append(x)
                x = piece[-1](x)
            else:
                x = piece(x)
                maps.append(relu(x) if _starts_in_relu(following) else x)
            preact.append(x)
        embedding = self.preact[-1](x)
        return self.fc(embedding), maps, preact, embedding


def _starts_in_relu(piece: nn.Module) -> bool:
    return isinstance(piece, nn.Sequential) and isinstance(next(iter(piece), None), nn.ReLU)


class EndsInReLU(nn.Module, ABC):
    """A block whose last step is a ReLU; a subclass says what comes before it."""

    @abstractmethod
    def before_relu(self, x: Tensor) -> Tensor:
        """The sum that the ReLU is applied to."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.before_relu(x))


class BeforeReLU(nn.Module):
    """All of a block but its last ReLU."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.before_relu(x)


def split_last_relu(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(`module` without the ReLU it ends in, that ReLU), or (module, identity) where it ends in none."""
    if isinstance(module, nn.ReLU):
        return nn.Identity(), nn.ReLU()
    if hasattr(module, "split_last_relu"):
        return module.split_last_relu()
    if hasattr(module, "before_relu"):
        return BeforeReLU(module), nn.ReLU()
    if isinstance(module, nn.Sequential) and len(module):
        *parts, last = module
        before, after = split_last_relu(last)
        return nn.Sequential(*parts, before), after
    return module, nn.Identity()


def cut_before_relu(stages: Sequence[nn.Module], embed: nn.Module) -> list[nn.Module]:
    """The pieces of `Network.set_stages`' `preact`: the stages with each last ReLU moved to the next piece."""
    pieces, after = [], nn.Identity()
    for stage in stages:
        before, following = split_last_relu(stage)
        pieces.append(nn.Sequential(after, before))
        after = following
    return [*pieces, nn.Sequential(after, embed)]


class GlobalAveragePool(nn.Module):
    """[N, C, H, W] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        # Other runtimes know a global pool for what it is, and integers for it.
        return _SpatialMean.apply(x) if x.requires_grad else adaptive_avg_pool2d(x, 1).flatten(1)


class _SpatialMean(torch.autograd.Function):
    """The spatial mean with a gradient that is a view of N x C numbers.

    PyTorch's own is a whole map, laid out channels first whatever `x` is, so that the ReLU in front of the pool would
    go through memory in the wrong order.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        return (gradient / (height * width))[..., None, None].expand(ctx.shape)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """Convolution with "same" padding for odd kernels, by default without a bias, and its BatchNorm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    return [convolution, nn.BatchNorm2d(out_channels)]


def normal_by_fan_out(module: nn.Module) -> None:
    """Convolution weights N(0, 2 / (k * k * out)) and biases 0, as the field's WRNs and VGGs start."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
            nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise(module: nn.Module) -> None:
    """He et al. (2015): normal convolution weights scaled by fan-out; BatchNorm starts as the identity."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def run_blocks(model: Network, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Feature maps after every block but the last, and the logits."""
    return model.run_blocks(images)


def cut(model: Network, where: str) -> None:
    """Cut `model.blocks` anew, into as many: at its "stages", as it is, or by "depth".

    By depth, blocks are runs of the stages' parts (a stage is a sequence of them) with about as many convolutions of
    more than one pixel each; running them in order is still the forward pass.
    """
    if where == "stages":
        return
    parts = [part for stage in model.stages for part in (stage if isinstance(stage, nn.Sequential) else [stage])]
    depths = list(
        accumulate(sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in part.modules()) for part in parts)
    )
    blocks, start = [], 0
    for number in range(1, len(model.blocks)):
        wanted = number * depths[-1] / len(model.blocks)
        # The last of the parts that come nearest: a BatchNorm and a ReLU stay with their convolution.
        end = min(range(start, len(parts)), key=lambda i: (abs(depths[i] - wanted), -i)) + 1
        blocks.append(nn.Sequential(*parts[start:end]))
        start = end
    model.blocks = (*blocks, nn.Sequential(*parts[start:], model.embed, model.fc))


@torch.no_grad()
def macs(module: nn.Module, x: Tensor) -> tuple[float, Tensor | None]:
    """(multiply-accumulates of convolutions and linear layers, output) of `module` in eval mode on `x`."""
    training = module.training
    with FlopCounterMode(display=False) as counter:
        out = module.eval()(x)
    module.train(training)
    return counter.get_total_flops() / 2, out


@torch.no_grad()
def cost(model: Network, image_size: int) -> tuple[int, int, list[tuple[int, ...]]]:
    """(parameters, FLOPs for one image, the shape C x H x W of every map).

    2 floating-point operations a multiply-accumulate of convolutions and linear layers. `model` is in eval
    mode; on the `meta` device nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        _, maps, _ = model(torch.zeros(1, 3, image_size, image_size, device=model.fc.weight.device), features=True)
    return count_parameters(model), counter.get_total_flops(), [tuple(each.shape[1:]) for each in maps]


def count_parameters(model: nn.Module) -> int:
    """Of all layers."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def block_shapes(model: Network, image_size: int) -> list[tuple[int, int]]:
    """(channels, side) of the feature map after every block but the last, for square images."""
    training = model.training
    probe = torch.zeros(1, 3, image_size, image_size, device=model.fc.weight.device, dtype=model.fc.weight.dtype)
    maps, _ = run_blocks(model.eval(), probe)
    model.train(training)
    return [(feature.shape[1], feature.shape[2]) for feature in maps]
