"""The ranking of a pool's members by the supernet that a GTN run has kept, from the run folder to a score for each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from common import UserError
from data.batch import Batch
from data.datasets import hold_out, load_images
from data.loader import Loader
from data.pipeline import Pipeline
from data.splits import AnySplit
from models.pool import PoolNet
from models.supernet import Draw
from reports.subject import Subject
from searching.members import Members
from searching.paths import BATCH, Judge, complete, extract, load_supernet
from searching.ranking import Ranking, by_chance, draw_paths, predict, rank_correlation

HELD_OUT = 0.1  # of the training images of a run that kept none apart

Bar = Callable[[Iterable, int, str], Iterator]
Say = Callable[[str], None]


@dataclass
class ScoringOptions:
    """How members are scored by the teacher's supernet.

    Args:
        paths: how many members are scored to predict the scores of all.
        images: held-out images that a path is scored on, and as many training images for its BatchNorm statistics; at
            most as many as there are.
        first_steps: batches that the stem and the first layers, which no branch has, are trained for.
        first_batch_size: images of such a batch.
        data_dir: a local copy of the named data set; default: the run's.
        seed: seeds everything random in the search.
    """

    title = "scores of members by the supernet"

    paths: int = 300
    images: int = 512
    first_steps: int = 300
    first_batch_size: int = 64
    data_dir: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        limits = {"paths": (2, 10**6), "images": (2, 2**24), "first_steps": (1, 10**6), "first_batch_size": (2, 2**20)}
        for name, (least, most) in (limits | {"seed": (0, 2**63 - 1)}).items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)}: must be from {least} to {most}")


@dataclass
class Images:
    """What paths are scored with: training batches, and on the device images [N, 3, H, W] and labels [N].

    Attributes:
        loader: of the training images.
        seen: training images, as they are evaluated.
        held, labels: images that were held out.
        unseen: whether the teacher's run held them out, too.
    """

    loader: Loader
    seen: Tensor
    held: Tensor
    labels: Tensor
    unseen: bool


@dataclass
class Paths:
    """The members, by number, as paths through the supernet."""

    members: Members
    judge: Judge

    def score(self, member: int) -> float:
        """Top-1 of a member's path on held-out images, in percent."""
        return self.judge(self.members.places([member])[0])[0]

    def network(self, member: int) -> PoolNet:
        """A member with its path's weights and the statistics that it is scored with."""
        draws = [Draw(int(place)) for place in self.members.places([member])[0]]
        return extract(self.judge.supernet, draws, self.members.pool, self.judge.seen)


def score_pool(
    members: Members, macs: np.ndarray, subject: Subject, options: ScoringOptions, bar: Bar, say: Say
) -> tuple[Ranking, Paths]:
    """The ranking of all members, whose multiply-accumulates are `macs` [members], and their paths.

    Raises:
        UserError: a supernet that is not this pool's, or a data set that nothing can be held out of.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = subject.info
    supernet, fresh = load_supernet(subject.folder, members.pool, info.num_classes, info.image_size, options.seed)
    images = load_scoring_images(subject, options, place)
    if not images.unseen:
        say(
            "scores: on training images that the supernet has seen, as the teacher's run held none out; "
            "train_teacher.py --val_fraction 0.1 keeps some apart"
        )
    supernet, teacher, steps = supernet.to(place), subject.network.to(place), options.first_steps
    say(f"scores: no branch has the stem and the first {fresh} layer(s): trained now, {steps} batches of uniform paths")
    complete(supernet, fresh, teacher, bar(batches(images.loader), steps, "first layers"), steps, options.seed)
    judge = Judge(supernet, images.seen, images.held, images.labels)
    drawn = draw_paths(members, options.paths, options.seed)
    found = [judge(row)[0] for row in bar(drawn, len(drawn), "paths")]
    scores, spearman = predict(members, drawn, found, len(images.held))
    ranking = Ranking("the supernet's top-1", "predicted top-1 of the path, %", scores, len(drawn), spearman)
    ranking.median, ranking.chance = float(np.median(found)), by_chance(images.labels.cpu().numpy())
    message = f"{len(drawn)} paths on {len(images.held)} images have a top-1 of {min(found):.1f} to {max(found):.1f}%, "
    message += f"half of them at most {ranking.median:.1f}%; guessing seldom has more than {ranking.chance:.1f}%"
    if spearman is not None:
        ranking.macs_spearman = rank_correlation(members, macs, drawn, found)
        message += f"; the regression predicts unseen ones with Spearman {spearman:.2f}, multiply-accumulates with "
        message += f"{ranking.macs_spearman:.2f}"
    say(f"scores: {message}")
    return ranking, Paths(members, judge)


def load_scoring_images(subject: Subject, options: ScoringOptions, place: torch.device) -> Images:
    """The images of the teacher's run, normalised as it knows them; never those of the test split."""
    info, own = subject.info, subject.options
    own.data_dir, own.seed = options.data_dir or own.data_dir, options.seed
    data = subject.build(load_images(info.dataset, info.image_size, True, own, place))
    unseen = own.val_fraction > 0
    data, held = hold_out(data, own.val_fraction or HELD_OUT, "scores")
    pipeline = Pipeline(data, own, place)
    seen, _ = all_images(pipeline, data.train, options.images)
    return Images(
        pipeline.training(data.train, options.first_batch_size),
        seen,
        *all_images(pipeline, held, options.images),
        unseen,
    )


def all_images(pipeline: Pipeline, split: AnySplit, most: int) -> tuple[Tensor, Tensor]:
    """(images [n, 3, H, W], labels [n]) of up to `most` images, evenly spread over a split, whose classes may be
    sorted."""
    split = split.take(torch.linspace(0, len(split) - 1, min(most, len(split))).round().long())
    images, labels = zip(*pipeline.evaluation(split, BATCH), strict=True)
    return torch.cat(images), torch.cat(labels)


def batches(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch, without an end."""
    for epoch in count():
        yield from loader.epoch(epoch)
