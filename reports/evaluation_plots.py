"""Plots of an evaluation: confusion matrix, reliability diagram, heat map of CKA between stages."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common import write_atomically
from reports.evaluation import Evaluation

FEW_CLASSES = 20  # up to which a confusion matrix has room for numbers and names
LONGEST_NAME = 16  # characters


def plot_evaluation(evaluation: Evaluation, results: dict, folder: Path, stem: str) -> None:
    """STEM_confusion.png, STEM_reliability.png and, with a teacher, STEM_cka.png."""
    if (confusion := evaluation.classification.confusion()) is not None:
        names = results.get("evaluated", {}).get("class_names")
        plot_confusion(confusion.cpu().numpy(), folder / f"{stem}_confusion.png", names)
    plot_reliability(evaluation.reliability(), results["ece"], folder / f"{stem}_reliability.png")
    if "cka_maps" in results:
        plot_cka(results["cka_maps"], folder / f"{stem}_cka.png")


def plot_confusion(counts: np.ndarray, path: Path, names: list[str] | None = None) -> Path:
    """Images [C, C] by label (rows) and prediction, shown in percent of each label's; `names` of the classes."""
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(9.0, 4 + 0.25 * len(counts))
    figure, axis = plt.subplots(figsize=(side + 1, side))
    heat = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axis.set(xlabel="predicted class", ylabel="class", title="confusion, % of each class's images")
    if len(counts) <= FEW_CLASSES:
        places = range(len(counts))
        if names is None or len(names) != len(counts):  # two classes that many were summed to have none
            names = [str(place) for place in places]
        shown = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names]
        turned = {"rotation": 45, "ha": "right"} if max(map(len, shown)) > 2 else {}
        axis.set_xticks(places, shown, parse_math=False, **turned)
        axis.set_yticks(places, shown, parse_math=False)
        for (row, column), share in np.ndenumerate(shares):
            if share:
                dark = "white" if share > 50 else "black"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", color=dark, fontsize=8)
    figure.colorbar(heat, ax=axis)
    return _save(figure, path)


def plot_reliability(bins: list[dict[str, float]], ece: float, path: Path) -> Path:
    """Accuracy over confidence, a point a bin (reports.metrics.reliability), its area the bin's share of the images."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfectly calibrated")
    confidence, accuracy, share = ([each[key] for each in bins] for key in ("confidence", "accuracy", "share"))
    axis.vlines(confidence, confidence, accuracy, color="tab:red", alpha=0.6, label="gap")
    axis.scatter(confidence, accuracy, s=[15 + 600 * each for each in share], alpha=0.7, zorder=3)
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy", title=f"ECE {ece:.4f}")
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)
    return _save(figure, path)


def plot_cka(maps: list[list[float]], path: Path) -> Path:
    """CKA between the stages of a student (rows) and of its teacher."""
    figure, axis = plt.subplots(figsize=(1.5 + 0.9 * len(maps[0]), 1.5 + 0.7 * len(maps)))
    heat = axis.imshow(maps, cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(np.array(maps)):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(maps[0])), range(1, len(maps[0]) + 1))
    axis.set_yticks(range(len(maps)), range(1, len(maps) + 1))
    axis.set(xlabel="teacher's stage", ylabel="student's stage", title="linear CKA")
    figure.colorbar(heat, ax=axis)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, picture.getvalue())
    return path
