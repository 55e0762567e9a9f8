"""Methods with images in four rotations: SSKD and HSAKD."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from data.batch import Batch
from kernels import cross_entropy, kd_loss
from losses.method import Method, MethodContext, Outputs, full_precision
from losses.options import TemperatureOptions


def rotate(images: Tensor) -> Tensor:
    """[N, 3, H, H] -> [4 N, 3, H, H]: upright, then rotated by 90, 180 and 270 degrees."""
    rotated = torch.cat([images.rot90(quarter, (2, 3)) for quarter in range(4)])
    return rotated.contiguous(memory_format=torch.channels_last)


class SelfSupervised(Method):
    """A method on four rotations, with a warm-up for modules behind the teacher."""

    rotations, mixable = True, False

    def warmup_lr(self, epoch: int, lr: float) -> float:
        """A tenth after half the warm-up, and a tenth of that after three quarters."""
        return lr * 0.1 ** sum(epoch >= share * self.warmup_epochs for share in (0.5, 0.75))


class SSKD(SelfSupervised):
    """Self-supervision as an auxiliary task (Xu et al., section 3): 0.9 KD on upright images, 2.7 KD on rotated
    ones, and 10 times the divergence between teacher and student in which upright image a rotated one is most
    like, by a softmax over cosines of projected embeddings at temperature 0.5; all at T^2 KL.

    In a warm-up of 60 epochs the teacher's projection learns to match images with their rotations. Of the
    rotated images on which the teacher errs, those are kept whose true class, or upright image, it ranks
    highest: all for classes, three quarters for images. The four rotations share one crop; the authors'
    code crops each anew.
    """

    paper = "Xu et al.: Knowledge Distillation Meets Self-Supervision (2020)"
    usual = "0.9 KD, 2.7 rotated, 10 self-supervised"
    student_features = teacher_features = "embedding"
    warmup_epochs, warmup_terms = 60, {"contrast": 1.0}
    ce_weight, kd_weight = 0.1, 0.9
    options = TemperatureOptions
    TEMPERATURE = 0.5  # of the cosines
    KEPT_CLASSES, KEPT_IMAGES = 1.0, 0.75  # shares of what the teacher gets wrong

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.heads = nn.ModuleList(
            projection(outputs.embedding.shape[1]) for outputs in (context.student_outputs, context.teacher_outputs)
        )
        self.temperature = context.options.temperature
        square = self.temperature**2
        self.terms = {"sskd_rotated": 2.7 * square, "sskd_ss": 10.0 * self.TEMPERATURE**2}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        n = len(batch.labels)
        labels = batch.labels.repeat(3)
        rotated = selected_divergence(
            student.logits[n:], teacher.logits[n:], labels, self.temperature, self.KEPT_CLASSES
        )
        alike = cosines(self.heads[0](student.embedding), n)
        with torch.no_grad():
            target = cosines(self.heads[1](teacher.embedding), n)
        own = torch.arange(n, device=alike.device).repeat(3)
        ss = selected_divergence(alike, target, own, self.TEMPERATURE, self.KEPT_IMAGES)
        return {"sskd_rotated": rotated, "sskd_ss": ss}

    def warmup(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        n = len(batch.labels)
        own = torch.arange(n, device=batch.labels.device).repeat(3)
        return {"contrast": cross_entropy(cosines(self.heads[1](teacher.embedding), n), own)}

    def warmup_only(self) -> list[nn.Module]:
        return [self.heads[1]]


def projection(width: int) -> nn.Sequential:
    """The two-layer projection head."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


@full_precision
def cosines(projected: Tensor, count: int) -> Tensor:
    """[4 N, D] -> [3 N, N]: each rotated image with each upright one."""
    unit = F.normalize(projected, dim=1)
    return unit[count:] @ unit[:count].T


@full_precision
def selected_divergence(student: Tensor, teacher: Tensor, own: Tensor, temperature: float, share: float) -> Tensor:
    """mean KL(teacher || student) at `temperature` over the rows that are kept of logits [M, C].

    Kept are rows where the teacher ranks the true column `own` [M] first, and of the others the first
    `share`, by that rank; equals in the order of the rows.
    """
    rank = (teacher > teacher.gather(1, own[:, None])).sum(1)
    wrong = (rank > 0).sum()
    place = rank.argsort(stable=True).argsort(stable=True)
    kept = place < (len(rank) - wrong) + (share * wrong).floor()
    divergence = kd_loss(student, teacher, temperature=temperature, reduction="none")[1][0]
    return (divergence * kept).sum() / kept.sum().clamp(min=1)


class HSAKD(SelfSupervised):
    """Hierarchical self-supervision (Yang et al., section 3): T^2 KL on all four rotations between the logits,
    and between auxiliary classifiers, one behind every block, of class and rotation jointly (4 C); T = 3.

    An auxiliary classifier is a fresh copy of the network's later blocks; behind the last block it is a
    linear layer. The teacher's learn in the warm-up by cross-entropy, its body frozen, so that any trained teacher
    will do; the paper's own teachers are trained with them from the start.
    """

    paper = "Yang et al.: Hierarchical Self-supervised Augmented Knowledge Distillation (2021)"
    usual = "1 logits, 1 auxiliary classifiers"
    student_features = teacher_features = "maps"
    warmup_epochs, warmup_terms = 60, {"towers": 1.0}
    TEMPERATURE = 3.0

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self.student_towers = Towers(context.student, 4 * context.num_classes)
        self.teacher_towers = Towers(context.teacher, 4 * context.num_classes)
        if len(self.student_towers.towers) != len(self.teacher_towers.towers):
            raise UserError("--method hsakd: teacher and student must be cut into the same number of blocks")
        self.terms = {"hsakd_logits": self.TEMPERATURE**2, "hsakd_towers": self.TEMPERATURE**2}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = self.teacher_towers(teacher)
        auxiliary = self.student_towers(student)
        logits = kd_loss(student.logits, teacher.logits, temperature=self.TEMPERATURE)[1][0]
        towers = sum(kd_loss(s, t, temperature=self.TEMPERATURE)[1][0] for s, t in zip(auxiliary, targets, strict=True))
        return {"hsakd_logits": logits, "hsakd_towers": towers}

    def warmup(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        joint = torch.cat([4 * batch.labels + quarter for quarter in range(4)])
        return {"towers": sum(cross_entropy(logits, joint) for logits in self.teacher_towers(teacher))}

    def warmup_only(self) -> list[nn.Module]:
        return [self.teacher_towers]


class Towers(nn.Module):
    """Auxiliary classifiers behind every block of a network: from its outputs to a list of logits [N, classes]."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.towers = nn.ModuleList()
        for first in range(1, len(network.blocks)):
            later = copy.deepcopy(network.blocks[first:])
            *stage, classifier = later[-1]
            if not isinstance(classifier, nn.Linear):
                raise UserError("--method hsakd: needs a network of the zoo, which ends in a linear layer")
            tower = nn.Sequential(*later[:-1], *stage, nn.Linear(classifier.in_features, classes))
            for part in tower.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            self.towers.append(tower.requires_grad_(True).train())
        self.last = nn.Linear(network.fc.in_features, classes)

    def forward(self, outputs: Outputs) -> list[Tensor]:
        maps = outputs.maps[-len(self.towers) - 1 : -1]
        return [*(tower(x) for tower, x in zip(self.towers, maps, strict=True)), self.last(outputs.embedding)]
