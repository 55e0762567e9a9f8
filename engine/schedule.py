"""The learning rate of an epoch."""

import math

from engine.config import RunConfig


def learning_rate(config: RunConfig, epoch: int) -> float:
    """The learning rate in epoch `epoch`, counted from 0."""
    rising = min((epoch + 1) / (config.lr_warmup_epochs + 1), 1.0)  # Goyal et al., arXiv 1706.02677, section 2.2
    return rising * _scheduled(config, epoch)


def _scheduled(config: RunConfig, epoch: int) -> float:
    length = -(-config.epochs // (config.lr_restarts or 1))  # of one run through the schedule
    epoch %= length
    if config.lr_schedule == "multistep":
        return config.peak_lr * config.lr_gamma ** sum(epoch >= milestone for milestone in config.lr_milestones)
    if config.lr_schedule == "cosine":
        return config.peak_lr * (1 + math.cos(math.pi * epoch / length)) / 2
    if config.lr_schedule == "linear":
        return config.peak_lr * (1 - epoch / length)
    return config.peak_lr
