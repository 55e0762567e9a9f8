"""What training some members of a teacher's pool has told of how to rank all of them.

`python -m benchmarks.ranking` leaves it in the teacher's run folder.
"""

from dataclasses import dataclass
from pathlib import Path

from common import UserError, read_json
from searching.ranking import Ranking

FILE = "ranking.json"


@dataclass(frozen=True)
class Trained:
    """Members that were trained.

    Attributes:
        members: how many.
        epochs: of each.
        predicted: Kendall's tau of their top-1 with the scores that were predicted by the supernet.
        macs: the same with their multiply-accumulates.
    """

    members: int
    epochs: int
    predicted: float
    macs: float

    def in_words(self) -> str:
        """Both numbers."""
        return (
            f"Kendall's tau with the top-1 of {self.members} members after {self.epochs} epochs is "
            f"{self.predicted:.2f} of predicted scores, {self.macs:.2f} of multiply-accumulates"
        )


def read_trained(folder: Path, sha256: str) -> Trained | None:
    """What a teacher's run folder holds; None where no members were trained for the teacher of these weights.

    Raises:
        UserError: a file that is no such record.
    """
    if not (path := folder / FILE).is_file():
        return None
    found = read_json(path, "--teacher")
    try:
        tau = found["tau"]
        trained = Trained(int(found["members"]), int(found["epochs"]), float(tau["predicted"]), float(tau["macs"]))
        return trained if found["teacher"] == sha256 else None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--teacher {path}: is no record of python -m benchmarks.ranking; remove it") from None


def judge_ranking(ranking: Ranking, trained: Trained | None) -> tuple[bool, str]:
    """(whether members are to be ranked by the supernet's scores, not by multiply-accumulates; why)."""
    if trained:
        return trained.predicted > trained.macs, f"as {trained.in_words()}"
    if not ranking.above_chance:
        return False, f"as half the paths have no more than {ranking.chance:.1f}%, which guessing could have, too"
    if not ranking.beats_macs:
        return False, "as the supernet's scores are predicted no better than by them"
    return True, "as they are above chance, and predicted better than by multiply-accumulates"
