"""Top-1 and top-5 accuracy of networks on a split."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from common import UserError

Predict = Callable[[Tensor, int], dict[str, Tensor]]  # (images, number of the batch) -> logits by network
Observe = Callable[[dict[str, Tensor], Tensor], None]  # (logits by network, labels)


@torch.no_grad()
def evaluate(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    images: int,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    observe: Observe = lambda logits, labels: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """(top-1, top-5) in percent by network name.

    Args:
        predict: logits [N, C] by network name of images [N, 3, H, W] and a batch's number.
        batches: (images, labels [N]) of this process; over all processes each image of the split once.
        images: how many the split has.
        total: a tensor's sum over processes.
        observe: called with the logits and labels of every batch.

    Raises:
        UserError: the batches held another number of images, as streams may.
    """
    correct: dict[str, Tensor] = {}
    seen = 0
    for number, (inputs, labels) in enumerate(batches):
        outputs = predict(inputs, number)
        observe(outputs, labels)
        for name, logits in outputs.items():
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            counts = torch.stack([ranked[:, 0].sum(), ranked.sum()])
            correct[name] = correct.get(name, 0) + counts
        seen += len(labels)
    sums = torch.stack([*correct.values(), torch.full_like(next(iter(correct.values())), seen)]).double()
    *sums, (met, _) = total(sums).cpu()
    if met != images:
        raise UserError(f"--streaming: {images} images were promised for evaluation, {met:.0f} came")
    percent = (100 * torch.stack(sums) / images).tolist()
    top1, top5 = ({name: top[k] for name, top in zip(correct, percent, strict=True)} for k in (0, 1))
    return top1, top5
