"""What is reported of a comparison: means, differences and verdicts by hand, and the page that shows them."""

import json
import re
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest

from common import UserError
from engine.run_folder import RunFolder
from reports.comparison import as_markdown, compare, tables
from reports.page import comparison_page, run_page
from reports.statistics import student_interval
from tests.runs import TINY, forked, here, read_json, succeeded

TEST = dict.fromkeys(("confidence", "entropy", "nll", "kl", "agreement", "cka"), 0.5)
COST = {"seconds": 2.0, "images_per_second": 50.0, "peak_memory_bytes": 3e6, "epochs": 5, "losses": {"ce": 0.1}}
TOP1 = {  # by source, student and method: seeds 0 and 1
    ("vanilla", "a", "kd"): (90.0, 92.0),
    ("vanilla", "a", "dkd"): (91.0, 91.0),
    ("vanilla", "b", "kd"): (80.0, 82.0),
    ("vanilla", "b", "dkd"): (84.0, 84.0),
    ("gtn", "a", "kd"): (93.0, 95.0),
    ("gtn", "a", "dkd"): (92.0, 94.0),
    ("gtn", "b", "kd"): (84.0, 88.0),
    ("gtn", "b", "dkd"): (86.0, 88.0),
    ("alone", "a", "none"): (70.0, 74.0),
    ("alone", "b", "none"): (60.0, 64.0),
}


def records(seeds: int = 2, methods: tuple[str, ...] = ("kd", "dkd")) -> list[dict]:
    students = [
        {
            "script": "distill.py",
            "source": source,
            "student": student,
            "variant": method,
            "seed": seed,
            "top1": top1[seed],
        }
        for (source, student, method), top1 in TOP1.items()
        if method in (*methods, "none")
        for seed in range(seeds)
    ]
    gates = {"branch1": {"layer1": {"res3x2": 0.5, "zero": 0.5}, "layer2": {"res3x2": 0.9, "identity": 0.1}}}
    teachers = [
        {"script": "train_teacher.py", "source": name, "seed": seed, "top1": 95.0 + seed, "curve": [50.0, 95.0]}
        for name in ("vanilla", "gtn")
        for seed in range(seeds)
    ]
    for each in teachers:
        if each["source"] == "gtn":
            each |= {"branches": {"branch1": [40.0, 60.0]}, "gates": gates}
    return [each | COST | {"test": TEST, "run": f"run{number}"} for number, each in enumerate(students + teachers)]


def found(**changes) -> dict:
    return compare(records(**changes), ["a", "b"], ["vanilla", "gtn"])


def cells(rows: list[dict], student: str, method: str) -> dict:
    (row,) = (row for row in rows if (row["student"], row["method"]) == (student, method))
    return row["cells"]


def test_means_and_deviations_by_hand():
    means = found()["means"]
    one = cells(means, "a", "kd")["gtn"]
    assert (one["mean"], one["deviation"], one["runs"]) == (94.0, pytest.approx(stdev([93, 95])), 2)
    assert cells(means, "b", "average")["vanilla"]["mean"] == mean([80, 82, 84, 84])
    assert cells(means, "average", "kd")["vanilla"]["mean"] == mean([90, 92, 80, 82])
    every = [top1 for (source, *_), pair in TOP1.items() if source == "gtn" for top1 in pair]
    assert cells(means, "average", "average")["gtn"]["mean"] == mean(every)
    # The best method is each student's and each teacher's own.
    best = cells(means, "b", "best")
    assert (best["vanilla"]["mean"], best["vanilla"]["method"]) == (84.0, "dkd")
    assert (cells(means, "a", "best")["vanilla"]["mean"], best["gtn"]["mean"]) == (91.0, 87.0)
    assert cells(means, "average", "best")["gtn"]["mean"] == mean([93, 95, 86, 88])
    # A student alone stands beside every method, and counts once.
    alone = cells(means, "a", "dkd")["alone"], cells(means, "average", "average")["alone"]
    assert (alone[0]["mean"], alone[1]["mean"], alone[1]["runs"]) == (72.0, 67.0, 4)


def test_differences_are_paired_over_students_methods_and_seeds():
    rows = {(row["one"], row["other"]): row for row in found()["differences"]}
    pairs = [
        after - before
        for (source, student, method), top1 in TOP1.items()
        if source == "gtn"
        for after, before in zip(top1, TOP1["vanilla", student, method], strict=True)
    ]
    gain = rows["gtn", "vanilla"]
    assert (gain["mean"], gain["pairs"], gain["seeds"]) == (mean(pairs), 8, 2)
    assert gain["interval"] == pytest.approx(student_interval([mean(pairs[::2]), mean(pairs[1::2])]))
    assert gain["verdict"].startswith("not distinguishable") and rows["alone", "vanilla"]["verdict"] == "worse"
    assert (
        f"Students of gtn against those of vanilla: {gain['verdict']} ({gain['mean']:+.2f} points" in found()["verdict"]
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_tables_show_intervals_only_over_several_seeds(seeds):
    """Students of one seed share a teacher: two of them say nothing about the next seed."""
    table = as_markdown(found(seeds=seeds, methods=("kd",)))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    by_name = {name: rest for name, *rest in filter(None, lines)}
    _, vanilla, gtn, gain = by_name["average (95% interval)"]
    difference, interval, pairs, of_seeds, verdict = by_name["gtn - vanilla"]
    expected = "+4.00" if seeds == 2 else "+3.50"
    assert vanilla.startswith(("86.00", "85.00")) and (difference, gain, pairs) == (expected, expected, str(2 * seeds))
    assert of_seeds == str(seeds) and {bool(interval), " to " in vanilla, " to " in gtn} == {seeds > 1}
    assert (verdict == "too few seeds to tell") == (seeds == 1)


def test_classes_that_students_never_saw_have_a_table():
    assert not any("by class" in table.title for table in tables(found()))
    changed = [each | {"test": TEST | {"seen": each["top1"], "unseen": 2.0 * each["seed"]}} for each in records()]
    (table,) = (each for each in tables(compare(changed, ["a", "b"], ["vanilla", "gtn"])) if "by class" in each.title)
    assert table.columns == ["method", "seen in training", "left out"]
    rows = {(name, method): cells for name, method, *cells in table.rows}
    assert rows.keys() == {(name, method) for name in ("alone", "vanilla", "gtn") for method in ("kd", "dkd")}
    for source, method in rows:
        of = "none" if source == "alone" else method
        average = mean(v for key, pair in TOP1.items() if (key[0], key[2]) == (source, of) for v in pair)
        assert rows[source, method] == [f"{average:.2f}", "1.00"]


def test_doubts():
    said = " ".join(found(seeds=1)["doubts"])
    assert "1 seed:" in said and "2 students:" in said and "at most 5 epochs" in said
    fewer = [each for each in records() if (each["source"], each.get("student"), each["seed"]) != ("gtn", "b", 1)]
    assert any("as many runs" in each for each in compare(fewer, ["a", "b"], ["vanilla", "gtn"])["doubts"])
    missing = compare([each for each in records() if each["source"] != "gtn"], ["a", "b"], ["vanilla", "gtn"])
    assert any("No student of gtn" in each for each in missing["doubts"])


class Page(HTMLParser):
    """What a page holds; refuses elements that are not closed in order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.rows, self.ids, self.links, self.titles = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def _note(self, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("src", "href", "data", "action") if name in given]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in given.values()))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def stands_alone(text: str) -> Page:
    """No address of another place, no id twice, every reference inside the page leads somewhere."""
    page = Page(text)
    assert "://" not in text and "@import" not in text
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    return page


def comparison(**changes) -> dict:
    extra = {"name": "<digits> & co", "command": "python compare.py plan.yaml", "planned": 14, "done": 14, "failed": {}}
    return json.loads(json.dumps(found(**changes) | extra | {"runs": records(**changes)}))


def test_a_comparisons_page_stands_alone_and_shows_the_numbers_of_its_json():
    content = comparison()
    page = stands_alone(comparison_page(content))
    shown = [row for row in page.rows if row]
    for table in tables(content):
        assert [table.title, *table.columns] in shown
        assert all(row in shown for row in table.rows)
    text = "".join(page.text)
    assert "<digits> & co" in text and content["verdict"] in text and content["command"] in text
    assert all(doubt in text for doubt in content["doubts"])
    assert {"Students' accuracy", "Differences between teachers", "Cost", "What to doubt", "Again"} <= set(page.titles)
    assert "branch1" in text and "identity" in text  # curves and the gates' heat map
    assert ["teachers", "4", "8", "400", "3"] in shown
    assert "<digits>" not in comparison_page(content)
    failed = stands_alone(comparison_page(content | {"failed": {"seed0-x": "exit code 1: <oom>"}}))
    assert "seed0-x: exit code 1: <oom>" in "".join(failed.text)


def test_points_lie_where_the_means_are():
    from reports.figures import points

    rows = [
        {"student": name, "method": "kd", "cells": {"vanilla": {"mean": mean, "interval": None}}}
        for name, mean in (("a", 10.0), ("b", 20.0), ("c", 40.0))
    ]
    places = [
        float(x)
        for x in re.findall(
            r'<use href="#[^"]*" x="([\d.]+)" y="[\d.]+" style="fill: #3b82c4', points(rows, ["vanilla"])
        )
    ]
    assert len(places) >= 3
    x = places[-3:] if places[-3:] == sorted(places[-3:]) else places[:3]
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(2, rel=1e-3)


def test_a_runs_page_stands_alone_and_shows_its_summary(tmp_path):
    succeeded(here("train_teacher.py", *TINY, "--train_fraction", "0.2", "--output_dir", tmp_path / "run"))
    done = succeeded(forked("-m", "reports", tmp_path / "run"))
    assert done.stdout.strip() == str(tmp_path / "run/report.html")
    page = stands_alone((tmp_path / "run/report.html").read_text())
    summary = read_json(tmp_path / "run/summary.json")
    assert ["parameters", str(summary["parameters"])] in page.rows and ["top1", f"{summary['top1']:.2f}"] in page.rows
    assert f"{summary['top1']:.2f}% top-1" in "".join(page.text) and "lr_schedule: cosine" in "".join(page.text)
    # The page is the run's, and goes with it when the run is replaced.
    RunFolder(tmp_path / "run", overwrite=True).begin({})
    assert not (tmp_path / "run/report.html").exists()
    with pytest.raises(UserError, match="holds no finished run"):
        run_page(tmp_path)
