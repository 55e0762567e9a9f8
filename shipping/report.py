"""fleet.json and report.html, and what the user sees of them."""

import base64
import json
from pathlib import Path
from shlex import quote

from common import read_json, write_atomically
from engine.console import Console
from reports.page import render, versions
from search import PLOT
from search import RESULT as RESULT_OF_SEARCH
from searching.pareto import MOST
from searching.pareto import rows as front_rows
from shipping.folder import PAGE, RESULT, SEARCH, STUDENTS

COLUMNS = ["budget", "student", "ms promised", "ms measured", "parameters", "million MACs", "file", "top-1, %"]
COLUMNS += ["lost by export", "within"]


def write_report(folder: Path, found: dict) -> None:
    """Write both, from the content of fleet.json."""
    write_atomically(folder / RESULT, json.dumps(found, indent=1) + "\n")
    fronts = read_json(folder / SEARCH / RESULT_OF_SEARCH)["fronts"]
    write_atomically(folder / PAGE, page(found, (folder / SEARCH / PLOT).read_bytes(), front_rows(fronts)))


def rows(found: dict) -> list[list[str]]:
    """The cells of COLUMNS for each budget and file."""
    cells = []
    for each in found["budgets"]:
        student, promised = found["students"].get(each["student"]), each["promised"].get("ms")
        if student is None:
            cells.append([each["budget"], each["student"], *[""] * (len(COLUMNS) - 3), "failed"])
            continue
        for name, file in student["files"].items():
            cells.append([each["budget"], each["student"], "" if promised is None else f"{promised:.3f}"])
            cells[-1] += [f"{file['ms']:.3f}", f"{student['params']:,}", f"{student['macs'] / 1e6:,.2f}", name]
            cells[-1] += [f"{file['top1']:.2f}", f"{file['drop']:.2f}", within(each, name)]
    return cells


def within(budget: dict, file: str) -> str:
    """Whether a file of a student keeps to its budget, as far as that could be measured here."""
    if file in budget["over"]:
        return "no"
    return "yes" if budget["checked"] else "not checked"


def exceeded(found: dict) -> list[str]:
    """What is over its budget, in words; a student's size once, not for each file."""
    said = [f"{each['budget']}: {why}" for each in found["budgets"] for file in each["over"].values() for why in file]
    return list(dict.fromkeys(said))


def page(found: dict, plot: bytes, fronts: list[dict[str, str]]) -> str:
    """report.html.

    Args:
        found: the content of fleet.json.
        plot: a PNG of all members of the pool.
        fronts: rows of the members on its Pareto fronts.
    """
    image = f'<img alt="Pareto fronts" src="data:image/png;base64,{base64.b64encode(plot).decode()}" width="960">'
    caption = "All members of the pool by what they cost and their predicted score; the chosen ones by budget."
    sections = [
        {"title": "Students", "columns": COLUMNS, "rows": rows(found)},
        {"title": "Why these", "points": [f"{each['budget']}: {each['why']}" for each in found["budgets"]]},
        {"title": "The pool", "figures": [{"svg": image, "caption": caption}]},
        {
            "title": f"Pareto fronts: at most {MOST} members of each, evenly along it",
            "columns": list(fronts[0]),
            "rows": [list(row.values()) for row in fronts],
        },
        {"title": "What to doubt", "points": found["doubts"]},
    ]
    code = "\n".join([found["command"], "", "# which is", *found["commands"]])
    sections += [{"title": "Again", "code": code, "summary": "the exact commands"}, versions([found])]
    question = f"Students of {teacher_in_words(found)} for {', '.join(each['budget'] for each in found['budgets'])}."
    verdict = "Every student keeps to its budget as measured."
    if unchecked := [each["budget"] for each in found["budgets"] if not each["checked"]]:
        verdict = f"Latencies of another device could not be checked here: {', '.join(unchecked)}."
    if over := exceeded(found):
        verdict = f"Not within the budget: {'; '.join(over)}."
    if found["failed"]:
        verdict = (
            f"Failed: {'; '.join(f'{name} ({why})' for name, why in found['failed'].items())}. Of the rest: {verdict}"
        )
    return render("A fleet of students", question, verdict, sections)


def teacher_in_words(found: dict) -> str:
    """The teacher with its accuracy, where that is known."""
    teacher = found["teacher"]
    known = "" if teacher["top1"] is None else f", {teacher['top1']:.2f}% top-1"
    return f"{teacher['model']} in {teacher['path']} ({found['dataset']}{known})"


def show(folder: Path, found: dict) -> None:
    """A row a budget and file, and what to do next."""
    console = Console(True)
    console.print(f"\nstudents of {teacher_in_words(found)}; measured on {found['measured_on']}, one thread, one image")
    table = rows(found)
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for row in table:
        named = zip(COLUMNS, row, widths, strict=True)
        console.cells({column: cell.rjust(width) for column, cell, width in named})
    for doubt in found["doubts"]:
        console.print(f"to doubt: {doubt}")
    first = next(iter(found["students"]))
    student = folder / STUDENTS / first
    console.print(f"written: {folder / RESULT}, {folder / PAGE}, and the files in {folder / STUDENTS}/NAME/export")
    console.print(
        f"next: open {folder / PAGE}; {student}/export/README.md says what its files take and give; "
        f"python evaluate.py {quote(str(student))} --teacher {quote(found['teacher']['path'])}"
    )
