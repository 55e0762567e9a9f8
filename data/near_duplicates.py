"""Images that look nearly the same, such as resized or re-encoded copies: found by a hash of 64 bits.

The hash says of an image, grey and reduced to 8 rows of 9 pixels, which pixels are lighter than the next one to the
right (the difference hash, dHash). Mirrored copies, and crops, have other hashes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 4  # bits of 64 in which near-duplicates may differ
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def difference_hash(images: Tensor) -> Tensor:
    """Of uint8 images [N, 3, H, W] the bits, float32 [N, 64], each 1 or -1."""
    grey = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMA, device=images.device))
    small = F.interpolate(grey[:, None], size=(8, 9), mode="bilinear", antialias=True)[:, 0].round()
    return torch.where(small[..., :-1] > small[..., 1:], 1.0, -1.0).flatten(1)


def is_near(hashes: Tensor, others: Tensor) -> Tensor:
    """Which of the hashes [N, 64] differ from any of the others [M, 64] in at most NEAR bits: bool [N]."""
    return (hashes @ others.T >= 64 - 2 * NEAR).any(1)
