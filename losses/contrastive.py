"""CRD: contrastive representation distillation, with memory banks."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from losses.method import Method, MethodContext, Outputs, full_precision


class CRD(Method):
    """Noise-contrastive estimation on embeddings (Tian et al., eq. 17 to 19), 128 dimensions, temperature 0.07.

    Each side has a linear layer to 128 dimensions and a bank of its latest embedding of every training image,
    M <- normalised (M + e) / 2. An image's student is matched with its teacher in the bank against K = 16,384
    teachers of images of other classes, and the other way round: with h = P / (P + K / n),
    -1/N sum_b [log h(own) + sum_k log(1 - h(k))], P = exp(<e, M> / 0.07) / Z. Z is n times the mean of the
    first batch and stays. Negatives are drawn uniformly, with repetition, on the device.

    Several processes hold the same banks: the embeddings of all of them go into each. They are stored by the
    image's index in the split, so streams cannot be used.
    """

    paper = "Tian, Krishnan, Isola: Contrastive Representation Distillation (2020)"
    weight, terms = 0.8, {"crd": 1.0}
    student_features = teacher_features = "embedding"
    mixable = False
    WIDTH, TEMPERATURE, NEGATIVES, MOMENTUM = 128, 0.07, 16384, 0.5

    def __init__(self, context: MethodContext):
        super().__init__(context)
        if context.labels is None:
            raise UserError("--method crd: keeps a memory of every training image; it cannot use --streaming")
        outputs = (context.student_outputs, context.teacher_outputs)
        # The most images a process has in a step; the last batch of an epoch may be larger than the others by a few.
        self.share = context.options.batch_size // _processes() + 3
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # indices and embeddings of the step's parts
        self.embed = nn.ModuleList(nn.Linear(each.embedding.shape[1], self.WIDTH) for each in outputs)
        bound = 1 / math.sqrt(self.WIDTH / 3)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(len(context.labels), self.WIDTH).uniform_(-bound, bound))
        self.register_buffer("z", torch.zeros(2))  # of the two directions; 0: not known yet
        counts = torch.bincount(context.labels)
        if int((counts > 0).sum()) < 2:
            raise UserError("--method crd: needs training images of at least two classes")
        # Images of a class follow each other in `by_class`, class c's from starts[c] on.
        self.register_buffer("by_class", context.labels.argsort(stable=True), persistent=False)
        self.register_buffer("starts", F.pad(counts.cumsum(0), (1, 0)), persistent=False)

    def draw_negatives(self, labels: Tensor) -> Tensor:
        """[N, K] indices of training images of classes other than `labels` [N], uniformly drawn."""
        images = len(self.by_class)
        start, end = self.starts[labels][:, None], self.starts[labels + 1][:, None]
        negatives = min(self.NEGATIVES, images)
        uniform = torch.rand(len(labels), negatives, device=labels.device, dtype=torch.float64)
        places = (uniform * (images - (end - start))).long()  # among the images of other classes
        return self.by_class[places + (places >= start) * (end - start)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        embedded = self._embed(0, student.embedding), self._embed(1, teacher.embedding)
        chosen = torch.cat([batch.indices[:, None], self.draw_negatives(batch.labels)], 1)
        ratios = [
            similarity_ratios(embedded[0], self.teacher_bank, chosen, self.TEMPERATURE),
            similarity_ratios(embedded[1], self.student_bank, chosen, self.TEMPERATURE),
        ]
        self._fix_constants(ratios)
        images = len(self.by_class)
        loss = sum(contrast(ratio, z, images) for ratio, z in zip(ratios, self.z, strict=True))
        self._pending.append((batch.indices, *(each.detach() for each in embedded)))
        return {"crd": loss}

    def after_step(self) -> None:
        """The banks are part of the loss's graph until its gradients are there."""
        self._update_banks(*(torch.cat(parts) for parts in zip(*self._pending, strict=True)))
        self._pending.clear()

    def _embed(self, side: int, embedding: Tensor) -> Tensor:
        return unit(self.embed[side](embedding))

    @torch.no_grad()
    def _fix_constants(self, ratios: list[Tensor]) -> None:
        """Z = n x mean exp(...), of the first batch, over all processes, without waiting for the device."""
        means = torch.stack([ratio.mean() for ratio in ratios]) * len(self.by_class)
        if _processes() > 1:
            dist.all_reduce(means)
            means /= _processes()
        self.z.copy_(torch.where(self.z == 0, means, self.z))

    @torch.no_grad()
    def _update_banks(self, indices: Tensor, student: Tensor, teacher: Tensor) -> None:
        if _processes() > 1:
            indices, student, teacher = (_gathered(each, self.share) for each in (indices, student, teacher))
        for bank, embedding in ((self.student_bank, student), (self.teacher_bank, teacher)):
            mixed = F.normalize(self.MOMENTUM * bank[indices] + (1 - self.MOMENTUM) * embedding.to(bank.dtype), dim=1)
            bank.index_copy_(0, indices, mixed)


@full_precision
def unit(embedding: Tensor) -> Tensor:
    """[N, D] -> rows of length 1."""
    return F.normalize(embedding, dim=1)


@full_precision
def similarity_ratios(anchors: Tensor, bank: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """exp(<anchor, bank row> / temperature): [N, 1 + K] for anchors [N, D] and rows `chosen` [N, 1 + K]."""
    # All rows and then the chosen: the product with the whole bank moves far less than its chosen rows copied.
    return ((anchors @ bank.to(anchors.dtype).T).gather(1, chosen) / temperature).exp()


@full_precision
def contrast(ratios: Tensor, z: Tensor, images: int) -> Tensor:
    """The first column against the others; `images` n in the split, so that the noise has density K / n."""
    negatives = ratios.shape[1] - 1
    density = negatives / images
    p = ratios / z
    # log h of the positive, log(1 - h) of the negatives
    own, others = p[:, 0], p[:, 1:]
    log_own = own.log() - (own + density).log()
    log_others = math.log(density) - (others + density).log()
    return -(log_own.sum() + log_others.sum()) / len(ratios)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gathered(tensor: Tensor, length: int) -> Tensor:
    """All processes' rows in one tensor, the same in every process: `length` of each, which has fewer and repeats its
    last. (Writing a row twice writes the same; gathering the lengths would make the host wait.)"""
    padded = tensor[torch.arange(length, device=tensor.device).clamp(max=len(tensor) - 1)]
    parts = [torch.empty_like(padded) for _ in range(_processes())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)
