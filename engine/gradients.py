"""Averaging over processes what gradients a step has."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 25 * 2**20  # bytes sent at once, as DistributedDataParallel has it


class GradientAverager:
    """Averages gradients in buckets while the backward pass still runs: those that come about, and no others.

    DistributedDataParallel sends all weights of a supernet in every step, with zeros for what was not drawn, and
    searches the graph for it first. Here every process draws the same path, so that the same gradients appear in
    the same order in all of them. A weight without a gradient keeps none.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket: int = BUCKET_BYTES):
        self.bucket, self.world = bucket, dist.get_world_size()
        self.armed = False  # whether the backward pass is a step's last
        self.waiting: list[nn.Parameter] = []
        self.size = 0  # of what waits, in bytes
        self.sent: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def finish(self) -> None:
        """After that backward pass: every gradient is its mean."""
        self._send()
        for parameters, flat, work in self.sent:
            work.wait()
            means = (flat / self.world).split([parameter.numel() for parameter in parameters])
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad.copy_(mean.view_as(parameter))
        self.sent.clear()
        self.armed = False

    def _collect(self, parameter: nn.Parameter) -> None:
        if not self.armed:
            return
        self.waiting.append(parameter)
        self.size += parameter.grad.nbytes
        if self.size >= self.bucket:
            self._send()

    def _send(self) -> None:
        if self.waiting:
            flat = torch.cat([parameter.grad.flatten() for parameter in self.waiting])
            self.sent.append((self.waiting, flat, dist.all_reduce(flat, async_op=True)))
            self.waiting, self.size = [], 0
