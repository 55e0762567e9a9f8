"""Plots of a run, drawn from the rows of metrics.jsonl."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_run(history: list[dict], folder: Path) -> list[Path]:
    """accuracy.png, losses.png and, where gates were recorded, gates.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_losses(history, folder / "losses.png")]
    history = [row for row in history if row["accuracy"]]  # without the warm-up
    epochs = [row["epoch"] for row in history]
    paths.insert(0, _curves(epochs, history, folder / "accuracy.png"))
    if "gates" in history[-1]:
        paths.append(_gates(epochs, history, folder / "gates.png"))
    return paths


def _curves(epochs: list[int], history: list[dict], path: Path) -> Path:
    """Top-1 of what is trained, and, as in the GTN supplement's Figure 1, a panel with each branch beside it."""
    main, *branches = history[-1]["accuracy"]
    figure, axes = plt.subplots(1, max(1, len(branches)), figsize=(5 * max(1, len(branches)), 3.8), squeeze=False)
    for axis, name in zip(axes[0], branches or [None], strict=True):
        for curve in filter(None, (main, name)):
            axis.plot(epochs, [row["accuracy"][curve] for row in history], label=curve, marker=".", markersize=4)
        axis.set(xlabel="epoch", ylabel="top-1 on the test split, %")
        axis.legend()
        axis.grid(alpha=0.3)
    return _save(figure, path)


def _losses(history: list[dict], path: Path) -> Path:
    """A panel for each term; epochs up to 0 are the warm-up's."""
    terms = list(dict.fromkeys(name for row in history for name in row["losses"]))
    figure, axes = plt.subplots(1, len(terms), figsize=(3.6 * len(terms), 3.2), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        rows = [row for row in history if term in row["losses"]]
        axis.plot([row["epoch"] for row in rows], [row["losses"][term] for row in rows], marker=".", markersize=4)
        axis.set(title=term, xlabel="epoch", ylabel="nats")
        axis.grid(alpha=0.3)
    return _save(figure, path)


def _gates(epochs: list[int], history: list[dict], path: Path) -> Path:
    """One heat map a branch: a line for every candidate of every layer, epochs from left to right."""
    branches = history[-1]["gates"]
    rows = [sum(map(len, layers.values())) for layers in branches.values()]
    figure, axes = plt.subplots(
        len(branches), 1, figsize=(8, 0.17 * sum(rows) + 2.5), squeeze=False, height_ratios=rows, layout="constrained"
    )
    for axis, (branch, layers) in zip(axes[:, 0], branches.items(), strict=True):
        names = [(layer, candidate) for layer, chances in layers.items() for candidate in chances]
        # Layers offer different numbers of candidates: times that number, a uniform choice is 1 everywhere.
        image = np.array(
            [[row["gates"][branch][layer][name] * len(layers[layer]) for row in history] for layer, name in names]
        )
        span = max(abs(image - 1).max(), 0.05)
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
        colours = {"cmap": "coolwarm", "vmin": 1 - span, "vmax": 1 + span}
        heat = axis.imshow(image, aspect="auto", interpolation="nearest", extent=extent, **colours)
        axis.set_yticks(range(len(names)), [f"{layer} {name}" for layer, name in names], fontsize=6)
        axis.set(title=f"{branch}: gate probabilities x candidates (1 = uniform)", xlabel="epoch")
        figure.colorbar(heat, ax=axis)
    return _save(figure, path, tight=False)


def _save(figure, path: Path, tight: bool = True) -> Path:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
