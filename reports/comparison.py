"""Tables of a comparison: students alone and from teachers of several kinds, by method, over students and seeds.

A record is what is kept of one run (comparing/records.py): `script`, `source` (which kind of teacher it is or has, or
"alone"), `student`, `variant` (how it was distilled), `seed`, `top1`, `seconds`, `losses` and `test`, measures on the
test split. `compare` computes all that is reported from records alone; `as_markdown` writes it down.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.statistics import Difference, over_seeds, paired_difference

ALONE, PEERS = "alone", "peers"  # sources that are no teacher: labels alone, and networks that learn together
AVERAGE, BEST = "average", "best"
Key = tuple[str, str, int]  # student, variant, seed
Values = dict[Key, float]
MEASURES = {"kl": "KL, nats", "agreement": "agreement, %", "cka": "CKA", "nll": "student's NLL, nats"}


@dataclass(frozen=True)
class Table:
    """A table in words: `title` is the head of the first column, `rows` are cells, the name first."""

    title: str
    columns: list[str]
    rows: list[list[str]]


FEW_SEEDS = 3
SHORT_EPOCHS = 60


def compare(
    records: Sequence[dict],
    students: Sequence[str],
    teachers: Sequence[str],
    methods: Sequence[str] | None = None,
    note: str = "",
) -> dict:
    """All that is reported of records, as JSON says it.

    Args:
        records: of the runs that are done.
        students, teachers, methods: by name, in the order of the tables; the first of `teachers` is the standard one,
            which the others are held against. `methods`: default: those of the records.
        note: what the comparison is about.

    Returns `note`; `means`: a row each of student and method, and of AVERAGE (over methods, students or both) and BEST
    (method, for each student), cells by source; `differences` between sources, paired over students, methods and seeds;
    `teachers`: of each; `alike`: how alike students and their teacher are; `left_out`: accuracy by whether students'
    training had the class; `verdict` in words; `doubts`.
    """
    own = [each for each in records if each["script"] == "distill.py"]
    methods = list(methods or dict.fromkeys(map(variant_of, (each for each in own if each["source"] != ALONE))))
    top1 = top1_of_students(own, methods)
    sources = [source for source in (ALONE, PEERS, *teachers) if source in top1]
    standard = teachers[0]
    pairs = [(source, standard) for source in sources if source != standard]
    if {"gtn", "sftn"} <= top1.keys() and standard not in ("gtn", "sftn"):
        pairs.append(("gtn", "sftn"))
    found = differences(top1, pairs)
    return {
        "note": " ".join(note.split()),
        "students": list(students),
        "methods": methods,
        "sources": sources,
        "standard": standard,
        "means": _means(top1, students, methods, sources),
        "differences": [{"one": one, "other": other, **each.as_dict()} for (one, other), each in found.items()],
        "teachers": [row for name in teachers if (row := _teacher(records, name))],
        "alike": [row for name in teachers if (row := _alike(own, name))],
        "left_out": [row for method in methods for name in sources if (row := _left_out(own, name, method))],
        "verdict": _verdict(found, standard),
        "doubts": _doubts(own, teachers, sources),
    }


def variant_of(record: dict) -> str:
    """How a student was distilled, as the comparison calls it; of old records, the method."""
    return record.get("variant") or record.get("method") or "kd"


def top1_of_students(records: Iterable[dict], methods: Sequence[str] = ()) -> dict[str, Values]:
    """Top-1 in percent by source and (student, method, seed). A student alone is held against every method."""
    found: dict[str, Values] = {}
    for record in records:
        if record["script"] != "distill.py":
            continue
        for method in (methods if record["source"] == ALONE else None) or [variant_of(record)]:
            found.setdefault(record["source"], {})[record["student"], method, record["seed"]] = record["top1"]
    return found


def differences(top1: dict[str, Values], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """Paired differences of students' top-1 between two sources, where both have runs in common."""
    found = {}
    for one, other in pairs:
        if top1.get(one, {}).keys() & top1.get(other, {}).keys():
            found[one, other] = paired_difference(top1[one], top1[other], {key: key[2] for key in top1[one]})
    return found


def _means(top1: dict[str, Values], students: Sequence[str], methods: Sequence[str], sources: Sequence[str]) -> list:
    """Rows of the first table, student by student, and of all of them."""
    rows = []
    for student in students:
        for method in methods:
            rows.append(_mean_row(top1, sources, student, method, [student], [method]))
        if len(methods) > 1:
            rows.append(_mean_row(top1, sources, student, AVERAGE, [student], methods))
            rows.append(_mean_row(top1, sources, student, BEST, [student], methods, best=True))
    if len(students) > 1:
        for method in methods if len(methods) > 1 else []:
            rows.append(_mean_row(top1, sources, AVERAGE, method, students, [method]))
        rows.append(_mean_row(top1, sources, AVERAGE, AVERAGE if len(methods) > 1 else methods[0], students, methods))
        if len(methods) > 1:
            rows.append(_mean_row(top1, sources, AVERAGE, BEST, students, methods, best=True))
    return [row for row in rows if row["cells"]]


def _mean_row(
    top1: dict[str, Values],
    sources: Sequence[str],
    student: str,
    method: str,
    students: Sequence[str],
    methods: Sequence[str],
    best: bool = False,
) -> dict:
    """Means over the runs of some students and methods, by source; `best`: of each student's best method."""
    cells = {}
    for source in sources:
        chosen = methods[:1] if source == ALONE else methods  # the same runs stand beside every method
        by_seed: dict[int, list[float]] = {}
        for name in students:
            by_method = {
                each: {seed: top1[source][name, each, seed] for s, m, seed in top1[source] if (s, m) == (name, each)}
                for each in methods
            }
            done = {each: runs for each, runs in by_method.items() if runs}
            if best and done and source != ALONE:
                chosen = [max(done, key=lambda each: statistics.mean(done[each].values()))]
            for each in chosen:
                for seed, value in done.get(each, {}).items():
                    by_seed.setdefault(seed, []).append(value)
        if by_seed:
            values = [value for each in by_seed.values() for value in each]
            mean, interval = over_seeds(by_seed)
            cells[source] = {
                "mean": mean,
                "deviation": statistics.stdev(values) if 1 < len(values) == len(by_seed) else None,
                "runs": len(values),
                "interval": interval,
            } | ({"method": chosen[0]} if best and len(students) == 1 and source != ALONE else {})
    return {"student": student, "method": method, "cells": cells}


def _teacher(records: Sequence[dict], name: str) -> dict | None:
    own = [each for each in records if each["source"] == name and each["script"] == "train_teacher.py"]
    if not own:
        return None
    losses = [each["losses"].get("teacher_ce", each["losses"].get("ce")) for each in own]
    losses = [loss for loss in losses if loss is not None]
    top1 = [each["top1"] for each in own]
    return {
        "teacher": name,
        "top1": statistics.mean(top1),
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "training_cross_entropy": statistics.mean(losses) if losses else None,
        **{key: statistics.mean(each["test"][key] for each in own) for key in ("confidence", "entropy")},
        "seconds_a_seed": sum(each["seconds"] for each in own) / len({each["seed"] for each in own}),
    }


def _alike(own: Sequence[dict], name: str) -> dict | None:
    """How alike students and their teacher are on the test split."""
    from_it = [each for each in own if each["source"] == name and "kl" in each["test"]]
    if not from_it:
        return None
    return {"teacher": name} | {key: statistics.mean(each["test"][key] for each in from_it) for key in MEASURES}


def _left_out(own: Sequence[dict], name: str, method: str) -> dict | None:
    """Students' top-1 on the classes that their training images had, and on those left out (zero-shot distillation)."""
    from_it = [each for each in own if each["source"] == name and "unseen" in each["test"]]
    from_it = [each["test"] for each in from_it if name == ALONE or variant_of(each) == method]
    if not from_it:
        return None
    return {"source": name, "method": method} | {
        key: statistics.mean(each[key] for each in from_it) for key in ("seen", "unseen")
    }


def _verdict(found: dict[tuple[str, str], Difference], standard: str) -> str:
    """A sentence a source."""
    lines = []
    for (one, other), each in found.items():
        whose = "Students trained alone" if one == ALONE else f"Students of {one}"
        interval = f", 95% interval {_range(each.interval)}" if each.interval else ""
        lines.append(
            f"{whose} against those of {other}: {each.verdict()} ({each.mean:+.2f} points over "
            f"{each.pairs} pair{'s' if each.pairs > 1 else ''} of "
            f"{each.seeds} seed{'s' if each.seeds > 1 else ''}{interval})."
        )
    return " ".join(lines) or f"Nothing to hold against {standard} yet."


def _doubts(own: Sequence[dict], teachers: Sequence[str], sources: Sequence[str]) -> list[str]:
    """What a reader should doubt."""
    seeds, students = {each["seed"] for each in own}, {each["student"] for each in own}
    found = []
    if len(seeds) < FEW_SEEDS:
        found.append(f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}: another seed may turn the order round.")
    if len(students) < FEW_SEEDS:
        found.append(f"{len(students)} student{'s' if len(students) != 1 else ''}: others may behave otherwise.")
    epochs = [each["epochs"] for each in own]
    if epochs and max(epochs) < SHORT_EPOCHS:
        found.append(f"Students were trained for at most {max(epochs)} epochs; the papers train for 200 to 240.")
    if missing := [name for name in teachers if name not in sources]:
        found.append(f"No student of {', '.join(missing)} is done.")
    counts = {sum(each["source"] == source for each in own) for source in sources if source != ALONE}
    if len(counts) > 1:
        found.append("Not every teacher has as many runs: means over different runs are not comparable, pairs are.")
    warned = sum(bool(each.get("warnings")) for each in own)
    if warned:
        found.append(f"{warned} of the students' runs ended with warnings.")
    return found


def as_markdown(found: dict) -> str:
    """The tables of `compare`, its verdict and its doubts."""
    parts = [[found["note"]], [found["verdict"]], *map(_markdown, tables(found))]
    parts.append([f"- {each}" for each in found["doubts"]])
    return "\n\n".join("\n".join(lines) for lines in parts if lines and lines != [""]) + "\n"


def tables(found: dict) -> list[Table]:
    """The tables of `compare` that have rows."""
    every = _accuracies(found), _differences(found), _unseen(found), _paper(found), _teachers(found), _similarity(found)
    return [each for each in every if each.rows]


def _accuracies(found: dict) -> Table:
    """Mean and standard deviation over seeds, differences to the standard teacher; of averages the 95% interval."""
    sources, standard = found["sources"], found["standard"]
    gains = [source for source in sources if source not in (standard, ALONE)] if standard in sources else []
    several, rows = len(found["methods"]) > 1, []
    for row in found["means"]:
        cells = [_cell(row["cells"].get(source), row["student"] == AVERAGE) for source in sources]
        cells += [_gain(row["cells"], source, standard) for source in gains]
        name = "average (95% interval)" if row["student"] == AVERAGE else row["student"]
        rows.append([name, *([row["method"]] if several else []), *cells])
    columns = [*(["method"] if several else []), *sources, *(f"{each} - {standard}" for each in gains)]
    return Table("students' top-1, %", columns, rows)


def _cell(cell: dict | None, with_interval: bool) -> str:
    """A mean with its deviation, or with its interval; of a best method its name."""
    if cell is None:
        return ""
    if with_interval:
        return f"{cell['mean']:.2f}" + (f" ({_range(cell['interval'], '.2f')})" if cell["interval"] else "")
    best = f" ({cell['method']})" if "method" in cell else ""
    return spread(cell["mean"], cell["deviation"]) + best


def _gain(cells: dict, source: str, standard: str) -> str:
    """The difference of two means, where both have as many runs."""
    one, other = cells.get(source), cells.get(standard)
    return f"{one['mean'] - other['mean']:+.2f}" if one and other and one["runs"] == other["runs"] else ""


def _differences(found: dict) -> Table:
    rows = []
    for each in found["differences"]:
        cells = [f"{each['mean']:+.2f}", _range(each["interval"]), str(each["pairs"]), str(each["seeds"])]
        rows.append([f"{each['one']} - {each['other']}", *cells, each["verdict"]])
    columns = ["difference", "95% interval over seeds", "pairs", "seeds", "verdict"]
    return Table("top-1, paired over students and seeds", columns, rows)


def _paper(found: dict) -> Table:
    """What the paper prints beside what came out here."""
    rows = []
    for each in found.get("paper", []):
        ours = "" if each["ours"] is None else spread(each["ours"], each["deviation"])
        difference = "" if each["ours"] is None else f"{each['ours'] - each['paper']:+.2f}"
        rows.append([each["row"], each["figure"], f"{each['paper']:g}", ours, difference])
    return Table("beside the paper", ["figure", "paper", "here", "here - paper"], rows)


def _teachers(found: dict) -> Table:
    rows = []
    for each in found["teachers"]:
        loss = each["training_cross_entropy"]
        cells = [spread(each["top1"], each["top1_deviation"]), "" if loss is None else f"{loss:.2f}"]
        cells += [f"{each['confidence']:.3f}", f"{each['entropy']:.3f}", f"{each['seconds_a_seed']:.0f}"]
        rows.append([each["teacher"], *cells])
    columns = ["top-1, %", "training cross-entropy", "confidence", "entropy, nats", "seconds, all students"]
    return Table("teacher", columns, rows)


def _similarity(found: dict) -> Table:
    rows = [[each["teacher"], *(f"{each[key]:.3f}" for key in MEASURES)] for each in found["alike"]]
    return Table("student to its teacher", list(MEASURES.values()), rows)


def _unseen(found: dict) -> Table:
    several, rows = len(found["methods"]) > 1, []
    for each in found.get("left_out", []):
        cells = [f"{each['seen']:.2f}", f"{each['unseen']:.2f}"]
        rows.append([each["source"], *([each["method"]] if several else []), *cells])
    columns = [*(["method"] if several else []), "seen in training", "left out"]
    return Table("students' top-1, %, by class", columns, rows)


def spread(mean: float, deviation: float | None) -> str:
    """Mean ± standard deviation, or what there is of it."""
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _range(interval: Sequence[float] | None, form: str = "+.2f") -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else ""


def _markdown(table: Table) -> list[str]:
    head = [f"| {' | '.join([table.title, *table.columns])} |", "| --- |" + " ---: |" * len(table.columns)]
    return head + [f"| {' | '.join(row)} |" for row in table.rows]
