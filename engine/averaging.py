"""An exponential moving average of a network while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARMUP = 10  # steps: at the start the average spans about a tenth of the steps so far


class WeightAverage(nn.Module):
    """a <- d a + (1 - d) w over all weights and BatchNorm statistics w of a network, after every step.

    d is the least of `decay` and (1 + n) / (10 + n) after n steps, so that the average does not begin with weights that
    nobody trained (TensorFlow's ExponentialMovingAverage; timm's ModelEmaV3 has the like of it).

    The averages are buffers of this module. As a part of the objective they are moved, saved and resumed with it, and
    not trained.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self._model = (model,)  # in a tuple, as it is a part of the objective already
        self._together: list[tuple[Tensor, Tensor]] = []  # see _pairs
        for name, tensor in model.state_dict().items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (WARMUP + step))
        pairs = self._pairs()
        floating = [(average, now) for average, now in pairs if average.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [now for _, now in floating], 1 - decay)
        for average, now in pairs:
            if not average.is_floating_point():  # BatchNorm's count of batches
                average.copy_(now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network has the averages for weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """The network's tensors for the averages, and these for those."""
        for average, now in self._pairs():
            kept = now.clone()
            now.copy_(average)
            average.copy_(kept)

    def _apply(self, fn, recurse: bool = True) -> "WeightAverage":
        self._together = []  # what is moved are other tensors
        return super()._apply(fn, recurse)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(average, the network's own tensor), found once: a step would take longer to find than to average them."""
        if not self._together:
            now = self._model[0].state_dict()
            self._together = [(average, now[name.replace("/", ".")]) for name, average in self.named_buffers()]
        return self._together
