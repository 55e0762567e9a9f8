"""What a process settles before it trains."""

import ctypes

import pytest
import torch
from torch import nn

from engine.distributed import keep_freed_memory
from engine.gradients import GradientAverager
from tests.runs import forked_two, succeeded


@pytest.mark.parametrize(("device", "calls"), [("cpu", 3), ("cuda", 0)])
def test_the_c_library_is_told_to_keep_freed_memory_where_steps_run_on_a_cpu(device, calls, monkeypatch):
    """M_MMAP_MAX 0: no block comes from the system by itself; M_TRIM_THRESHOLD: none is given back."""
    options = {}

    class Library:
        mallopt = staticmethod(options.__setitem__)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    keep_freed_memory(torch.device(device))
    assert len(options) == calls
    assert not calls or (options[-4] == 0 and options[-1] == 2**31 - 1)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory(torch.device("cpu"))


def a_path(step: int, network: nn.ModuleList, images: torch.Tensor) -> torch.Tensor:
    """One of two middle layers, the first of all twice."""
    return network[3](network[1 + step % 2](network[0](network[0](images)))).square().mean()


def averaged(folder: str) -> None:
    """One of two processes: two steps of two parts each, over other layers, in buckets of hardly any size."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
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
    succeeded(forked_two("-c", f"from {__name__} import averaged as f; f({str(tmp_path)!r})"))
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
