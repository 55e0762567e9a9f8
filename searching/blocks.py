"""The folder that a device is profiled with: blocks and whole members as ONNX, and the script that measures them."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx.external_data_helper import set_external_data
from torch import nn

from common import UserError, derive_seed
from exporters.onnx import OPSET, trace
from models.network import count_parameters
from models.pool import PoolNet
from searching import device
from searching.members import Members, blocks

WHOLE = 20  # members measured whole that the overhead is fitted on, and as many more to test it
NOISE, WEIGHTS = "noise.bin", "random"
PAGE = 4096  # bytes: at multiples of it a file can be mapped into memory
LARGEST = 2**31 - 2**20  # bytes of weights, in an ONNX file

Bar = Callable[[Iterable, int, str], Iterator]  # what goes through it, how many, and what it is called


def write_folder(folder: Path, members: Members, num_classes: int, image_size: int, seed: int, bar: Bar) -> None:
    """Write blocks.json, its ONNX files, their weights and profile_device.py, which needs nothing of ours.

    The files hold a few kilobytes each, their weights are all in one: see `Noise`.

    Raises:
        UserError: a pool with one member, or with what no ONNX file can hold.
    """
    check(members, num_classes, image_size)
    folder.mkdir(parents=True, exist_ok=True)
    noise, shapes = Noise(), {}
    kept = {f"member{i}": members.choice(each) for i, each in enumerate(drawn(members, seed))}
    with torch.device("meta"):
        for name, module, shape in bar(blocks(members.pool, num_classes, image_size), sum(members.shape) + 2, "blocks"):
            write(module, shape, folder / f"{name}.onnx", noise)
            shapes[name] = shape
    for name, choice in bar(kept.items(), len(kept), "members"):
        shapes[name] = write_whole(members.pool.spec(choice), num_classes, image_size, folder / f"{name}.onnx", noise)
    noise.write(folder)
    described = {"opset": OPSET, "weights": WEIGHTS, "image_size": image_size, "num_classes": num_classes}
    described |= {"pool": asdict(members.pool), "members": kept, "shapes": shapes}
    (folder / "blocks.json").write_text(json.dumps(described, indent=1) + "\n")
    shutil.copyfile(device.__file__, folder / "profile_device.py")


def check(members: Members, num_classes: int, image_size: int) -> None:
    """Raise UserError for a pool of which no profile can be made, before anything is."""
    if len(members) < 2:
        raise UserError(
            "--pool: has a single member, of which no profile can be tested; give budgets in params and macs"
        )
    with torch.device("meta"):
        parameters = {
            name: count_parameters(module) for name, module, _ in blocks(members.pool, num_classes, image_size)
        }
    if 4 * (largest := members.by_block(parameters).max()) > LARGEST:
        raise UserError(
            f"--pool: its largest member has {largest:,.0f} parameters, and an ONNX file holds 2 GB; make the pool "
            "smaller, or give budgets in params and macs"
        )


def drawn(members: Members, seed: int) -> list[int]:
    """Numbers of the members that are measured whole, uniform: one half to fit, the other to test."""
    generator = np.random.default_rng(derive_seed("profile", seed))
    return generator.choice(len(members), 2 * min(WHOLE, len(members) // 2), replace=False).tolist()


class Noise:
    """noise.bin: random weights that all files of a folder share, so that it stays small.

    Each tensor of a file takes another stretch of it. These begin a page apart and overlap, but no two are alike.
    Weights that are alike would be measured too fast: large members by up to a sixth.

    Attributes:
        length: bytes of the longest file's stretches.
        fan_in: the largest of a tensor; with a variance of 1 / fan_in no member's activations explode.
    """

    def __init__(self):
        self.length, self.fan_in = 0, 1

    def move(self, graph: onnx.GraphProto) -> None:
        """Let a graph's weights, of 2 dimensions at least, be in noise.bin; what they were is lost."""
        weights = [each for each in graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) > 1]
        for place, tensor in enumerate(weights):
            size = 4 * math.prod(tensor.dims)
            set_external_data(tensor, NOISE, place * PAGE, size)
            tensor.ClearField("raw_data")
            self.length = max(self.length, place * PAGE + size)
            self.fan_in = max(self.fan_in, math.prod(tensor.dims[1:]))

    def write(self, folder: Path) -> None:
        """Write noise.bin, for all graphs so far."""
        values = np.random.default_rng(0).standard_normal(self.length // 4, dtype=np.float32)
        (values / np.float32(self.fan_in**0.5)).astype("<f4").tofile(folder / NOISE)


def write_whole(
    spec: dict, num_classes: int, image_size: int, path: Path, noise: Noise | None = None
) -> tuple[int, int, int]:
    """As `write`, the student of a spec; the shape of its images."""
    with torch.device("meta"):
        student = PoolNet(spec, num_classes)
    write(nn.Sequential(*student.blocks), (3, image_size, image_size), path, noise)
    return 3, image_size, image_size


def write(module: nn.Module, shape: tuple[int, int, int], path: Path, noise: Noise | None = None) -> None:
    """Write a module of the `meta` device that takes [N, *shape], in eval mode, with random weights.

    They are in the file, as a student is shipped, or are left to `noise`, whose file is to stand beside this one.
    """
    module, generator = module.eval().to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for tensor in (each.detach() for each in (*module.parameters(), *module.buffers())):
        if tensor.dim() == 0:  # batches seen
            tensor.fill_(1)
        elif tensor.dim() == 1:  # variances among them
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, (len(tensor) / tensor.numel()) ** 0.5, generator=generator)
    with torch.device("cpu"):
        model = trace(module, torch.zeros(1, *shape), "output", f"--pool: {path.stem}")
    if noise:
        noise.move(model.graph)
    onnx.save(model, path)
