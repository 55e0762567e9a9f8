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
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with becoming("pt2"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(deployed, (deployed.example(),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of the images that it is fed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path).module()
