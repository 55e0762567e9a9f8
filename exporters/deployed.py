"""The network as it is shipped: one input, one output."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common import UserError
from models.network import Network


class Deployed(nn.Module):
    """Images to logits or, with preprocessing, bytes to probabilities.

    Without preprocessing: float32 [N, 3, H, W], normalised as in training, to logits [N, C]. With it: uint8
    [N, 3, H, W], RGB from 0 to 255, to probabilities [N, C]; the normalisation is part of the network. Where `softmax`
    is False it ends with the logits.
    """

    def __init__(self, network: Network, preprocessing: bool, softmax: bool = True):
        super().__init__()
        self.network, self.preprocessing, self.softmax = network, preprocessing, softmax and preprocessing
        for name, values in (("mean", network.info.mean), ("std", network.info.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))
        self.eval()

    @property
    def output(self) -> str:
        """What the output is called."""
        return "probabilities" if self.softmax else "logits"

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network((images.float() - self.mean) / self.std if self.preprocessing else images)
        return logits.softmax(1) if self.softmax else logits

    def given(self, images: Tensor) -> Tensor:
        """What the file is fed for images [N, 3, H, W] that are normalised as in training."""
        if not self.preprocessing:
            return images
        return (images * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)

    def example(self, count: int = 2) -> Tensor:
        """Random images of the right shape and type."""
        side = self.network.info.image_size
        return self.given(torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)))


@contextmanager
def becoming(argument: str) -> Iterator[None]:
    """Within it, what an exporter raises is a UserError: of networks that are not the zoo's it may not know a part."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the exporter's, or the network's own under its tracer
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{argument}: the network cannot be written ({reason})") from None
