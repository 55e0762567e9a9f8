"""Frozen networks in fewer GPU kernels: BatchNorm, shortcut and ReLU within the convolution that they follow.

In eval mode a BatchNorm scales and shifts channels by fixed numbers. The scale goes into the convolution's weights, and
cuDNN adds shift and shortcut and rectifies in the convolution's own kernel. A map is then written once and rounded once
to half precision, instead of once for each of these layers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from models.foreign import Foreign
from models.imagenet import Bottleneck
from models.network import Network
from models.resnet import BasicBlock
from models.wrn import PreActivationBlock

Layer = Callable[[Tensor], Tensor]


def fuse(module: nn.Module, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Have the networks in `module`, frozen and in eval mode, run fused on `devices` where no gradient is asked for.

    Fused are runs of convolution, BatchNorm and ReLU, the blocks of ResNets, and the first convolution of each block of
    WRNs. All else runs as it did, and so do networks of other libraries, and `features` of "preact" and "both".
    Parameters and their names stay. Weights that are loaded later are used from then on; ones that are changed in
    another way are not.

    On a GPU the convolutions are cuDNN's, which has to be in use, and is not asked for the same bits each time: where
    `torch.backends.cudnn.deterministic` is set networks run as they did.
    """
    for network in module.modules():
        if not isinstance(network, Network) or isinstance(network, Foreign):
            continue
        if not isinstance(network.stages[0], FusedStage):
            network.stages = tuple(FusedStage(stage, devices) for stage in network.stages)
            network.register_load_state_dict_post_hook(_forget)


def _forget(network: Network, _) -> None:
    """What was made of weights that the network no longer has."""
    for stage in network.stages:
        stage.layers.clear()


class FusedStage(nn.Module):
    """A stage of a network, fused where it can be."""

    def __init__(self, stage: nn.Module, devices: tuple[str, ...]):
        super().__init__()
        # In a tuple it is not registered a second time.
        self.stage, self.devices = (stage,), devices
        self.layers: dict[tuple, list[Layer]] = {}  # by device and dtype

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind not in self.devices or torch.is_grad_enabled() or (x.is_cuda and not _has_cudnn()):
            return self.stage[0](x)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        key = (x.device, dtype)
        if key not in self.layers:
            self.layers[key] = list(fused(self.stage[0], dtype))
        x = x.to(dtype)
        for layer in self.layers[key]:
            x = layer(x)
        return x


def fused(module: nn.Module, dtype: torch.dtype) -> Iterator[Layer]:
    """What computes a frozen module in `dtype`, one after the other."""
    layers = list(flat(module))
    while layers:
        first, *following = layers[:3]
        if _is_plain(first) and list(map(type, following)) == [nn.BatchNorm2d, nn.ReLU]:
            yield Convolution(first, following[0], dtype).rectified
            del layers[:3]
            continue
        if isinstance(first, (BasicBlock, Bottleneck)):
            yield ResidualBlock(first, dtype)
        elif isinstance(first, PreActivationBlock):
            yield PreActivation(first, dtype)
        else:
            yield first
        del layers[0]


def flat(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a sequence, and of sequences in it."""
    if type(module).forward is nn.Sequential.forward:
        for part in module:
            yield from flat(part)
    else:
        yield module


def _has_cudnn() -> bool:
    return torch.version.hip is None and torch.backends.cudnn.enabled and not torch.backends.cudnn.deterministic


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"


class Convolution:
    """A convolution and the BatchNorm in eval mode that follows it, as one convolution in `dtype`."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype):
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        bias = 0.0 if convolution.bias is None else convolution.bias.double()
        self.weight = (convolution.weight.double() * scale[:, None, None, None]).to(dtype)
        self.bias = (norm.bias.double() + scale * (bias - norm.running_mean.double())).to(dtype)
        self.geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        self.in_one_kernel = True

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, *self.geometry)

    def rectified(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """ReLU of the sum of the convolution's output and of a shortcut."""
        if x.is_cuda and self.in_one_kernel:
            try:
                if shortcut is None:
                    return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
                return torch.cudnn_convolution_add_relu(x, self.weight, shortcut, 1.0, self.bias, *self.geometry)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # cuDNN has no such kernel for these shapes on this GPU
                self.in_one_kernel = False
        return relu(self(x) if shortcut is None else self(x) + shortcut)


class ResidualBlock:
    """A block of a ResNet."""

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype):
        *self.first, self.last = (Convolution(*pair, dtype) for pair in block.residual())
        self.downsample = None if block.downsample is None else Convolution(*block.downsample, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for convolution in self.first:
            x = convolution.rectified(x)
        return self.last.rectified(x, shortcut)


class PreActivation:
    """A block of a WRN: its first convolution takes the second BatchNorm and ReLU along."""

    def __init__(self, block: PreActivationBlock, dtype: torch.dtype):
        self.block, self.first = block, Convolution(block.conv1, block.bn2, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        active = relu(block.bn1(x))
        shortcut = x if block.convShortcut is None else block.convShortcut(active)
        return shortcut + block.conv2(self.first.rectified(active))
