"""How training images are varied: what is drawn for each, and the tensor operations that do it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common import derive_seed

POLICIES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}  # of torchvision.transforms.v2


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    kind: "crop" (`padding` zeros around, a random crop of the image's own size) or "resized_crop" (a part of
    random size and shape, resized: Szegedy et al., CVPR 2015, as torchvision has it). size: side of the result.
    flip: mirror half of the images. cutout: side of a square set to the mean colour, centred anywhere on the
    image (DeVries and Taylor, arXiv 1708.04552); 0: none. policy: one of POLICIES. erasing: the probability of random
    erasing (Zhong et al., arXiv 1708.04896), a box set to the mean colour.
    """

    size: int
    kind: str = "crop"
    padding: int = 0
    flip: bool = True
    cutout: int = 0
    policy: str = "none"
    erasing: float = 0.0

    @property
    def views(self) -> int | None:
        """How many different images it makes of one; None: more than can be counted."""
        counted = self.kind == "crop" and not self.cutout and self.policy == "none" and not self.erasing
        return (2 * self.padding + 1) ** 2 * (1 + self.flip) if counted else None

    def view(self, offsets: Tensor, flips: Tensor) -> Tensor | None:
        """Numbers [N] int64 of the views with these crops [N, 2] and mirrors [N]."""
        if self.views is None:
            return None
        places = offsets[:, 0] * (2 * self.padding + 1) + offsets[:, 1]
        return places * 2 + flips if self.flip else places


class Plan(NamedTuple):
    """How every image of an epoch is met: what to do with row `order[i]` of the split stands in place i."""

    order: Tensor  # [N] int64
    offsets: Tensor  # [N, 2] int64, rows and columns, of the crop in the padded image
    flips: Tensor  # [N] bool
    holes: Tensor  # [N, 2] int64, rows and columns, centre of the cutout; [N, 6] with the erased box of `erased_boxes`

    def part(self, begin: int, end: int, rank: int, world: int, group: int = 1) -> "Plan":
        """A process's share of the places from `begin` to `end`; each stands for `group` images in a row."""
        chosen = (each[begin * group : end * group].unflatten(0, (-1, group))[rank::world] for each in self)
        return Plan(*(each.flatten(0, 1) for each in chosen))

    def to(self, device: torch.device) -> "Plan":
        return Plan(*(each.to(device) for each in self))


class Normalise:
    """uint8 [N, 3, H, W] -> float32 (x / 255 - mean) / std, channels_last."""

    def __init__(self, mean, std, device: torch.device):
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        flat = images.permute(0, 2, 3, 1).reshape(count, height * width * channels)
        # Whole images in a row: a loop over three channels would be too short to be fast on a CPU.
        scale, shift = self.scale.repeat(height * width), self.shift.repeat(height * width)
        wide = flat.float()
        torch.addcmul(shift, wide, scale, out=wide)
        return wide.view(count, height, width, channels).permute(0, 3, 1, 2)


def select(pixels: Tensor, rows: Tensor) -> Tensor:
    """`pixels[rows]` of channels_last [M, 3, H, W], copied as whole images."""
    count, channels, height, width = pixels.shape
    chosen = pixels.permute(0, 2, 3, 1).view(count, -1).index_select(0, rows)
    return chosen.view(len(rows), height, width, channels).permute(0, 3, 1, 2)


def augment(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop [N, C, H, W] images, padded with zeros, at `offsets` [N, 2] (rows, columns), and mirror `flips` [N].

    The crop is a gather of whole rows of pixels: in channels_last memory those are W * C consecutive bytes.
    """
    count, channels, height, width = images.shape
    images = images.permute(0, 2, 3, 1)
    if padding:
        tall, wide = height + 2 * padding, width + 2 * padding
        canvas = images.new_zeros(count, tall, wide, channels)
        canvas[:, padding:-padding, padding:-padding] = images
        image = torch.arange(count, device=images.device)[:, None] * tall
        line = image + offsets[:, :1] + torch.arange(height, device=images.device)
        starts = (line * wide + offsets[:, 1:]) * channels
        length = width * channels
        lines = canvas.view(-1).as_strided((canvas.numel() - length + 1, length), (1, 1))
        images = lines.index_select(0, starts.view(-1)).view(count, height, width, channels)
    both = torch.cat([images, images.flip(2)]).view(2 * count, -1)  # select copies whole images, where() bytes
    chosen = torch.arange(count, device=images.device) + flips * count
    return both.index_select(0, chosen).view(count, height, width, channels).permute(0, 3, 1, 2)


def erased_boxes(count: int, size: int, probability: float, generator: torch.Generator) -> Tensor:
    """[count, 4] int64: top, left, bottom and right of each image's erased box, all 0 for none.

    Area and sides as in section 3.2 there, in the numbers of torchvision's RandomErasing: 0.02 to 0.33 of the image,
    sides in a ratio of 0.3 to 3.3, log-uniform; a side that does not fit is cut to the image's.
    """
    chosen, area, ratio, top, left = torch.rand(5, count, generator=generator)
    area = (0.02 + 0.31 * area) * size * size
    ratio = torch.exp(math.log(0.3) + math.log(11.0) * ratio)
    height, width = ((area * r).sqrt().round().clamp(1, size).long() for r in (ratio, 1 / ratio))
    top, left = ((place * (size - side + 1)).long() for place, side in ((top, height), (left, width)))
    boxes = torch.stack([top, left, top + height, left + width], 1)
    return boxes * (chosen < probability)[:, None]


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Zero, the mean colour, in `boxes` [N, 4] (top, left, bottom, right) of normalised images [N, C, H, W]."""
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    down = (rows >= boxes[:, :1]) & (rows < boxes[:, 2:3])
    across = (columns >= boxes[:, 1:2]) & (columns < boxes[:, 3:])
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


def apply_policy(image: Tensor, policy: str, seed: int) -> Tensor:
    """An image uint8 [3, H, W] as a policy of POLICIES varies it, a function of `seed`."""
    from torchvision.transforms import v2  # here, because torchvision is slow to import

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive_seed(seed, "policy"))
        return getattr(v2, POLICIES[policy])()(image)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Zero, the mean colour, in a square of `side` around `centres` [N, 2], clipped at the border."""
    height, width = images.shape[2:]
    first = centres - side // 2
    rows = torch.arange(height, device=images.device) - first[:, :1]
    columns = torch.arange(width, device=images.device) - first[:, 1:]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)
