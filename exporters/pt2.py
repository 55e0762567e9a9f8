"""torch.export files (.pt2): the network as a graph that PyTorch runs without our code."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from exporters.deployed import Deployed, becoming


def write_pt2(deployed: Deployed, path: Path, metadata: dict) -> None:
    """Write `deployed` with a free batch size; `metadata` as JSON beside the graph."""
    with becoming("--formats pt2"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(graph_of(deployed, 2**16), path, extra_files={"metadata.json": json.dumps(metadata)})


def graph_of(deployed: Deployed, largest: int) -> torch.export.ExportedProgram:
    """`deployed` as a graph for 1 to `largest` images."""
    batch = torch.export.Dim("batch", min=1, max=largest)
    return torch.export.export(deployed, (deployed.example(),), dynamic_shapes=({0: batch},))


def load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of the images that it is fed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path).module()
