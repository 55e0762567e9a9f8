"""The int8 file of a network that was trained to be one: its own roundings, stored as integers."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.deployed import Deployed
from exporters.onnx import save, trace


def write_trained_int8(deployed: Deployed, path: Path, metadata: dict) -> None:
    """Write `deployed`, whose network is a Quantized: every scale in the file is the one it was trained with.

    Weights are stored as int8. Biases become int32, in steps of the product of their input's and their weight's
    scales, as integer arithmetic adds them: less than half of such a step is all that the file differs by.
    """
    model = trace(deployed, deployed.example(), deployed.output)
    graph = model.graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    values |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in values]:
        weight, scale = values[node.input[0]], values[node.input[1]]
        steps = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).clip(-128, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(steps, node.output[0]))
        graph.node.remove(node)
    for node in [node for node in graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) > 2]:
        scales = [values[made_by[name].input[1]] for name in node.input[:2]]
        scale = (scales[0] * scales[1]).astype(np.float32)
        steps = np.rint(values[node.input[2]] / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
        parts = {"steps": steps, "scale": scale, "zero": np.zeros_like(steps)}
        names = [f"{node.output[0]}.bias.{part}" for part in parts]
        graph.initializer.extend(
            numpy_helper.from_array(each, name) for each, name in zip(parts.values(), names, strict=True)
        )
        rounded = helper.make_node("DequantizeLinear", names, [f"{node.output[0]}.bias"], axis=0)
        graph.node.insert(list(graph.node).index(node), rounded)
        node.input[2] = rounded.output[0]
    _drop_unused(graph)
    save(model, path, metadata)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for each in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(each)
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in used]:
        graph.node.remove(node)
