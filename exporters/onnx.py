"""ONNX files: written, quantised, and run by ONNX Runtime."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from common import UserError
from exporters.deployed import Deployed, becoming

OPSET = 18
INT8_OPERATORS = [
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Relu",
    "Clip",
    "Concat",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
]


def write_onnx(deployed: Deployed, path: Path, metadata: dict) -> None:
    """Write `deployed` with a free batch size; `metadata` are strings, or what JSON can hold."""
    save(trace(deployed, deployed.example(), deployed.output), path, metadata)


def save(model: onnx.ModelProto, path: Path, metadata: dict) -> None:
    """Write a model that has been checked; `metadata` as above."""
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def trace(module: nn.Module, example: Tensor, output: str, argument: str = "--formats onnx") -> onnx.ModelProto:
    """A module that takes `images` and gives `output`, each with a free batch size, as ONNX.

    By the tracing exporter: our forward passes have no control flow that depends on data, and it takes seconds where
    the one on torch.export takes a minute. What a file computes is proven afterwards.

    Raises:
        UserError: a module that cannot be traced; it names `argument`.
    """
    torch.onnx.register_custom_op_symbolic("aten::channel_shuffle", _channel_shuffle, OPSET)  # it knows none
    file = io.BytesIO()
    with becoming(argument), quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            (example,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[output],
            dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
        )
    return onnx.load_from_string(file.getvalue())


def write_int8(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Quantise an ONNX file after training: weights int8 a channel, activations uint8 from the range on `batches`."""
    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        prepared = Path(folder) / source.name
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            path,
            _Calibration(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=INT8_OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def load_onnx(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The file as a function of the images that it is fed, on the CPU.

    The function raises UserError for numbers of images that the file does not take.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is said below
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        except (Fail, InvalidArgument):
            raise UserError(
                f"{path.name}: fails on {len(images)} images; a network that makes their number a constant does that: "
                "in its forward pass x.shape[0] stays free where len(x) does not"
            ) from None

    return run


@symbolic_helper.parse_args("v", "i")
def _channel_shuffle(graph, images, groups: int):
    """Channels of [N, C, H, W] as a grid of `groups` rows, read by columns."""

    def constant(values: list[int]):
        return graph.op("Constant", value_t=torch.tensor(values))

    shape = graph.op("Shape", images)  # the exporter may not know it
    sides = graph.op("Slice", shape, constant([2]), constant([4]))
    rows = graph.op("Concat", constant([0, groups, -1]), sides, axis_i=0)  # 0: as it is
    grid = graph.op("Reshape", images, rows)
    return graph.op("Reshape", graph.op("Transpose", grid, perm_i=[0, 2, 1, 3, 4]), shape)


class _Calibration(CalibrationDataReader):
    """Batches as ONNX Runtime asks for them."""

    def __init__(self, batches: Iterable[Tensor]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._batches, None)
        return None if images is None else {"images": images.numpy()}


@contextmanager
def quiet():
    """Without the exporter's and the quantiser's remarks to their own developers."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
