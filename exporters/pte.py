"""ExecuTorch files (.pte): the network lowered to XNNPACK, for phones and boards, and run by ExecuTorch's runtime."""

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor

from common import UserError
from exporters.deployed import Deployed, becoming
from exporters.pt2 import graph_of

MAX_BATCH = 32  # images a call: the runtime plans its memory for the most that it may get


def check_executorch() -> None:
    """Raise UserError where ExecuTorch, or what it needs, is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.runtime  # noqa: F401
    except ImportError:
        raise UserError(
            "--formats pte: needs ExecuTorch; pip install --no-deps -r requirements-executorch.txt"
        ) from None


def write_pte(deployed: Deployed, path: Path, metadata: dict) -> None:
    """Write `deployed` for 1 to MAX_BATCH images; its method `metadata` returns `metadata` as JSON."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    # Its compiler of schemas, which it looks for on the PATH: there only in an activated environment.
    (package,) = importlib.util.find_spec("executorch").submodule_search_locations
    os.environ.setdefault("FLATC_EXECUTABLE", str(Path(package, "data/bin/flatc")))
    # What would narrow the batch size to numbers like the example's: PyTorch's choice between its own convolutions, and
    # ExecuTorch's check of the graph, which takes the length of the first of several results for their number.
    unchecked = EdgeCompileConfig(_check_ir_validity=False)
    planned = MemoryPlanningPass(alloc_graph_input=False)  # images stay where the caller has them
    with becoming("--formats pte"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
            lowered = to_edge_transform_and_lower(
                graph_of(deployed, MAX_BATCH),
                partitioner=[XnnpackPartitioner()],
                constant_methods={"metadata": json.dumps(metadata)},
                compile_config=unchecked,
            )
            path.write_bytes(lowered.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planned)).buffer)


def load_pte(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The file as a function of the images that it is fed, MAX_BATCH in a call of the runtime."""
    from executorch.extension.pybindings import _portable_lib
    from executorch.runtime import Runtime, Verification

    with becoming("--formats pte"), redirect_stderr(io.StringIO()):  # its remarks on the processor
        _portable_lib._unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(path, verification=Verification.Minimal)  # the wheel has no other
        method = program.load_method("forward")
        most = method.metadata.input_tensor_meta(0).sizes()[0]
        if most != MAX_BATCH:
            raise ValueError(f"it came to take {most} images, not up to {MAX_BATCH}")

    def run(images: Tensor) -> Tensor:
        try:
            return torch.cat([method.execute([part])[0] for part in images.contiguous().split(MAX_BATCH)])
        except RuntimeError as error:
            raise UserError(f"{path.name}: fails on {len(images)} images ({error})") from None

    return run
