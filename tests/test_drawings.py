"""The papers' figures: what is drawn of which runs, and where the papers' own numbers stand."""

import json
import re
from statistics import mean
from xml.etree import ElementTree

import pytest

from common import write_atomically
from comparing.order import Outcome
from comparing.papers import beside, paper_comparison
from comparing.places import Places
from comparing.report import write_report
from recipes import table
from reports.drawings import as_file, in_page, panels
from tests.runs import read_json
from tests.test_comparison import COST, TEST, stands_alone

EPOCHS = 4


def records(name: str, seeds: tuple[int, ...] = (0, 1)) -> tuple[list[dict], list[dict]]:
    """Made-up records of a figure's runs, each with a top-1 of its own, and what stands beside the paper."""
    found = paper_comparison(name, "full", seeds)
    records = []
    for number, run in enumerate(found.runs):
        curve = [number / 10 + epoch + run.seed for epoch in range(EPOCHS)]
        own = {"run": run.name, "script": run.script, "source": run.source, "student": run.student, "seed": run.seed}
        own |= COST | {
            "key": run.key,
            "test": TEST,
            "losses": {},
            "variant": run.method,
            "model": getattr(run.config, "model", None),
            "top1": curve[-1],
            "top5": 99.0,
        }
        own |= {"curve": curve}
        own |= {"kl_curve": [9 - each for each in curve]} if run.teacher else {}
        records.append(own | {"branches": {"branch1": [each / 2 for each in curve], "branch2": curve}})
    return found.drawing, records, beside(found.rows, records)


def of(records: list[dict], **wanted: str | None) -> list[dict]:
    return [each for each in records if all(each[key] == value for key, value in wanted.items())]


def test_figure_3_has_the_best_method_of_each_pair_and_teacher():
    drawing, runs, paper = records("sftn/figure3")
    (panel,) = panels(drawing, runs, paper)
    assert len(panel["places"]) == 8
    place = panel["places"].index("vgg8 of resnet50")
    lines, printed = panel["lines"], panel["paper"]
    assert list(lines) == ["vanilla teacher", "best student of vanilla", "best student of sftn"]
    assert lines["vanilla teacher"][place] == [
        each["top1"] for each in of(runs, script="train_teacher.py", source="vanilla", model="resnet50")
    ]
    best = max(of(runs, source="sftn", student="vgg8 of resnet50"), key=lambda each: each["top1"])
    alike = of(runs, source="sftn", student="vgg8 of resnet50", variant=best["variant"])
    assert lines["best student of sftn"][place] == [each["top1"] for each in alike] and len(alike) == 2
    # Section 4.2.1: on average 1.10 points between the best students.
    gains = [a - b for a, b in zip(printed["best student of sftn"], printed["best student of vanilla"], strict=True)]
    assert round(mean(gains), 2) == 1.10
    assert printed["vanilla teacher"][place] == 78.70 and printed["vanilla teacher"].count(79.25) == 4


def test_figure_4_holds_students_above_their_teachers():
    drawing, runs, paper = records("sftn/figure4")
    teachers, students = panels(drawing, runs, paper)
    assert teachers["places"] == students["places"] == ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
    for panel, wanted in ((teachers, {"model": "resnet44"}), (students, {"student": "mobilenetv2 of resnet44"})):
        script = "train_teacher.py" if panel is teachers else "distill.py"
        for source in ("vanilla", "sftn"):
            expected = [each["top1"] for each in of(runs, script=script, source=source, **wanted)]
            assert panel["lines"][source][2] == expected and len(expected) == 2
    assert not paper  # it prints no numbers


def test_curves_are_means_by_epoch_and_end_at_the_papers_accuracy():
    drawing, runs, paper = records("sftn/figure5")
    kl, accuracy = panels(drawing, runs, paper)
    (first, second) = of(runs, script="distill.py", source="sftn")
    assert accuracy["lines"]["sftn"] == [list(pair) for pair in zip(first["curve"], second["curve"], strict=True)]
    assert kl["lines"]["sftn"][1] == [first["kl_curve"][1], second["kl_curve"][1]]
    assert accuracy["paper"] == {"vanilla": [None] * 3 + [75.25], "sftn": [None] * 3 + [78.07]}  # Table 2
    drawing, runs, paper = records("eskd/figure1", (0,))
    kl, accuracy = panels(drawing, runs, paper)
    stopped = "kd for half of the epochs"
    names = [f"{teacher}, {method}" for teacher in ("resnet34", "resnet34 50") for method in ("kd", stopped)]
    assert list(accuracy["lines"]) == ["alone", *names] and list(kl["lines"]) == names
    assert accuracy["paper"]["alone"] == [None] * 3 + [pytest.approx(100 - 30.24)]  # errors, there
    assert all(accuracy["paper"][name] == [None] * 4 for name in names)
    options = [row.options for row in table("eskd/figure1").rows if row.label == stopped]
    assert options == [{"stop_kd_epoch": 50}] * 2  # of 100


def test_branches_have_a_panel_each():
    drawing, runs, paper = records("gtn/figure1", (0,))
    one, two = panels(drawing, runs, paper)
    assert (one["title"], two["title"]) == ("branch1", "branch2")
    assert one["lines"]["branch"][2] == [runs[0]["curve"][2] / 2] and one["lines"]["teacher"][2] == [
        runs[0]["curve"][2]
    ]


def test_what_is_not_done_is_not_drawn():
    drawing, runs, paper = records("sftn/figure4")
    teachers = of(runs, script="train_teacher.py")
    assert panels(drawing, teachers, paper) == [] and panels("", runs, paper) == []
    some = [*teachers, *of(runs, source="sftn", student="mobilenetv2 of resnet56")]
    (above, below) = panels(drawing, some, paper)
    assert above["places"] == ["resnet56"] and list(below["lines"]) == ["sftn"]


def test_a_figure_comes_first_in_the_page_and_is_a_file(tmp_path):
    made = paper_comparison("sftn/figure5", "full", [0, 1])
    for each in records("sftn/figure5")[1]:
        write_atomically(tmp_path / f"records/{each['run']}.json", json.dumps(each))
    places = Places(tmp_path / "runs", tmp_path / "records")
    write_report(made, places, tmp_path / "out", "python compare.py", Outcome())
    page = stands_alone((tmp_path / "out/report.html").read_text())
    assert page.titles[0] == "The figure" and "on the test split" in "".join(page.text)
    found = read_json(tmp_path / "out/comparison.json")
    assert (tmp_path / "out/figure.svg").read_text() == as_file(found["panels"]) and len(found["panels"]) == 2
    assert [row["ours"] for row in found["paper"] if row["figure"] == "student"] == [
        mean(each["top1"] for each in of(found["runs"], script="distill.py", source=name))
        for name in ("vanilla", "sftn")
    ]


def test_lines_and_crosses_lie_where_their_values_are():
    """In a file, and in a page, which must hold no address."""
    paper = {"a": [None, None, 10.0]}
    panel = {"title": "t", "ylabel": "y", "places": None, "lines": {"a": [[0.0, 2.0], [], [4.0]]}, "paper": paper}
    text = as_file([panel])
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    uses = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #3b82c4; stroke: #3b82c4', text)
    (x, y), (x1, y1), (x3, y3), *legend = [tuple(map(float, each)) for each in uses]  # the cross first
    assert len(legend) == 1
    assert x == x3 > x1  # what is missing has no mark
    assert (y1 - y) / (y1 - y3) == pytest.approx((10 - 1) / (4 - 1), rel=1e-3)  # the mean of 0 and 2 is 1
    assert "://" not in in_page([panel]) and 'role="img"' in in_page([panel])
