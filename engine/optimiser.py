"""The optimiser of a run's weights."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from common import UserError
from engine.config import RunConfig


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All that it steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def make_optimizer(config: RunConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD, as the papers have it, or one of timm's choice.

    SGD decays all parameters. The others leave those of one dimension alone, biases and what normalisations have,
    as timm does (timm.optim.create_optimizer_v2).

    Raises:
        UserError: an optimiser of timm's where timm is not installed.
    """
    parameters, lr, decay = list(parameters), config.peak_lr, config.weight_decay
    if config.opt == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=config.momentum, weight_decay=decay, nesterov=config.nesterov
        )
    decayed, others = ([each for each in parameters if (each.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay)
    try:
        from timm.optim import create_optimizer_v2
    except ImportError:
        raise UserError(f"--opt {config.opt}: needs timm; pip install -r requirements-timm.txt") from None
    return create_optimizer_v2(groups, opt=config.opt, lr=lr, weight_decay=decay, momentum=config.momentum)
