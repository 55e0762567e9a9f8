"""report.html: one page that stands alone (no network, light and dark) of a comparison or of a run."""

import json
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader

from common import UserError
from reports import drawings, figures
from reports.comparison import ALONE, tables, variant_of

MOST_COMMANDS = 400
TITLES = {
    "students' top-1, %": "Students' accuracy",
    "top-1, paired over students and seeds": "Differences between teachers",
    "students' top-1, %, by class": "Classes left out of distillation",
    "beside the paper": "Beside the paper",
    "teacher": "Teachers, and what they cost",
    "student to its teacher": "How alike students are to their teacher",
}


def comparison_page(found: dict) -> str:
    """The page of comparison.json's content."""
    records = found["runs"]
    sections = [_paper_figure(found["panels"])] if found.get("panels") else []
    for table in tables(found):
        section = {"title": TITLES[table.title], "columns": [table.title, *table.columns], "rows": table.rows}
        if table.title == "students' top-1, %":
            rows = [row for row in found["means"] if row["method"] not in ("average", "best")]
            plot = figures.points(rows, found["sources"])
            section["figures"] = [{"svg": plot, "caption": "Means over seeds. The axis does not start at zero."}]
        sections.append(section)
    sections += [each for each in (_student_curves(records), _teacher_curves(records), _cost(records)) if each]
    sections.append({"title": "What to doubt", "points": found["doubts"] or ["Nothing that is known here."]})
    if found["failed"]:
        failures = [f"{name}: {reason}" for name, reason in found["failed"].items()]
        sections.append({"title": "What failed", "points": failures})
    commands = "\n".join(each["command"] for each in records[:MOST_COMMANDS] if "command" in each)
    again = {"title": "Again", "code": f"{found['command']}\n\n# its runs\n{commands}", "summary": "the exact commands"}
    sections += [again, versions(records)]
    done = f"{found['done']} of {found['planned']} runs are done."
    question = found["note"] or f"Which teacher is good for {', '.join(found['students'])}?"
    return render(found["name"], f"{question} {done}", found["verdict"], sections)


def run_page(folder: Path) -> str:
    """The page of a finished run folder. Raises UserError where it holds none."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        config = yaml.safe_load((folder / "config.yaml").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: holds no finished run ({error})") from None
    epochs = [row for row in rows if row["epoch"] >= 1]  # up to 0 they are the warm-up's
    accuracy = {name: [row["accuracy"].get(name) for row in epochs] for name in epochs[-1]["accuracy"]}
    losses = {name: [row["losses"].get(name) for row in epochs] for name in epochs[-1]["losses"]}
    plots = [
        figures.curves(accuracy, "top-1 on the test split, %", "accuracy"),
        figures.curves(losses, "nats", "losses"),
    ]
    sections = [{"title": "By epoch", "figures": [{"svg": plot} for plot in plots]}]
    if "gates" in epochs[-1]:
        sections.append(_gates(epochs[-1]["gates"], "gates"))
    kept = ("method", "model", "parameters", "dataset", "seed", "top1", "top5", "epochs", "seconds")
    kept += ("images_per_second", "peak_memory_bytes", "processes")
    numbers = [[name, _number(summary[name])] for name in kept if name in summary]
    sections.append({"title": "In numbers", "columns": ["", "value"], "rows": numbers})
    doubts = [*summary.get("warnings", []), "One run: another seed gives another figure; compare.py runs several."]
    sections.append({"title": "What to doubt", "points": doubts})
    settings = yaml.safe_dump(config, sort_keys=False)
    sections.append(
        {"title": "Settings", "code": settings, "summary": "config.yaml, all options as they were resolved"}
    )
    sections.append(versions([summary]))
    best = summary["best"]
    verdict = (
        f"{summary['top1']:.2f}% top-1 on the test split at the last epoch (best: {best['top1']:.2f}% on the "
        f"{best['chosen_on']} split in epoch {best['epoch']})."
    )
    title = f"{summary['method']}: {summary['model']} on {summary['dataset']}, seed {summary['seed']}"
    return render(title, "", verdict, sections)


def _paper_figure(panels: list[dict]) -> dict:
    """The figure that a paper has of these runs."""
    return {"title": "The figure", "figures": [{"svg": drawings.in_page(panels), "caption": drawings.CAPTION}]}


def _student_curves(records: list[dict]) -> dict | None:
    """The first seed's students by epoch: in one plot those that differ in their teacher or method, if not too many."""
    own = [each for each in records if each["script"] == "distill.py" and "curve" in each]
    plots: dict[str, dict[str, list[float]]] = {}
    several = len({variant_of(each) for each in own if each["source"] != ALONE}) > 1
    for each in own:
        if each["seed"] == own[0]["seed"]:
            words = [each["source"], *([variant_of(each)] if several and each["source"] != ALONE else [])]
            plots.setdefault(each["student"], {})[" ".join(words)] = each["curve"]
    shown = [
        {"svg": figures.curves(lines, "top-1 on the test split, %", f"student{number}"), "caption": student}
        for number, (student, lines) in enumerate(plots.items())
        if len(lines) <= len(figures.COLOURS)
    ]
    return {"title": "Students by epoch", "figures": shown} if shown else None


def _teacher_curves(records: list[dict]) -> dict | None:
    """The first seed's teachers and branches by epoch, and the gates at the end."""
    own = [each for each in records if each["script"] == "train_teacher.py"]
    first = [each for each in own if each["seed"] == own[0]["seed"]]
    shown = []
    for number, record in enumerate(first):
        if "curve" in record:
            lines = {"teacher": record["curve"]} | record.get("branches", {})
            svg = figures.curves(lines, "top-1 on the test split, %", f"curve{number}")
            shown.append({"svg": svg, "caption": record["run"]})
        if "gates" in record:
            shown += _gates(record["gates"], f"gates{number}", record["run"])["figures"]
    return {"title": "Teachers and their branches by epoch", "figures": shown} if shown else None


def _gates(gates: dict, name: str, run: str = "") -> dict:
    caption = f"{run} gates at the end: probability times number of candidates (1: uniform)".strip()
    return {"title": "Gates", "figures": [{"svg": figures.gates(gates, name), "caption": caption}]}


def _cost(records: list[dict]) -> dict:
    """Seconds of all runs by what they were."""
    rows = []
    for script, what in (("train_teacher.py", "teachers"), ("distill.py", "students")):
        own = [each for each in records if each["script"] == script]
        if own:
            images = sum(each["seconds"] * each["images_per_second"] for each in own)
            peak = max(each["peak_memory_bytes"] for each in own)
            seconds = sum(each["seconds"] for each in own)
            rows.append([what, str(len(own)), f"{seconds:,.0f}", f"{images:,.0f}", f"{peak / 1e6:,.0f}"])
    return {
        "title": "Cost",
        "columns": ["runs", "number", "seconds", "training images", "largest peak memory, MB"],
        "rows": rows,
    }


def versions(records: list[dict]) -> dict:
    """Devices, versions and commits of the runs, each once."""
    seen: dict[str, None] = {}
    for each in records:
        packages = ", ".join(f"{name} {version}" for name, version in each.get("versions", {}).items())
        seen[f"{each.get('device')}; {packages}; commit {each.get('git_commit')}"] = None
    return {"title": "Where it ran", "points": list(seen)}


def _number(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def render(title: str, question: str, verdict: str, sections: list[dict]) -> str:
    """The page: a title, what was asked, the answer, and sections as page.html.j2 takes them."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for each in sections:
        for figure in each.setdefault("figures", []):
            figure["svg"] = environment.filters["safe"](figure["svg"])
    return environment.get_template("page.html.j2").render(
        title=title, question=question, verdict=verdict, sections=sections
    )
