"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016): depth 6n + 4, width factor k, no dropout."""

from torch import Tensor, nn
from torch.nn.functional import relu

from models.activation_checkpointing import checkpoint_if_deep
from models.network import GlobalAveragePool, Network, normal_by_fan_out


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two convolutions; the shortcut shares the first where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if stride != 1 or in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        return (x if self.convShortcut is None else self.convShortcut(active)) + self.residual(active)

    def residual(self, active: Tensor) -> Tensor:
        return self.conv2(relu(self.bn2(self.conv1(active))))


class AfterNorm(nn.Module):
    """What follows the first BatchNorm of a block whose shape changes: such a block needs nothing else."""

    def __init__(self, block: PreActivationBlock):
        super().__init__()
        self.block = block

    def forward(self, normalised: Tensor) -> Tensor:
        active = relu(normalised)
        return self.block.convShortcut(active) + self.block.residual(active)


class Stage(nn.Module):
    """n blocks in a row; the attribute `layer` is the name that published checkpoints use."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = PreActivationBlock(in_channels, out_channels, stride)
        rest = [PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(Network):
    """WRN-d-k. Its stage maps are the raw sums of the blocks, signed, before the next BatchNorm and ReLU.

    The pre-activations are the maps after that BatchNorm; the stem's map, which has none of its own, stays
    raw. From depth 100 on, blocks are recomputed in the backward pass: WRN-250-2 keeps 0.6 GB for it
    instead of 2.4 (batch 64 of 3x32x32, fp32: what autograd saves in the forward pass, each storage once,
    parameters and buffers left out).
    """

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1 or width < 1:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 and width >= 1; got {depth} and {width}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * width, 1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        normal_by_fan_out(self)
        nn.init.zeros_(self.fc.bias)

        block2, block3 = self.block2.layer[0], self.block3.layer[0]
        one, two, three = (checkpoint_if_deep(stage.layer, depth) for stage in (self.block1, self.block2, self.block3))
        after2, after3 = checkpoint_if_deep((AfterNorm(block2), AfterNorm(block3)), depth)
        head = nn.Sequential(nn.ReLU(), GlobalAveragePool())
        preact = (
            self.conv1,
            nn.Sequential(*one, block2.bn1),
            nn.Sequential(after2, *two[1:], block3.bn1),
            nn.Sequential(after3, *three[1:], self.bn1),
            head,
        )
        stages = (self.conv1, *(nn.Sequential(*blocks) for blocks in (one, two, three)))
        self.set_stages(stages, nn.Sequential(self.bn1, *head), preact, normalised=True)
