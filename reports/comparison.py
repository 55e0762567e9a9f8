"""Tables of a comparison: students alone and from teachers of several kinds, over students and seeds.

A record is what is kept of one run (benchmarks/evidence.py): `script`, `source` (which kind of teacher it is or has,
or "alone"), `student`, `seed`, `top1`, `seconds`, `losses` and `test`, measures on the test split.
"""

import statistics
from collections.abc import Sequence

from reports.statistics import Difference, paired_difference, student_interval

ALONE = "alone"
Values = dict[tuple[str, int], float]  # by (student, seed)
MEASURES = {"kl": "KL, nats", "agreement": "agreement, %", "cka": "CKA", "nll": "student's NLL, nats"}


def top1_of_students(records: Sequence[dict]) -> dict[str, Values]:
    """Top-1 in percent by source and (student, seed)."""
    found: dict[str, Values] = {}
    for record in records:
        if record["script"] == "distill.py":
            found.setdefault(record["source"], {})[record["student"], record["seed"]] = record["top1"]
    return found


def differences(top1: dict[str, Values], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """Paired differences of students' top-1 between two sources, where both have runs in common."""
    found = {}
    for one, other in pairs:
        if top1.get(one, {}).keys() & top1.get(other, {}).keys():
            found[one, other] = paired_difference(top1[one], top1[other], {key: key[1] for key in top1[one]})
    return found


def as_markdown(records: Sequence[dict], students: Sequence[str], teachers: Sequence[str]) -> str:
    """All tables. The first of `teachers` is the one that the others are held against."""
    top1 = top1_of_students(records)
    sources = [source for source in (ALONE, *teachers) if source in top1]
    first = teachers[0]
    pairs = [(source, first) for source in sources if source != first]
    if {"gtn", "sftn"} <= top1.keys():
        pairs.append(("gtn", "sftn"))
    parts = [_accuracies(top1, students, sources), _differences(differences(top1, pairs))]
    parts += [_teachers(records, teachers), _alike(records, teachers)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _accuracies(top1: dict[str, Values], students: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Mean and standard deviation over seeds by student and source; the mean of all with its 95% interval."""
    lines = _head("students' top-1, %", sources)
    for row in students:
        cells = [spread([value for (student, _), value in top1[s].items() if student == row]) for s in sources]
        lines.append(_row(row, cells))
    return [*lines, _row("mean (95% interval)", [_with_interval(top1[source]) for source in sources])]


def _differences(found: dict[tuple[str, str], Difference]) -> list[str]:
    if not found:
        return []
    titles = ("difference", "95% interval", "over seeds", "pairs", "verdict")
    lines = _head("top-1, paired over students and seeds", titles)
    for (one, other), each in found.items():
        interval = each.interval if each.groups > 1 else None  # students of one seed share a teacher
        cells = [f"{each.mean:+.2f}", _range(interval), _range(each.bootstrap), str(each.pairs), each.verdict()]
        lines.append(_row(f"{one} - {other}", cells))
    return lines


def _teachers(records: Sequence[dict], teachers: Sequence[str]) -> list[str]:
    titles = ("top-1, %", "training cross-entropy", "confidence", "entropy, nats", "seconds, all students")
    lines = _head("teacher", titles)
    for name in teachers:
        own = [each for each in records if each["source"] == name and each["script"] == "train_teacher.py"]
        if own:
            losses = [each["losses"].get("teacher_ce", each["losses"].get("ce")) for each in own]
            cells = [spread([each["top1"] for each in own]), spread([loss for loss in losses if loss is not None])]
            cells += [f"{statistics.mean(each['test'][key] for each in own):.3f}" for key in ("confidence", "entropy")]
            cells.append(f"{sum(each['seconds'] for each in own) / len({each['seed'] for each in own}):.0f}")
            lines.append(_row(name, cells))
    return lines


def _alike(records: Sequence[dict], teachers: Sequence[str]) -> list[str]:
    """How alike students and their teacher are on the test split."""
    lines = _head("student to its teacher", MEASURES.values())
    for name in teachers:
        own = [each for each in records if each["source"] == name and each["script"] == "distill.py"]
        if own:
            lines.append(_row(name, [f"{statistics.mean(each['test'][key] for each in own):.3f}" for key in MEASURES]))
    return lines if len(lines) > 2 else []


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, or what there is of it."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _with_interval(values: Values) -> str:
    """The mean, and its interval where there are several seeds: the students of one share a teacher."""
    interval = student_interval(list(values.values())) if len({seed for _, seed in values}) > 1 else None
    shown = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"{statistics.mean(values.values()):.2f}{shown}"


def _range(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""


def _head(title: str, columns) -> list[str]:
    columns = list(columns)
    return [_row(title, columns), "| --- |" + " ---: |" * len(columns)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
