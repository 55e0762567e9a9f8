"""Knowledge distillation as others run it, for benchmarks/training.py: KD at alpha 0.9 and temperature 4, by SGD."""

import logging
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

LR, MOMENTUM, WEIGHT_DECAY, ALPHA, TEMPERATURE = 0.05, 0.9, 5e-4, 0.9, 4.0
WORKERS = 2


def loader_options(batch_size: int, device: torch.device) -> dict:
    """What both scripts give torch.utils.data.DataLoader."""
    pinned = device.type == "cuda"
    return {"batch_size": batch_size, "num_workers": WORKERS, "persistent_workers": True, "pin_memory": pinned}


def plain_script(
    teacher: nn.Module, student: nn.Module, dataset: Dataset, batch_size: int, device: torch.device
) -> float:
    """Images a second of a training script as any user of PyTorch writes it, over two epochs after a first."""
    teacher, student = teacher.to(device).eval(), student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(dataset, shuffle=True, **loader_options(batch_size, device))

    def epoch() -> None:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                taught = teacher(images)
            logits = student(images)
            kl = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1), F.softmax(taught / TEMPERATURE, 1), reduction="batchmean"
            )
            loss = (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # for the progress bar that such scripts have

    return len(dataset) / sum(seconds(epoch))


def torchdistill_script(
    teacher: nn.Module, student: nn.Module, dataset: Dataset, batch_size: int, device: torch.device
) -> float:
    """The same of torchdistill's distillation box, driven as in its example of image classification.

    Raises:
        ImportError: it is not installed (requirements-torchdistill.txt).
    """
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    paths = {f"{side}_module_path": "." for side in ("student", "teacher")}
    ios = {f"{side}_module_io": "output" for side in ("student", "teacher")}
    # Its alpha is the weight of the labels.
    kd = {"key": "KDLoss", "kwargs": paths | ios | {"temperature": TEMPERATURE, "alpha": 1 - ALPHA}}
    config = {
        "num_epochs": 3,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": loader_options(batch_size, device),
        },
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    networks = teacher.to(device).eval(), student.to(device).train()
    box = get_distillation_box(*networks, {"train": dataset}, config, device, None, False, 1)

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for images, labels, more in box.train_data_loader:
            images, labels = images.to(device), labels.to(device)
            box.pre_forward_process()
            loss = box.forward_process(images, labels, more)
            box.post_forward_process(loss=loss)
            loss.item()  # for its log

    return len(dataset) / sum(seconds(epoch))


def seconds(epoch) -> Iterator[float]:
    """Half the seconds of each of two epochs, after one that starts the workers."""
    epoch()
    for _ in range(2):
        start = time.perf_counter()
        epoch()
        yield (time.perf_counter() - start) / 2
