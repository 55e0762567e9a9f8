"""The contract of every network: stages, an embedding, a classifier, and blocks to cut at."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A classifier made of stages, an `embed` head and a linear layer `fc`.

    A subclass builds its modules and then calls `set_stages`. After that

    - `model(x)` gives logits [N, C] for images [N, 3, H, W];
    - `model(x, features=True)` gives (logits, [one feature map a stage], embedding [N, D]);
    - `model.blocks` is the tuple of blocks that SFTN and GTN cut at; running them in order is the forward
      pass, so the last one ends in the logits.

    Stages, blocks and `embed` are not registered as submodules a second time: what they are made of is
    registered by the subclass, so that parameter names stay those of the field's published checkpoints.
    """

    fc: nn.Linear

    def set_stages(self, stages: Sequence[nn.Module], embed: nn.Module) -> None:
        self.stages = tuple(stages)
        object.__setattr__(self, "embed", embed)
        self.blocks = (*self.stages[:-1], nn.Sequential(self.stages[-1], embed, self.fc))

    def forward(self, x: Tensor, features: bool = False):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        embedding = self.embed(x)
        logits = self.fc(embedding)
        return (logits, maps, embedding) if features else logits


def global_average_pool() -> nn.Sequential:
    """[N, C, H, W] -> [N, C]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution with "same" padding for odd kernels and no bias, and its BatchNorm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


def initialise(module: nn.Module) -> None:
    """He et al. (2015): normal convolution weights scaled by fan-out; BatchNorm starts as the identity."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def run_blocks(model: Network, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Feature maps after every block but the last, and the logits."""
    maps, x = [], images
    for block in model.blocks[:-1]:
        x = block(x)
        maps.append(x)
    return maps, model.blocks[-1](x)


@torch.no_grad()
def block_shapes(model: Network, image_size: int) -> list[tuple[int, int]]:
    """(channels, side) of the feature map after every block but the last, for square images."""
    training = model.training
    probe = torch.zeros(1, 3, image_size, image_size, device=model.fc.weight.device, dtype=model.fc.weight.dtype)
    maps, _ = run_blocks(model.eval(), probe)
    model.train(training)
    return [(feature.shape[1], feature.shape[2]) for feature in maps]
