"""Transfer: a linear classifier on the embeddings of a frozen network (Park et al., SFTN, section 4.5, Table 7)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import derive_seed
from models.network import Network


@dataclass
class TransferOptions:
    """How the classifier of --transfer is trained. SFTN names no settings: these are its other CIFAR-100 runs'.

    Args:
        transfer: a data set (as --dataset) that a linear classifier on the frozen network's embeddings is trained and
            tested on, at the network's image size.
        transfer_data_dir: a local copy of it, where it goes by name.
        transfer_epochs: passes over its training split.
        transfer_lr: peak learning rate of SGD; a tenth after 5/8, 6/8 and 7/8 of the epochs.
        transfer_batch_size: images a step.
        seed: of the classifier's first weights and the order of the images.
    """

    title = "transfer"

    transfer: str | None = None
    transfer_data_dir: str | None = None
    transfer_epochs: int = 240
    transfer_lr: float = 0.05
    transfer_batch_size: int = 64
    seed: int = 0


@torch.no_grad()
def embed(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], places: Iterable[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Embeddings [count, D] and labels [count] of this process's images, zeros for the others'.

    Args:
        batches: (images, labels).
        places: of each batch the rows that are its images'.
        count: images over all processes.
    """
    table = labels = None
    for (images, classes), rows in zip(batches, places, strict=True):
        embedding = network(images, features=True)[2]
        if table is None:
            table, labels = embedding.new_zeros(count, embedding.shape[1]), classes.new_zeros(count)
        table[rows], labels[rows] = embedding, classes
    return table, labels


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, options: TransferOptions
) -> dict:
    """Train a linear classifier on embeddings [N, D] and labels [N] with SGD.

    Returns:
        top1 and top1_train in percent.
    """
    embeddings, labels = train
    generator = torch.Generator().manual_seed(derive_seed(options.seed, "transfer"))
    fc = nn.Linear(embeddings.shape[1], classes)
    with torch.no_grad():  # as PyTorch starts a linear layer, but from a generator of our own
        bound = embeddings.shape[1] ** -0.5
        for parameter in fc.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    fc.to(embeddings.device)
    sgd = torch.optim.SGD(fc.parameters(), options.transfer_lr, momentum=0.9, weight_decay=5e-4)
    epochs = options.transfer_epochs
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [epochs * part // 8 for part in (5, 6, 7)])
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order.split(options.transfer_batch_size):
            sgd.zero_grad()
            F.cross_entropy(fc(embeddings[rows]), labels[rows]).backward()
            sgd.step()
        schedule.step()
    with torch.no_grad():
        top1, top1_train = (100 * (fc(x).argmax(1) == y).double().mean().item() for x, y in (test, train))
    return {"top1": top1, "top1_train": top1_train}
