"""compare.py --paper: which runs a table has, at what scale, and that the paper's figures stand beside its own runs."""

import json

import pytest

from common import UserError
from comparing.papers import beside, list_tables, paper_comparison, shortened
from comparing.planned import CONFIGS
from comparing.records import on_test_images, recorded, transferred
from models import ModelInfo, create_model, save_pretrained
from recipes import table, tables
from tests.runs import here, read_json, succeeded


def test_a_tables_runs_are_pairs_by_teacher_and_method():
    found = paper_comparison("sftn/1", "full", [0, 1])
    assert found.teachers == ["vanilla", "sftn"] and len(found.methods) == 12
    assert found.students[0] == "wrn16_2 of wrn40_2" and len(found.students) == 4
    assert len(found.runs) == 2 * (2 + 4 + 4 * (1 + 2 * 12))  # vanilla and SFTN teachers, students alone and distilled
    by_name = {run.name: run for run in found.runs}
    for run in found.runs:
        if run.source == "sftn" and run.script == "distill.py":
            student, _, model = run.student.partition(" of ")
            assert (run.teacher.config.student, run.teacher.config.model, run.config.student) == (
                student,
                model,
                student,
            )
            assert run.teacher is by_name[run.teacher.name] and run.teacher.seed == run.seed
            assert (run.config.epochs, run.teacher.config.alpha) == (240, 3.0)
            break


def test_every_table_has_names_and_runs_for_its_figures():
    for name, each in tables().items():
        found = paper_comparison(name, "short", [3])
        names = [run.name for run in found.runs]
        assert len(set(names)) == len(names) and all(
            each["run"] in {n.partition("-")[2] for n in names} for each in found.rows
        )
        assert len(found.rows) == sum(not key.endswith("_std") for row in each.rows for key in row.figures)
        assert all(run.source in [*found.teachers, "alone", "peers"] for run in found.runs)
        places = [names.index(need.name) < names.index(run.name) for run in found.runs for need in run.needs]
        assert all(places)
    moved = paper_comparison("sftn/figure5", "short", [0], {"cifar100": "digits", "cifar10": "other"})
    assert [run.dataset for run in moved.runs] == ["digits"] * 4 and moved.runs[0].config.dataset == "cifar100"
    assert moved.note.endswith(" Images of digits in place of cifar100.")
    with pytest.raises(UserError, match="did you mean sftn/"):
        paper_comparison("sftn/12", "full", [0])


def test_short_is_a_stated_fraction_of_epochs_and_images():
    full = {"epochs": 240, "lr_milestones": [150, 180, 210], "freeze_teacher_epochs": 60, "lr": 0.05}
    short = shortened(full)
    assert short == {
        "epochs": 10, "lr_milestones": [6, 8, 9], "freeze_teacher_epochs": 2, "lr": 0.05, "train_fraction": 0.1
    }  # fmt: skip
    assert shortened({"schedule": "60/200", "epochs": 200})["schedule"] == "2/8"
    (run, *_) = (run for run in paper_comparison("sftn/1", "short", [0]).runs if run.script == "train_teacher.py")
    assert run.config.last_epoch == 10 and CONFIGS[run.script] is type(run.config)


def record(run: str, seed: int, top1: float, **more) -> dict:
    return {"run": f"seed{seed}-{run}", "seed": seed, "top1": top1, "top5": top1 + 5, "test": {"kl": 0.4}} | more


def test_the_papers_figures_stand_beside_the_means():
    rows = paper_comparison("eskd/1", "full", [0]).rows
    alone, teacher, student = rows[:3]
    assert (alone["paper"], teacher["figure"], teacher["paper"], student["paper"]) == (8.751, "teacher", 5.419, 8.350)
    records = [record(student["run"], seed, top1) for seed, top1 in ((0, 91.0), (1, 92.0))]
    found = beside(rows, [*records, record(teacher["run"], 0, 94.0)])
    assert found[2]["ours"] == pytest.approx(8.5) and found[2]["runs"] == 2  # errors, as there
    assert found[1]["ours"] == pytest.approx(6.0) and found[0]["ours"] is None
    alike = paper_comparison("sftn/8", "full", [0]).rows[0]
    assert (alike["figure"], beside([alike], [record(alike["run"], 0, 70.0)])[0]["ours"]) == ("kl", 0.4)
    top5 = next(row for row in paper_comparison("sftn/3", "full", [0]).rows if row["figure"] == "student_top5")
    assert beside([top5], [record(top5["run"], 0, 70.0)])[0]["ours"] == 75.0


def test_transfer_and_unseen_classes_are_as_evaluate_has_them(tmp_path):
    found = paper_comparison("sftn/7", "short", [0])
    alone, *_, last = found.rows
    assert (alone["figure"], alone["paper"], last["figure"], last["paper"]) == ("stl10", 70.18, "tiny_imagenet", 39.95)
    records = [record(last["run"], 0, 1.0, transfer={"tiny_imagenet": 40.5})]
    assert beside([last], records)[0]["ours"] == 40.5 and beside([alone], records)[0]["ours"] is None
    averages = {"vanilla": (71.05, 33.80), "sftn": (75.77, 39.86)}
    for method, printed in averages.items():
        rows = [row for row in table("sftn/7").rows if row.teacher and row.teacher.method == method]
        means = [sum(row.figures[name] for row in rows) / 5 for name in ("stl10", "tiny_imagenet")]
        assert means == pytest.approx(printed, abs=0.012)
    run = found.runs[0]
    assert run.transfer == {"stl10": 10, "tiny_imagenet": 10}  # of 240
    (tmp_path / f"{run.name}.json").write_text(json.dumps({"key": run.key}))
    assert recorded(run, tmp_path) is None  # made for another table
    network = create_model("resnet8", 10, image_size=8)
    save_pretrained(network, ModelInfo("resnet8", "digits", 10, 8, [0.5] * 3, [0.25] * 3), tmp_path)
    (tmp_path / "config.yaml").write_text("{dataset: digits, exclude_classes: [0, 1, 2, 3, 4]}")
    succeeded(here("evaluate.py", tmp_path, "--transfer", "digits", "--transfer_epochs", 2, "--latency", "false"))
    evaluated = read_json(tmp_path / "evaluation.json")
    assert transferred(tmp_path, {"digits": 2}) == {"digits": evaluated["transfer"]["top1"]}
    measured = on_test_images(tmp_path, [])
    assert (measured["seen"], measured["unseen"]) == (evaluated["top1_seen"], evaluated["top1_unseen"])
    assert measured["seen"] != measured["unseen"]


def test_the_list_costs_tables():
    head, *lines, measured = list_tables(["sftn/8", "gtn/figure1"])
    assert [line.split()[0] for line in lines] == ["sftn/8", "gtn/figure1"] and "resnet20 at 32x32" in measured
    one = next(line for line in lines if line.startswith("gtn/figure1")).split()
    assert one[1:5] == ["1", "1", "12.0", "0.1"]  # 240 epochs of 50,000 images; 10 of 5,000
    full, short = (float(each.replace(",", "")) for each in one[5:7])
    assert full > short > 0
    assert "hours full" in head and table("gtn/figure1").title in lines[1]
