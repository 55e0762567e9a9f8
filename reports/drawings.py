"""The papers' figures, drawn from the runs of a comparison: panels of lines, the papers' own numbers as crosses.

A panel is JSON: `title`, `ylabel`, `places` (names along the x axis; None: epochs from 1), `lines` by name (at each
place the values of all seeds) and `paper` by the same names (at each place the paper's number, or None).
"""

import statistics
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reports import figures
from reports.comparison import ALONE, variant_of

TOP1 = "top-1, %"
CAPTION = "Means over seeds, from the lowest of them to the highest; crosses: the paper's numbers."


def panels(drawing: str, records: Sequence[dict], paper: Sequence[dict]) -> list[dict]:
    """The panels of a figure.

    Args:
        drawing: one of DRAWINGS; empty: the comparison is no figure.
        records: of the runs that are done.
        paper: the paper's figures with the names of their runs (comparing/papers.py).
    """
    found = DRAWINGS[drawing](records, paper) if drawing else []
    return [panel for panel in found if any(values for line in panel["lines"].values() for values in line)]


def _best(records: Sequence[dict], paper: Sequence[dict]) -> list[dict]:
    """By pair of student and teacher: the standard teacher, and the best method's student of each kind of teacher."""
    pairs, lines, printed = _pairs(records), {}, {}
    for source in _sources(records):
        name = f"best student of {source}"
        methods = dict.fromkeys(variant_of(each) for each in records if each["source"] == source and each["student"])
        every = [[_top1(records, source, pair, variant=method) for method in methods] for pair in pairs]
        lines[name] = [max(filter(None, each), key=statistics.mean, default=[]) for each in every]
        printed[name] = [_printed(paper, "student", source, pair) for pair in pairs]
    standard = "vanilla"
    models = [pair.rpartition(" of ")[2] for pair in pairs]
    lines = {f"{standard} teacher": [_top1(records, standard, model=model) for model in models]} | lines
    printed[f"{standard} teacher"] = [_printed(paper, "teacher", standard, pair) for pair in pairs]
    return [_panel("", TOP1, pairs, lines, printed)]


def _teachers(records: Sequence[dict], paper: Sequence[dict]) -> list[dict]:
    """By the teacher's model: (a) teachers of each kind, (b) their students."""
    pairs, sources = _pairs(records), _sources(records)
    models = [pair.rpartition(" of ")[2] for pair in pairs]
    teachers = {source: [_top1(records, source, model=model) for model in models] for source in sources}
    students = {source: [_top1(records, source, pair) for pair in pairs] for source in sources}
    return [_panel("teachers", TOP1, models, teachers), _panel("their students", TOP1, models, students)]


def _curves(records: Sequence[dict], paper: Sequence[dict]) -> list[dict]:
    """By epoch: (a) the KL in training, where there is one, (b) accuracy, by teacher and method."""
    own = [each for each in records if each["student"] and each["script"] == "distill.py"]
    several = len({variant_of(each) for each in own if each["source"] != ALONE}) > 1
    kl: dict[str, list] = {}
    accuracy: dict[str, list] = {}
    printed = {}
    for each in own:
        source, method = each["source"], variant_of(each)
        name = f"{source}, {method}" if several and source != ALONE else source
        accuracy.setdefault(name, []).append(each["curve"])
        if "kl_curve" in each:
            kl.setdefault(name, []).append(each["kl_curve"])
        printed[name] = [*[None] * (len(each["curve"]) - 1), _printed(paper, "student", source, method=method)]
    kl, accuracy = ({name: _by_epoch(seeds) for name, seeds in lines.items()} for lines in (kl, accuracy))
    return [
        _panel("in training", "KL at the temperature of the loss, nats", None, kl),
        _panel("on the test split", TOP1, None, accuracy, printed),
    ]


def _branches(records: Sequence[dict], paper: Sequence[dict]) -> list[dict]:
    """By epoch: a panel a branch, the teacher and it."""
    own = [each for each in records if each.get("branches")]
    teacher = _by_epoch([each["curve"] for each in own])
    names = dict.fromkeys(name for each in own for name in each["branches"])
    return [
        _panel(name, TOP1, None, {"teacher": teacher, "branch": _by_epoch([each["branches"][name] for each in own])})
        for name in names
    ]


DRAWINGS = {"best": _best, "teachers": _teachers, "curves": _curves, "branches": _branches}


def in_page(found: Sequence[dict]) -> str:
    """Panels as SVG that stands in a page."""
    return figures.svg(partial(_draw, panels=found), _size(found), "paper")


def as_file(found: Sequence[dict]) -> str:
    """Panels as an SVG file."""
    return figures.svg_file(partial(_draw, panels=found), _size(found), "paper")


def _pairs(records: Sequence[dict]) -> list[str]:
    """STUDENT of MODEL, each once."""
    return list(dict.fromkeys(each["student"] for each in records if " of " in (each["student"] or "")))


def _sources(records: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(each["source"] for each in records if each["student"] and each["source"] != ALONE))


def _top1(records: Sequence[dict], source: str, student: str | None = None, **wanted: str) -> list[float]:
    """Of all seeds, in percent; without a student: of a teacher."""
    script = "distill.py" if student else "train_teacher.py"
    wanted |= {"source": source, "script": script} | ({"student": student} if student else {})
    return [each["top1"] for each in records if all(each[name] == value for name, value in wanted.items())]


def _printed(paper: Sequence[dict], figure: str, source: str, student: str = "", method: str = "") -> float | None:
    """The highest accuracy in percent that the paper prints of these runs."""
    found = [
        100 - each["paper"] if each["error"] else each["paper"]
        for each in paper
        if each["figure"] == figure
        and each["source"] == source
        and student in ("", each["student"])
        and method in ("", each["method"])
    ]
    return max(found, default=None)


def _by_epoch(seeds: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[each for each in values if each is not None] for values in zip(*seeds, strict=True)]


def _panel(title: str, ylabel: str, places: list[str] | None, lines: dict, paper: dict | None = None) -> dict:
    return {"title": title, "ylabel": ylabel, "places": places, "lines": lines, "paper": paper or {}}


def _size(panels: Sequence[dict]) -> tuple[float, float]:
    """In inches."""
    return 1 + 3.6 * len(panels) + (3 if len(panels) == 1 else 0), 4.2


def _draw(figure: Figure, panels: Sequence[dict]) -> None:
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    known = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            if name in panel["lines"]:
                shift = 0.5 * ((number + 0.5) / len(names) - 0.5) if panel["places"] else None
                colour = figures.COLOURS[number % len(figures.COLOURS)]
                known[name] = _draw_line(axis, panel["lines"][name], panel["paper"].get(name, []), shift, colour)
        axis.set(title=panel["title"], ylabel=panel["ylabel"])
        axis.grid(alpha=0.25)
        if panel["places"]:
            axis.set_xticks(range(1, len(panel["places"]) + 1), panel["places"], rotation=40, ha="right")
        else:
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=2)


def _draw_line(axis: Axes, line: Sequence, paper: Sequence, shift: float | None, colour: str) -> Line2D:
    """What stands for it in a legend. With a shift: points beside those of other lines, else a line by epoch."""
    values = {x + (shift or 0): seeds for x, seeds in enumerate(line, start=1) if seeds}
    crosses = {x + (shift or 0): value for x, value in enumerate(paper, start=1) if value is not None}
    means, lowest, highest = ([choose(seeds) for seeds in values.values()] for choose in (statistics.mean, min, max))
    axis.plot(list(crosses), list(crosses.values()), "x", color=colour)
    if shift is not None:
        axis.vlines(list(values), lowest, highest, color=colour)
        return axis.plot(list(values), means, "o", color=colour)[0]
    axis.fill_between(list(values), lowest, highest, color=colour, alpha=0.2, linewidth=0)
    return axis.plot(list(values), means, ".-", color=colour)[0]
