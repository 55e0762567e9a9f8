"""The folder that a device is profiled with: blocks and whole members as ONNX, and the script that measures them."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from common import UserError, derive_seed
from exporters.onnx import OPSET, trace
from models.pool import PoolNet
from searching import device
from searching.members import Members, blocks

WHOLE = 20  # members measured whole that the overhead is fitted on, and as many more to test it

Bar = Callable[[Iterable, int, str], Iterator]  # what goes through it, how many, and what it is called


def write_folder(folder: Path, members: Members, num_classes: int, image_size: int, seed: int, bar: Bar) -> None:
    """Write blocks.json, its ONNX files and profile_device.py, which measures them and needs nothing of ours.

    The files hold a few kilobytes each: all values of a tensor of weights are alike there.

    Raises:
        UserError: a pool with one member.
    """
    if len(members) < 2:
        raise UserError(
            "--pool: has a single member, of which no profile can be tested; give budgets in params and macs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shapes, kept = {}, {f"member{i}": members.choice(each) for i, each in enumerate(drawn(members, seed))}
    with torch.device("meta"):
        for name, module, shape in bar(blocks(members.pool, num_classes, image_size), sum(members.shape) + 2, "blocks"):
            write(module, shape, folder / f"{name}.onnx")
            shapes[name] = shape
    for name, choice in bar(kept.items(), len(kept), "members"):
        shapes[name] = write_whole(members.pool.spec(choice), num_classes, image_size, folder / f"{name}.onnx")
    described = {"opset": OPSET, "image_size": image_size, "num_classes": num_classes, "pool": asdict(members.pool)}
    (folder / "blocks.json").write_text(json.dumps(described | {"members": kept, "shapes": shapes}, indent=1) + "\n")
    shutil.copyfile(device.__file__, folder / "profile_device.py")


def drawn(members: Members, seed: int) -> list[int]:
    """Numbers of the members that are measured whole, uniform: one half to fit, the other to test."""
    generator = np.random.default_rng(derive_seed("profile", seed))
    return generator.choice(len(members), 2 * min(WHOLE, len(members) // 2), replace=False).tolist()


def write_whole(spec: dict, num_classes: int, image_size: int, path: Path, light: bool = True) -> tuple[int, int, int]:
    """As `write`, the student of a spec; the shape of its images."""
    with torch.device("meta"):
        student = PoolNet(spec, num_classes)
    write(nn.Sequential(*student.blocks), (3, image_size, image_size), path, light)
    return 3, image_size, image_size


def write(module: nn.Module, shape: tuple[int, int, int], path: Path, light: bool = True) -> None:
    """Write a module of the `meta` device that takes [N, *shape], in eval mode, with weights of some value.

    In a `light` file they are one number, 1 / fan-in, and a shape, which ONNX Runtime fills when it loads the file;
    large members run up to a sixth faster so than from a file with all weights in it, as a student is shipped.
    """
    module, generator = module.eval().to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for tensor in (each.detach() for each in (*module.parameters(), *module.buffers())):
        if tensor.dim() < 2:
            tensor.fill_(1)
        else:  # not alike: the exporter writes equal tensors once
            tensor.normal_(0, (len(tensor) / tensor.numel()) ** 0.5, generator=generator)
    with torch.device("cpu"):
        graph = (model := trace(module, torch.zeros(1, *shape), "output")).graph
    if not light:
        onnx.save(model, path)
        return
    kept, fillings = [], []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            kept.append(tensor)
            continue
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [tensor.dims[0] / np.prod(tensor.dims)])
        kept.append(numpy_helper.from_array(np.array(tensor.dims, dtype=np.int64), f"{tensor.name}.shape"))
        fillings.append(helper.make_node("ConstantOfShape", [f"{tensor.name}.shape"], [tensor.name], value=value))
    nodes = [*fillings, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    onnx.save(model, path)
