"""Parts of a network that keep the weights they came with while the rest of it trains (--freeze)."""

from collections.abc import Sequence

from common import UserError
from models.foreign import Foreign
from models.network import Network, count_parameters
from models.own import is_own
from models.weights import Loaded


def freeze(network: Network, names: Sequence[str], initial: Loaded | None, argument: str) -> str | None:
    """Keep submodules and parameters, named as `named_modules()` and `named_parameters()` do, with all that they hold.

    They have no gradient and are in eval mode: BatchNorm normalises by the statistics that it came with, and dropout
    does nothing. Names of another library's network are its own, without "net.".

    Args:
        network: with its initial weights.
        names: of the parts; none: nothing is kept.
        initial: where those weights are from; None: they are random, but for what a function of the user's own gives.
        argument: the option that names the network, and its name.

    Returns:
        A line for the user, None where there is nothing to say.

    Raises:
        UserError: no such part (the line lists those that there are), random weights, or nothing left to train.
    """
    if not names:
        return None
    said, net = f"--freeze {' '.join(names)}", network.net if isinstance(network, Foreign) else network
    parts = dict(net.named_parameters()) | {name: part for name, part in net.named_modules() if name}
    for name in names:
        if name not in parts:
            there = [*dict(net.named_children()), *dict(net.named_parameters(recurse=False))]
            raise UserError(f"--freeze {name}: is no part of {argument}, which has {', '.join(there)}, and theirs")
    network.frozen = tuple(parts[name] for name in names)
    for part in network.frozen:
        part.requires_grad_(False)
    fixed = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    random = initial is None and not (isinstance(network, Foreign) and is_own(network.name))
    if random or (initial and initial.fresh_classifier and any(each is network.fc.weight for each in fixed)):
        what = "the network" if random else "the classifier"
        raise UserError(f"{said}: would keep random weights: {what} starts fresh; give --weights or --pretrained")
    total, kept = count_parameters(network), sum(parameter.numel() for parameter in fixed)
    if kept == total:
        raise UserError(f"{said}: leaves nothing to train")
    return f"frozen: {', '.join(names)} ({kept:,} of {total:,} parameters)"
