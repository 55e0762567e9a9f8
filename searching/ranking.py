"""Which members are likely to be the best: some are scored, and a regression on their candidates predicts the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import binom, spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict

from common import derive_seed
from searching.members import Members

FOLDS = 5
LEVEL = 0.01  # of the test against chance, one-sided
PENALTIES = np.logspace(-3, 3, 13)  # of the ridge regression; the best by leave-one-out


@dataclass
class Ranking:
    """Scores of all members.

    Attributes:
        by: what they are ranked by, in words.
        unit: of a score.
        scores: float64 [members], the higher the better.
        measured: how many members the scores were learnt from; 0 where they are known of all.
        spearman: between measured scores and those that the regression predicts without having seen them.
        macs_spearman: between measured scores and multiply-accumulates.
        median: of measured scores.
        chance: what a score must exceed not to be guessed: see `by_chance`.
    """

    by: str
    unit: str
    scores: np.ndarray
    measured: int = 0
    spearman: float | None = None
    macs_spearman: float | None = None
    median: float | None = None
    chance: float | None = None

    @property
    def above_chance(self) -> bool:
        """Whether half the measured paths, or more, have learnt something: a one-sided test of the median."""
        return self.median is not None and self.median > self.chance

    @property
    def beats_macs(self) -> bool:
        """Whether the regression predicts scores better than multiply-accumulates do. One that could not be tested,
        with few scores or all of them alike, does not."""
        return self.spearman is not None and self.spearman > self.macs_spearman

    def best(self, fine: np.ndarray, count: int) -> list[int]:
        """Numbers of the `count` best members among those that are `fine`, bool [members]; ties in their order."""
        (members,) = np.nonzero(fine)
        order = np.argsort(-self.scores[members], kind="stable")
        return members[order[:count]].tolist()


def draw_paths(members: Members, count: int, seed: int) -> np.ndarray:
    """Different members as places [<= count, layers], in which a layer's candidates appear equally often."""
    generator = np.random.default_rng(derive_seed(seed, "scored paths"))
    columns = [generator.permutation(np.arange(count) % options) for options in members.shape]
    return members.places(np.unique(members.numbers(np.stack(columns, axis=1))))


def by_macs(macs: np.ndarray) -> Ranking:
    """The more multiply-accumulates [members], the better."""
    return Ranking("multiply-accumulates", "million MACs", macs / 1e6)


def by_chance(labels: np.ndarray) -> float:
    """The top-1, in percent on images with these labels [n], that one who always names the most frequent class exceeds
    in one of 100 draws of so many images (binomial)."""
    share = np.unique(labels, return_counts=True)[1].max() / len(labels)
    return float(100 * binom.ppf(1 - LEVEL, len(labels), share) / len(labels))


def rank_correlation(members: Members, values: np.ndarray, places: np.ndarray, scores: Sequence[float]) -> float:
    """Spearman's of all members' `values` [members] with the scores of those at `places` [n, layers]."""
    return float(spearmanr(values[members.numbers(places)], scores).statistic)


def predict(
    members: Members, places: np.ndarray, scores: Sequence[float], images: int
) -> tuple[np.ndarray, float | None]:
    """(top-1 of every member, in percent [members], Spearman) from those of some, at `places` [n, layers], on `images`.

    Ridge regression of log-odds over one-hot choices: those of a member are a sum over its layers, a table like those
    of its costs, and no top-1 passes 100%. Half an image is added to the right and the wrong: there may be none.
    Spearman's correlation is that of cross-validation; None of too few members, or of scores that are all alike.
    """
    right = np.asarray(scores) / 100 * images
    odds = np.log((right + 0.5) / (images - right + 0.5))
    columns = np.concatenate([np.eye(options)[places[:, layer]] for layer, options in enumerate(members.shape)], axis=1)
    model = RidgeCV(PENALTIES).fit(columns, odds)
    edges = np.cumsum(members.shape)[:-1]
    predicted = 100 * expit(members.sums(np.split(model.coef_, edges), model.intercept_))
    if len(scores) < 2 * FOLDS or np.ptp(scores) == 0:
        return predicted, None
    parts = KFold(FOLDS, shuffle=True, random_state=0)  # the paths may be in order
    unseen = cross_val_predict(RidgeCV(PENALTIES), columns, odds, cv=parts)
    return predicted, float(spearmanr(unseen, scores).statistic)
