"""What a process settles before it trains."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine.gradients import GradientAverager
from tests.runs import ROOT

PAGES = """
import resource, sys, torch
from engine.distributed import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**18)  # 48 MB, given back at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
@pytest.mark.parametrize(("keep", "pages"), [("keep", range(100)), ("leave", range(20, 10**6))])
def test_freed_memory_is_used_again_without_asking_for_its_pages(keep, pages):
    """Page faults of the fourth of four large tensors; were pages of 2 MB instead of 4 KB, "leave" had 24."""
    command = [sys.executable, "-c", PAGES, keep]
    faults = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert faults in pages


def a_path(step: int, network: nn.ModuleList, images: torch.Tensor) -> torch.Tensor:
    """One of two middle layers, the first of all twice."""
    return network[3](network[1 + step % 2](network[0](network[0](images)))).square().mean()


def averaged(rank: int, folder: str) -> None:
    """One of two processes: two steps of two parts each, over other layers, in buckets of hardly any size."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)).to(memory_format=torch.channels_last)
    averager = GradientAverager(network.parameters(), bucket=400)
    found = []
    for step in range(2):
        network.zero_grad()
        for part in range(2):
            averager.armed = part == 1
            a_path(step, network, batch(step, rank, part)).backward()
        averager.finish()
        found.append([None if each.grad is None else each.grad.clone() for each in network.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def batch(step: int, rank: int, part: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4 * step + 2 * rank + part))


def test_only_gradients_that_there_are_are_averaged(tmp_path):
    torch.multiprocessing.spawn(averaged, (str(tmp_path),), nprocs=2)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    network = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
    for step in range(2):
        network.zero_grad()
        sum(a_path(step, network, batch(step, rank, part)) for rank in (0, 1) for part in (0, 1)).backward()
        for mine, other, parameter in zip(ours[step], theirs[step], network.parameters(), strict=True):
            assert (mine is None) == (parameter.grad is None)
            if mine is not None:
                assert torch.equal(mine, other)
                torch.testing.assert_close(mine, parameter.grad / 2)
