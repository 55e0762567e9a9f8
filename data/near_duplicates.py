"""Images that look nearly the same, such as resized or re-encoded copies: found by a hash of 64 bits.

The hash is of an image's grey and coarse structure (pHash: Zauner, Implementation and Benchmarking of Perceptual Image
Hash Functions, 2010): reduced to 32x32 pixels, which of the 8x8 lowest frequencies of its cosine transform are above
their median. Mirrored copies, and crops, have other hashes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 6  # bits of 64 in which near-duplicates may differ
SIDE, FREQUENCIES = 32, 8
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def perceptual_hash(images: Tensor) -> Tensor:
    """Of uint8 images [N, 3, H, W] the bits, float32 [N, 64], each 1 or -1."""
    grey = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMA))
    small = F.interpolate(grey[:, None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
    places = (torch.arange(SIDE) + 0.5) * math.pi / SIDE
    waves = torch.cos(torch.arange(FREQUENCIES)[:, None] * places)
    spectrum = (waves @ small @ waves.T).flatten(1)
    return torch.where(spectrum > spectrum.median(1, keepdim=True).values, 1.0, -1.0)


def is_near(hashes: Tensor, others: Tensor) -> Tensor:
    """Which of the hashes [N, 64] differ from any of the others [M, 64] in at most NEAR bits: bool [N]."""
    return (hashes @ others.T >= 64 - 2 * NEAR).any(1)
