"""The copies of an objective that the processes of a run hold: equal weights, statistics of their own."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from common import UserError
from engine.checkpoint import state_tensors
from engine.objective import Objective


@torch.no_grad()
def is_finite(objective: Objective, accelerator: Accelerator) -> bool:
    """Whether all weights and statistics of this process are."""
    norms = [tensor.abs().max().to(accelerator.device) for tensor in _floating(objective)]
    return bool(torch.stack(norms).isfinite().all())


@torch.no_grad()
def are_equal(objective: Objective, accelerator: Accelerator) -> bool:
    """Whether all processes hold the same weights; statistics may differ within an epoch."""
    if accelerator.num_processes == 1:
        return True
    own = {id(buffer) for buffer in statistics(objective)}
    weights = [tensor for tensor in _floating(objective) if id(tensor) not in own]
    sums = torch.stack([tensor.double().sum().to(accelerator.device) for tensor in weights])
    everyone = accelerator.gather(sums[None])
    return torch.equal(everyone, everyone[:1].expand_as(everyone))


def statistics(objective: Objective) -> list[Tensor]:
    """BatchNorm statistics, and what else is no weight."""
    return [buffer for buffer in objective.buffers() if buffer.is_floating_point()]


@torch.no_grad()
def average_statistics(objective: Objective, accelerator: Accelerator) -> None:
    """Make every process's statistics their mean, at the end of an epoch."""
    if accelerator.num_processes > 1:
        for buffer in statistics(objective):
            buffer.copy_(accelerator.reduce(buffer, "mean"))


@torch.no_grad()
def gather_statistics(objective: Objective, accelerator: Accelerator) -> Tensor | None:
    """[processes, numbers]: what a run that is stopped within an epoch has to give back to each process."""
    buffers = statistics(objective)
    if accelerator.num_processes == 1 or not buffers:
        return None
    return accelerator.gather(torch.cat([buffer.double().flatten() for buffer in buffers])[None])


@torch.no_grad()
def scatter_statistics(objective: Objective, accelerator: Accelerator, gathered: Tensor | None) -> None:
    """Give each process its own back; a run of another number of processes keeps the main process's."""
    if gathered is None or len(gathered) != accelerator.num_processes:
        return
    buffers = statistics(objective)
    parts = gathered[accelerator.process_index].split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def check_all_see(checkpoint: Path, accelerator: Accelerator) -> None:
    """Raise UserError where only some processes find a checkpoint: machines that share no folder."""
    if accelerator.num_processes == 1:
        return
    found = accelerator.gather(torch.tensor([checkpoint.is_file()], device=accelerator.device))
    if found.any() and not found.all():
        missing = ", ".join(map(str, (~found).nonzero().flatten().tolist()))
        raise UserError(
            f"--resume_from_checkpoint: process {missing} does not find '{checkpoint}', which others do; put "
            "--output_dir where all machines see it"
        )


def _floating(objective: Objective) -> list[Tensor]:
    """Weights and statistics; a method may keep some of its state on the host."""
    return [tensor for tensor in state_tensors(objective).values() if tensor.is_floating_point()]
