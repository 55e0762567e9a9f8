"""benchmarks.evidence: what a plan's runs are, that they are made once, and that an interrupted one goes on."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import evidence
from benchmarks.split import divide

POOL = {"stem": 4, "head": 8, "candidates": ["res3x2", "identity", "zero"], "widths": [4, 4, 4, 8, 8, 8]}
PLAN = {
    "common": {"dataset": "tiny", "image_size": 8, "batch_size": 128, "epochs": 1},
    "teacher": {"model": "resnet8"},
    "teachers": {
        "vanilla": {"method": "vanilla"},
        "gtn": {"method": "gtn", "weights": "vanilla", "pool": POOL | {"strides": [1, 1, 1, 2, 2, 1]}},
        "sftn": {"method": "sftn", "for_each_student": True, "distill": {"temperature": 2.0}},
    },
    "students": ["resnet8", "pool:1"],
    "seeds": [0, 1],
}


def plan(**changes) -> evidence.Plan:
    return evidence.Plan(name="tiny", **PLAN | changes)


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence", *map(str, arguments)])
    evidence.main()


def test_a_plans_runs_are_seeds_times_teachers_and_students():
    runs = {run.name: run for run in plan().runs()}
    assert len(runs) == 2 * (1 + 1 + 2 + 2 * (1 + 3))  # SFTN has a teacher a student
    assert runs["seed1-pool1-sftn"].teacher == "seed1-sftn-pool1"
    assert runs["seed1-pool1-sftn"].options["temperature"] == 2.0
    assert "temperature" not in runs["seed1-pool1-gtn"].options and runs["seed1-pool1-gtn"].teacher == "seed1-gtn"
    assert runs["seed0-gtn"].options["weights"] == "seed0-vanilla"
    assert runs["seed0-resnet8-alone"].options["method"] == "none"
    assert not any("alone" in run.name for run in plan(alone=None).runs())


def test_a_command_names_the_data_and_the_folders(tmp_path):
    runs = {run.name: run for run in plan().runs()}
    words = evidence.command(runs["seed1-gtn"], tmp_path, {"tiny": "digits"})[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--output_dir"] == str(tmp_path / "seed1-gtn")
    recipe = yaml.safe_load(Path(given["--config"]).read_text())
    assert recipe["dataset"] == "digits" and recipe["seed"] == 1 and recipe["pool"]["stem"] == 4
    assert recipe["weights"] == str(tmp_path / "seed1-vanilla")


def test_runs_are_made_once_described_and_gone_on_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(PLAN | {"teachers": {"vanilla": {"method": "vanilla"}}, "students": ["resnet8"], "alone": None})
    )
    places = [tmp_path / "tiny.yaml", "--seeds", "0", "--data", "tiny=digits", "--work", tmp_path / "work"]
    places += ["--results", tmp_path / "results"]
    with pytest.raises(SystemExit, match="the same command goes on"):
        call(monkeypatch, *places, "--minutes", "0.0001")
    call(monkeypatch, *places)
    results = tmp_path / "results/tiny"
    teacher, student = (
        json.loads((results / f"seed0-{name}.json").read_text()) for name in ("vanilla", "resnet8-vanilla")
    )
    assert teacher["top1"] > 10 and 0 < teacher["test"]["confidence"] < 1 and "kl" not in teacher["test"]
    assert student["source"] == "vanilla" and student["test"]["kl"] > 0 and 0 <= student["test"]["cka"] <= 1
    assert "vanilla" in (results / "table.md").read_text()
    # A student whose record is gone is made again, and so is its teacher where the folder is gone; no other run is.
    (results / "seed0-resnet8-vanilla.json").unlink()
    for run in ("seed0-vanilla", "seed0-resnet8-vanilla"):
        shutil.rmtree(tmp_path / "work/tiny" / run)
    before = (results / "seed0-vanilla.json").read_bytes()
    call(monkeypatch, *places)
    again = json.loads((results / "seed0-resnet8-vanilla.json").read_text())
    assert again["top1"] == student["top1"] and (results / "seed0-vanilla.json").read_bytes() == before
    capsys.readouterr()
    call(monkeypatch, *places, "--dry_run")
    assert "2 runs, 2 done, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted(Path(evidence.ROOT / "benchmarks/plans").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_plan_is_understood_by_the_scripts(path, tmp_path):
    from distill import DistillConfig
    from engine.command_line import parse
    from train_teacher import TeacherConfig

    known = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}
    runs = list(evidence.Plan(name=path.stem, **yaml.safe_load(path.read_text())).runs())
    seen = set()
    for run in runs:
        if (run.source, run.script) not in seen:
            seen.add((run.source, run.script))
            words = evidence.command(run, tmp_path, {run.options["dataset"]: "digits"})[2:]
            parse(known[run.script], "", {}, words)


def test_a_split_takes_the_first_images_of_each_class_and_then_the_next():
    assert divide([0, 1, 0, 0, 1, 1, 0], 2, 1) == ([0, 2, 1, 4], [3, 5])
    with pytest.raises(SystemExit, match="class 1 has 2 images"):
        divide([0, 0, 0, 1, 1], 2, 1)
