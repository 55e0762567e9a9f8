"""The pool of students: what can be chosen, the JSON spec of one choice, and the network built from a spec.

Source: Binici et al., "Generalizing Teacher Networks" (arXiv 2407.16040), supplement, section 1 and Tables
1-3. Widths and strides of the six reconfigurable layers are read off its Table 2.

The three students of Tables 1-3 (nas_s, nas_m, nas_l) are no members of the pool, nor of any pool of six layers that
would hold all three: nas_s has no layer of 512 channels, nas_l has ten layers behind its stem. By the printed tables
students have 1.7 (nas_s) to 19 (nas_l) million parameters, more than the paper's ResNet-32 teacher (0.47).
"""

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from common import UserError, check_name, derive_seed
from models.network import (
    GlobalAveragePool,
    Network,
    conv_bn,
    count_parameters,
    initialise,
    split_last_relu,
)
from models.pool.sizes import draw_by_size
from models.pool.specs import LIMITS, check_spec, power_of_2
from models.resnet import chain

RES = re.compile(r"res([1-9]\d{0,3})x([1-9]\d{0,3})")
LARGEST_MAP = 64  # side of the map that the first reconfigurable layer takes at most, where stem_stride is not given


@dataclass
class Pool:
    """The student pool that the supernet stands for.

    Args:
        stem: channels of the 3x3 stem.
        stem_stride: stride of the stem, a power of 2; default: the least that leaves a map of at most 64x64: 1 for
            images up to 64x64, 4 at 224x224. Over 2 it is a convolution of stride 2 and 3x3 max-poolings of stride 2,
            as in ImageNet's ResNets, so that every pixel is seen.
        widths: output channels of the reconfigurable layers.
        strides: strides of the reconfigurable layers.
        head: channels of the last 1x1 convolution.
        candidates: what a layer may be: res{kernel}x{convolutions}, identity, zero.
        layers: what each layer may be, where that differs from layer to layer; empty: `candidates` in all.
        partition: reconfigurable layers in each of the blocks; empty: about equal blocks.
        shortcut: layers that keep their shape compute x + candidate(x), so that zero skips the layer.
        identity: with such a shortcut, `identity` computes x + x = 2x (added, as the other candidates are) or x
            (plain). Plain is what `zero` computes there, so that zero takes its place.
        sampling: what pool:SEED is uniform over: the choices of every layer, or the sizes of whole networks.
    """

    stem: int = 16
    stem_stride: int | None = None
    widths: list[int] = field(default_factory=lambda: [64, 64, 64, 128, 256, 512])
    strides: list[int] = field(default_factory=lambda: [1, 1, 1, 2, 2, 2])
    head: int = 1280
    candidates: list[str] = field(
        default_factory=lambda: ["res3x2", "res3x4", "res3x6", "res5x2", "res5x4", "res5x6", "identity", "zero"]
    )
    layers: list[list[str]] = field(default_factory=list)
    partition: list[int] = field(default_factory=list)
    shortcut: bool = True
    identity: Literal["added", "plain"] = "added"
    sampling: Literal["choices", "sizes"] = "choices"

    def check(self) -> None:
        """Raise UserError unless every field makes sense together with the others."""
        layers = len(self.widths)
        numbers = [self.stem, self.head, *self.widths, *self.strides, *self.partition]
        if any(type(number) is not int for number in numbers):
            raise UserError(f"pool: widths, strides and partition must be whole numbers; got {numbers}")
        if layers < 3 or len(self.strides) != layers:
            raise UserError(
                f"pool.widths and pool.strides must have the same length, at least 3; "
                f"got {self.widths} and {self.strides}"
            )
        for name, sizes in (("stem", [self.stem]), ("head", [self.head]), ("widths", self.widths)):
            if not 1 <= min(sizes) <= max(sizes) <= LIMITS["out"]:
                raise UserError(f"pool.{name} {sizes}: must be from 1 to {LIMITS['out']}")
        if not set(self.strides) <= {1, 2}:
            raise UserError(f"pool.strides {self.strides}: must be 1 or 2")
        if self.partition and (sum(self.partition) != layers or len(self.partition) < 2 or min(self.partition) < 0):
            raise UserError(f"pool.partition {self.partition} must have 2 or more parts that sum to {layers}")
        if self.stem_stride is not None and not power_of_2(self.stem_stride):
            raise UserError(
                f"pool.stem_stride {self.stem_stride!r}: must be a power of 2: 1, 2, 4, ..., {LIMITS['stride']}"
            )
        check_name("pool.sampling", self.sampling, ["choices", "sizes"])
        check_name("pool.identity", self.identity, ["added", "plain"])
        self._check_candidates("candidates", self.candidates)
        if not any(name != "zero" for name in self.candidates):
            raise UserError("pool.candidates must hold something besides 'zero'")
        if self.layers and len(self.layers) != layers:
            raise UserError(f"pool.layers: {len(self.layers)} for the {layers} of pool.widths")
        for layer, names in enumerate(self.layers):
            self._check_candidates(f"layers, layer {layer + 1}", names)
            if not self.choices(layer):
                raise UserError(f"pool.layers, layer {layer + 1}: nothing of {names} can stand there")

    @staticmethod
    def _check_candidates(where: str, names: list[str]) -> None:
        for name in names:
            if not (match := RES.fullmatch(name)):
                check_name(f"pool.{where}", name, ["res3x2", "res5x4", "identity", "zero"])
            elif int(match[1]) % 2 == 0 or int(match[2]) % 2:
                raise UserError(f"pool.{where}: '{name}' needs an odd kernel and an even depth")
            elif int(match[1]) > LIMITS["kernel"] or int(match[2]) > LIMITS["depth"]:
                most = f"kernels go up to {LIMITS['kernel']}, depths up to {LIMITS['depth']}"
                raise UserError(f"pool.{where}: '{name}' would fill any memory: {most}")
        if len(set(names)) < len(names):
            raise UserError(f"pool.{where}: must hold nothing twice")

    def for_images(self, image_size: int) -> "Pool":
        """This pool with the stem's stride for images of this side, if that is open."""
        if self.stem_stride is not None:
            return self
        stride = 1
        while -(-image_size // stride) > LARGEST_MAP:
            stride *= 2
        return replace(self, stem_stride=stride)

    def keeps_shape(self, layer: int) -> bool:
        return self.strides[layer] == 1 and self.widths[layer] == self.inputs()[layer]

    def inputs(self) -> list[int]:
        """Input channels of each reconfigurable layer."""
        return [self.stem, *self.widths[:-1]]

    def choices(self, layer: int) -> list[str]:
        """The candidates of one layer; `zero` only where a shortcut keeps the signal alive."""
        alive = self.shortcut and self.keeps_shape(layer)
        names = self.layers[layer] if self.layers else self.candidates
        if alive and self.identity == "plain":
            names = dict.fromkeys("zero" if name == "identity" else name for name in names)
        return [name for name in names if name != "zero" or alive]

    def blocks(self) -> list[int]:
        """Reconfigurable layers in each block; the stem belongs to the first block, the head to the last."""
        if self.partition:
            return self.partition
        first, *middle, last = even_blocks(len(self.widths) + 2)
        return [first - 1, *middle, last - 1]

    def layer_spec(self, layer: int, candidate: str) -> dict:
        """One layer of a student as a JSON object."""
        spec = {"type": candidate, "in": self.inputs()[layer], "out": self.widths[layer]}
        if match := RES.fullmatch(candidate):
            spec |= {"type": "res", "kernel": int(match[1]), "depth": int(match[2])}
        return spec | {"stride": self.strides[layer], "shortcut": self.shortcut and self.keeps_shape(layer)}

    def spec(self, choice: list[str]) -> dict:
        """The spec of the student that takes choice[l] in layer l; a `stem_stride` that is open is 1 (`for_images`)."""
        layers = [self.layer_spec(layer, candidate) for layer, candidate in enumerate(choice)]
        return _spec(self.stem, layers, self.head, self.blocks(), self.stem_stride or 1)

    def sample(self, seed: int) -> dict:
        """The spec of the pool's member number `seed`, uniform as `sampling` says, the same on every machine."""
        options = [self.choices(layer) for layer in range(len(self.widths))]
        if self.sampling == "sizes":
            numbers = draw_by_size(self.candidate_parameters(), seed)
        else:
            numbers = [derive_seed("pool", seed, layer) % len(names) for layer, names in enumerate(options)]
        return self.spec([names[number] for names, number in zip(options, numbers, strict=True)])

    def candidate_parameters(self) -> tuple[tuple[int, ...], ...]:
        """Parameters of each candidate that `choices` offers, layer by layer."""
        return tuple(
            tuple(_parameters(*self.layer_spec(layer, name).items()) for name in self.choices(layer))
            for layer in range(len(self.widths))
        )


def pool_of(specs: dict[str, dict]) -> Pool:
    """The pool whose layers offer what these students, by name, take there, and nothing else.

    Raises:
        UserError: students that differ in more than their layers' candidates.
    """
    first = next(iter(specs))
    stem, *layers, head, _ = specs[first]["layers"]
    pool = Pool(
        stem=stem["out"],
        stem_stride=stem["stride"],
        widths=[layer["out"] for layer in layers],
        strides=[layer["stride"] for layer in layers],
        head=head["out"],
        partition=specs[first]["blocks"],
        shortcut=any(layer["shortcut"] for layer in layers),
    )
    choices = {}
    for name, spec in specs.items():
        choices[name] = [_candidate(layer) for layer in spec["layers"][1:-2]]
        if len(choices[name]) != len(layers) or pool.spec(choices[name]) != spec:
            raise UserError(
                f"--pool_students {name}: is in no pool with {first}: they may differ in what a layer is, not in "
                "stem and its stride, widths, strides, head, blocks and shortcuts"
            )
    pool.layers = [list(dict.fromkeys(names)) for names in zip(*choices.values(), strict=True)]
    pool.candidates = list(dict.fromkeys(name for names in pool.layers for name in names))
    pool.check()
    return pool


def _candidate(layer: dict) -> str:
    return f"res{layer['kernel']}x{layer['depth']}" if layer["type"] == "res" else layer["type"]


def even_blocks(layers: int, blocks: int = 4) -> list[int]:
    """Sizes of `blocks` consecutive parts of `layers` layers, as equal as they can be."""
    edges = [round(part * layers / blocks) for part in range(blocks + 1)]
    return [after - before for before, after in pairwise(edges)]


def _spec(stem: int, layers: list[dict], head: int, blocks: list[int], stem_stride: int = 1) -> dict:
    first = {"type": "conv", "in": 3, "out": stem, "kernel": 3, "stride": stem_stride}
    last = {"type": "conv", "in": layers[-1]["out"], "out": head, "kernel": 1, "stride": 1}
    return {"layers": [first, *layers, last, {"type": "linear", "in": head}], "blocks": blocks}


def _nas(*rows: tuple[str, int, int, int, int, int]) -> dict:
    layers = []
    for kind, channels_in, channels_out, kernel, depth, stride in rows:
        layer = {"type": kind, "in": channels_in, "out": channels_out}
        layer |= {"kernel": kernel, "depth": depth} if kind == "res" else {}
        layers.append(layer | {"stride": stride, "shortcut": False})
    first, *middle, last = even_blocks(len(layers) + 2)
    return _spec(16, layers, 1280, [first - 1, *middle, last - 1])


# (type, in, out, kernel, convolutions, stride): the supplement's Tables 1, 2 and 3. "ResBlock (xn)" is n
# basic blocks, hence 2n convolutions. They are no members of the default pool (see above).
NAS_STUDENTS = {
    "nas_s": _nas(
        ("identity", 16, 16, 0, 0, 1),
        ("res", 16, 64, 3, 2, 1),
        ("res", 64, 128, 3, 2, 2),
        ("res", 128, 256, 3, 2, 2),
    ),
    "nas_m": _nas(
        ("identity", 16, 16, 0, 0, 1),
        ("res", 16, 64, 3, 4, 1),
        ("res", 64, 64, 3, 2, 1),
        ("identity", 64, 64, 0, 0, 1),
        ("res", 64, 128, 5, 4, 2),
        ("res", 128, 256, 3, 2, 2),
        ("res", 256, 512, 3, 2, 2),
    ),
    "nas_l": _nas(
        ("identity", 16, 16, 0, 0, 1),
        ("res", 16, 64, 3, 4, 1),
        ("identity", 64, 64, 0, 0, 1),
        ("res", 64, 64, 3, 6, 1),
        ("identity", 64, 128, 0, 0, 1),
        ("res", 128, 128, 3, 6, 2),
        ("identity", 128, 128, 0, 0, 1),
        ("res", 128, 128, 3, 6, 1),
        ("res", 128, 256, 3, 6, 2),
        ("res", 256, 512, 3, 6, 2),
    ),
}


class Zero(nn.Module):
    """The candidate whose output is zero; nothing is computed or stored for it."""

    def forward(self, x: Tensor) -> None:
        return None


def build_candidate(spec: dict) -> nn.Module:
    """The operation of one reconfigurable layer, without the layer's outer shortcut."""
    channels_in, channels_out, stride = spec["in"], spec["out"], spec["stride"]
    if spec["type"] == "res":
        return chain(channels_in, channels_out, stride, spec["kernel"], spec["depth"] // 2)
    if spec["type"] == "zero":
        return Zero()
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(*conv_bn(channels_in, channels_out, 1, stride))


@cache
def _parameters(*spec: tuple[str, int | str]) -> int:
    with torch.device("meta"):
        return count_parameters(build_candidate(dict(spec)))


def build_stem(channels: int, stride: int) -> nn.Sequential:
    """The pool's stem: 3x3 convolution, BatchNorm, ReLU, and for each factor of 2 over a stride of 2 a max-pooling."""
    poolings = [nn.MaxPool2d(3, 2, padding=1) for _ in range(stride.bit_length() - 2)]
    return nn.Sequential(*conv_bn(3, channels, 3, min(stride, 2)), nn.ReLU(), *poolings)


def build_head(channels_in: int, channels_out: int) -> nn.Sequential:
    """The pool's embedding: 1x1 convolution, BatchNorm, ReLU and global average pooling."""
    return nn.Sequential(*conv_bn(channels_in, channels_out, 1), nn.ReLU(), GlobalAveragePool())


class PoolLayer(nn.Module):
    """One chosen layer of a student: operation(x), plus x where the spec has a shortcut."""

    def __init__(self, spec: dict):
        super().__init__()
        self.operation = build_candidate(spec)
        self.shortcut = spec["shortcut"]

    def forward(self, x: Tensor) -> Tensor:
        out = self.operation(x)
        if out is None:
            return x
        return x + out if self.shortcut else out

    def split_last_relu(self) -> tuple[nn.Module, nn.Module]:
        return (self, nn.Identity()) if self.shortcut else split_last_relu(self.operation)


class PoolNet(Network):
    """The network of a spec, with fresh weights: stem, layers, 1x1 convolution, pooling, linear.

    Attributes:
        described: the spec's layers as JSON: those of two members may have parameters of the same names and shapes.
    """

    def __init__(self, spec: dict, num_classes: int):
        super().__init__()
        check_spec(spec)
        self.described = json.dumps(spec["layers"], sort_keys=True)
        stem, *layers, head, _ = spec["layers"]
        self.stem = build_stem(stem["out"], stem["stride"])
        self.layers = nn.ModuleList(PoolLayer(layer) for layer in layers)
        self.head = build_head(head["in"], head["out"])
        self.fc = nn.Linear(head["out"], num_classes)
        initialise(self)
        pieces, stages = list(self.layers), []
        for block, size in enumerate(spec["blocks"]):
            here, pieces = pieces[:size], pieces[size:]
            stages.append(nn.Sequential(*([self.stem] if block == 0 else []), *here))
        self.set_stages(stages, self.head)
