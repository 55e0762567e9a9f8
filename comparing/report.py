"""comparison.json, comparison.md, report.html and a figure of a comparison, from the records of its runs."""

import json
from pathlib import Path

from common import write_atomically
from comparing.order import Outcome
from comparing.papers import beside
from comparing.places import Places
from comparing.plan import Comparison
from comparing.records import recorded
from reports import drawings
from reports.comparison import as_markdown, compare
from reports.page import comparison_page

FIGURE = "figure.svg"


def write_report(comparison: Comparison, places: Places, folder: Path, command: str, outcome: Outcome) -> dict | None:
    """Write what is known of a comparison into a folder; None, and no file, while no run is done."""
    records = [record for run in comparison.runs if (record := recorded(run, places.records))]
    if not records:
        return None
    tables = compare(records, comparison.students, comparison.teachers, comparison.methods, comparison.note)
    done = {record["run"] for record in records}
    found = {"name": comparison.name, "command": command} | tables
    found |= {"planned": len(comparison.runs), "done": len(done), "failed": outcome.failed, "plan": comparison.config}
    paper = beside(comparison.rows, records)
    found |= {"paper": paper, "panels": drawings.panels(comparison.drawing, records, paper), "runs": records}
    write_atomically(folder / "comparison.json", json.dumps(found, indent=1) + "\n")
    count = f"{found['done']} of {found['planned']} runs are done."
    write_atomically(folder / "comparison.md", f"{as_markdown(found)}\n{count} Made by `{command}`.\n")
    write_atomically(folder / "report.html", comparison_page(found))
    if found["panels"]:
        write_atomically(folder / FIGURE, drawings.as_file(found["panels"]))
    return found
