"""The types in which operations compute and return, the same in every implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_dtype(terms: Sequence[Tensor]) -> torch.dtype:
    """What the terms of a sum promote to."""
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return dtype


def accumulate_dtype(*terms: Tensor) -> torch.dtype:
    """float32, or float64 where a term has it."""
    return torch.promote_types(mixed_dtype(terms), torch.float32)
