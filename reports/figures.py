"""Plots of a report as SVG that stands in a page: as wide as that, in its font and its text's colour."""

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # becomes the page's text colour, light or dark
LEAST = 0.75  # of its size, in which a figure of 10-point text can still be read
COLOURS = ["#3b82c4", "#d9822b", "#2f9e6e", "#b5529a", "#8a8f3c", "#c4473b", "#6d6ad0", "#4aa3a3"]
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def points(rows: Sequence[dict], sources: Sequence[str]) -> str:
    """Means by source with their 95% intervals, a line a row of `means` (reports/comparison.py)."""
    names = [" ".join(dict.fromkeys([row["student"], row["method"]])) for row in rows]

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for number, source in enumerate(sources):
            places = [
                (place + 0.6 * ((number + 0.5) / len(sources) - 0.5), row["cells"][source])
                for place, row in enumerate(rows)
                if source in row["cells"]
            ]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot([cell["mean"] for _, cell in places], [y for y, _ in places], "o", color=colour, label=source)
            for y, cell in places:
                if cell["interval"]:
                    axis.plot(cell["interval"], [y, y], color=colour, linewidth=1.5)
        axis.set_yticks(range(len(rows)), names)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel("students' top-1, %; lines: 95% intervals over seeds")
        axis.grid(axis="x", alpha=0.25)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1 + 0.5 / (len(rows) + 1)), ncols=min(len(sources), 5))

    return svg(draw, (7.5, 1.2 + 0.2 * len(rows) * max(2, len(sources))), "points")


def curves(lines: Mapping[str, Sequence[float | None]], ylabel: str, name: str) -> str:
    """Values by epoch, from 1; None where there is none."""

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for number, (label, values) in enumerate(lines.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": ".", "markersize": 4}
            known = {epoch: value for epoch, value in enumerate(values, start=1) if value is not None}
            axis.plot(known.keys(), known.values(), label=label, **style)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        figure.legend(loc="outside upper center", ncols=3)

    return svg(draw, (4.8, 3.2 + 0.2 * ((len(lines) - 1) // 3)), name)


def gates(branches: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> str:
    """A heat map a branch: layers by candidates, probability times number of candidates (1: uniform)."""
    candidates = list(dict.fromkeys(each for layers in branches.values() for row in layers.values() for each in row))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(branches), squeeze=False)[0]
        images = {
            branch: [
                [row[each] * len(row) if each in row else float("nan") for each in candidates]
                for row in layers.values()
            ]
            for branch, layers in branches.items()
        }
        known = [value for image in images.values() for row in image for value in row if value == value]
        span = max(0.05, *(abs(value - 1) for value in known))
        for axis, (branch, image) in zip(axes, images.items(), strict=True):
            heat = axis.imshow(image, cmap="coolwarm", vmin=1 - span, vmax=1 + span, aspect="auto")
            axis.set_yticks(range(len(image)), list(branches[branch]), fontsize=8)
            axis.set_xticks(range(len(candidates)), candidates, rotation=60, fontsize=8)
            axis.set_title(branch)
        figure.colorbar(heat, ax=list(axes))

    return svg(draw, (3.2 * len(branches) + 1, 3.2), name)


def svg_file(draw: Callable[[Figure], None], size: tuple[float, float], name: str, transparent: bool = False) -> str:
    """What `draw` draws on a figure of `size` inches, as the content of a file; its ids are hashes with `name`."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=transparent, metadata={"Date": None})
    return file.getvalue()


def svg(draw: Callable[[Figure], None], size: tuple[float, float], name: str) -> str:
    """The same as part of a page; `name` keeps its ids apart from other figures'."""
    text = svg_file(draw, size, name, transparent=True)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    opening = re.search(r'viewBox="[^"]*"', text)[0]
    # A phone scrolls a wide figure: shrunk to its width, it could not be read.
    style = f'style="width:{size[0] * 72:.0f}pt;max-width:max(100%,{size[0] * LEAST * 72:.0f}pt)"'
    return re.sub(r"<svg[^>]*>", f'<svg role="img" {opening} {style}>', text, count=1, flags=re.DOTALL)
