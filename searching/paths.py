"""The trained supernet of a GTN run as a judge of members: each is a path through it, scored on held-out images.

Gate probabilities are never looked at: with alpha_phi < 0 they favour what is far from the teacher.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import UserError, derive_seed
from data.batch import Batch
from kernels import kd_loss
from models.network import Network
from models.pool import Pool, PoolNet
from models.supernet import Draw, Supernet

FILE, BRANCH = "supernet.safetensors", "branches.0.supernet."
LR, MOMENTUM = 0.05, 0.9  # of what the branches never trained
BATCH = 256  # images a forward pass


def load_supernet(folder: Path, pool: Pool, num_classes: int, image_size: int, seed: int) -> tuple[Supernet, int]:
    """(supernet from the stem on, how many of its layers no branch trained) of a run's supernet.safetensors.

    Its layers and head are those of the first branch, which has the most. The stem and the layers before that branch
    are new: every branch begins behind a block of the teacher's. Branches that share nothing have weights of their own
    for later layers; those of the first go with each other.

    Raises:
        UserError: a file that is no supernet of this pool.
    """
    torch.manual_seed(derive_seed(seed, "supernet"))
    supernet, own = Supernet(pool, num_classes), {}
    try:
        with safetensors.safe_open(folder / FILE, "pt") as file:
            saved = Pool(**json.loads(file.metadata()["pool"]))
            for name in filter(lambda name: name.startswith(BRANCH), file.keys()):
                own[name.removeprefix(BRANCH)] = file.get_tensor(name)
        if saved.for_images(image_size) != pool:
            raise ValueError("it is of another pool than model.json says")
        places = {int(name.split(".")[1]) for name in own if name.startswith("layers.")}
        fresh = len(pool.widths) - len(places)
        for part, prefix in ((supernet.layers[fresh:], "layers."), (supernet.head, "head."), (supernet.fc, "fc.")):
            tensors = {name.removeprefix(prefix): own[name] for name in own if name.startswith(prefix)}
            part.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--teacher {folder}: its {FILE} cannot be loaded ({reason})") from None
    return supernet, fresh


def complete(supernet: Supernet, fresh: int, teacher: Network, batches: Iterable[Batch], steps: int, seed: int) -> None:
    """Train the stem and the first `fresh` layers, which no branch has, for `steps` batches.

    As GTN's even steps train branches, on cross-entropy and KL(path || teacher), but on uniform paths and with all that
    is trained already, the teacher too, left as it is. Cosine schedule to 0.
    """
    supernet.requires_grad_(False).train()
    parts = nn.ModuleList([supernet.stem, supernet.layers[:fresh]]).requires_grad_(True)
    optimizer = torch.optim.SGD(parts.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(derive_seed(seed, "first layers"))
    for batch in islice(batches, steps):
        draws = [Draw(int(torch.randint(len(layer.names), (), generator=generator))) for layer in supernet.layers]
        with torch.no_grad():
            taught = teacher(batch.images)
        ce, kl = kd_loss(supernet(batch.images, draws), taught, batch.labels, direction="reverse")
        (ce + kl).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    supernet.requires_grad_(False)


@torch.no_grad()
def estimate_statistics(supernet: Supernet, draws: Sequence[Draw], images: Tensor) -> None:
    """Set the running statistics of the BatchNorms on a path to those of `images` [N, 3, H, W].

    Those that training left average over all the paths that led to a layer, and fit none of them.
    """
    for module in supernet.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the plain average over what follows
            module.reset_running_stats()
    supernet.train()
    for part in images.split(BATCH):
        if len(part) > 1:
            supernet(part, draws)
    supernet.eval()


@torch.no_grad()
def judge(supernet: Supernet, draws: Sequence[Draw], images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(top-1 in percent, cross-entropy in nats) of a path on images [N, 3, H, W] with labels [N]."""
    logits = torch.cat([supernet.eval()(part, draws) for part in images.split(BATCH)])
    top1 = 100 * (logits.argmax(1) == labels).double().mean()
    return float(top1), float(nn.functional.cross_entropy(logits.double(), labels))


def extract(supernet: Supernet, draws: Sequence[Draw], pool: Pool, images: Tensor) -> PoolNet:
    """The member that a path through a supernet of `pool` is, on the CPU, in eval mode: its weights, and BatchNorm
    statistics of `images` [N, 3, H, W]."""
    estimate_statistics(supernet, draws, images)
    names = [layer.names[draw.active] for layer, draw in zip(supernet.layers, draws, strict=True)]
    network = PoolNet(pool.spec(names), supernet.fc.out_features)
    parts = [(network.stem, supernet.stem), (network.head, supernet.head), (network.fc, supernet.fc)]
    for own, mixed, name in zip(network.layers, supernet.layers, names, strict=True):
        parts.append((own.operation, mixed.candidates[name]))
    for own, trained in parts:
        own.load_state_dict(trained.state_dict())
    return network.eval()


class Judge:
    """Scores members by their paths, each once.

    Args:
        supernet: on the device where the images are.
        seen: images [M, 3, H, W] that statistics are estimated on.
        images, labels: held-out [N, 3, H, W] and [N].
    """

    def __init__(self, supernet: Supernet, seen: Tensor, images: Tensor, labels: Tensor):
        self.supernet, self.seen, self.images, self.labels = supernet, seen, images, labels
        self.scores: dict[tuple[int, ...], tuple[float, float]] = {}

    def __call__(self, places: np.ndarray) -> tuple[float, float]:
        """(top-1 in percent, cross-entropy in nats) of the path with these candidates, [layers] int."""
        key = tuple(map(int, places))
        if key not in self.scores:
            draws = [Draw(place) for place in key]
            estimate_statistics(self.supernet, draws, self.seen)
            self.scores[key] = judge(self.supernet, draws, self.images, self.labels)
        return self.scores[key]
