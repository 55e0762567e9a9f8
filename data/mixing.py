"""Images mixed in pairs, and the labels of both."""

import math
import random

import torch

from common import derive_seed
from data.batch import Batch


def mix(batch: Batch, config, iteration: int, rank: int) -> Batch:
    """Every image of a batch mixed with its neighbour, all by one share (as timm does, mode "batch").

    `config` holds the run's mixup, cutmix and seed (engine.config.RunConfig).
    mixup: x <- s x + (1 - s) x', s ~ Beta(mixup, mixup) (Zhang et al., arXiv 1710.09412). cutmix: a box of x' in x,
    anywhere, of the area 1 - s before it is clipped at the border, s ~ Beta(cutmix, cutmix) (Yun et al., arXiv
    1905.04899). Where both are above 0, each batch is given to one of them by a fair coin; what is drawn depends on
    seed, iteration and process alone. A process mixes its own part of the batch.
    """
    draw = random.Random(derive_seed(config.seed, "mix", iteration, rank))
    cut = config.cutmix > 0 and (not config.mixup or draw.random() < 0.5)
    alpha = config.cutmix if cut else config.mixup
    share = draw.betavariate(alpha, alpha)
    images, others = batch.images, batch.images.roll(1, 0)
    if cut:
        height, width = images.shape[2:]
        top, bottom = _side(height, share, draw)
        left, right = _side(width, share, draw)
        images = images.clone(memory_format=torch.channels_last)
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(others, images, share)
    # Filled in and not copied from the host, which would wait for the device.
    return batch._replace(
        images=images, partners=batch.labels.roll(1, 0), share=torch.full((), share, device=images.device)
    )


def _side(length: int, share: float, draw: random.Random) -> tuple[int, int]:
    """Begin and end of a box's side, its centre anywhere on the image."""
    half, centre = int(length * math.sqrt(1 - share)) // 2, draw.randrange(length)
    return max(centre - half, 0), min(centre + half, length)
