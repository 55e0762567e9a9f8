"""compare.py --search: what Optuna proposes, whatever interrupts it, and that images held out of training judge it."""

import pytest

from common import UserError
from comparing.plan import make_plan
from comparing.search import Study, check_held_out
from tests.runs import forked, here, read_json, read_rows, succeeded

SWEEP = {"temperature": ["1..8"], "alpha": ["0.5..0.99"], "method": ["kd", "dkd"]}
FLAGS = ["--teachers", "vanilla", "--students", "resnet8", "--teacher_options", "model=resnet8"]
OPTIONS = ["--options", "image_size=8", "batch_size=128", "epochs=1", "train_fraction=0.3"]


def test_students_that_hold_nothing_out_are_refused():
    plan = {"teachers": {"vanilla": {}}, "students": ["resnet8"], "seeds": [0]}
    with pytest.raises(UserError, match="give --options val_fraction"):
        check_held_out(make_plan(plan, "here").runs())
    check_held_out(make_plan(plan | {"distill": {"val_fraction": 0.1}}, "here").runs())
    done = here("compare.py", *FLAGS, "--search", "3")
    assert done.returncode == 2 and "--search: needs --teachers, --students and --sweep" in done.stderr


def test_trials_follow_from_their_numbers_and_a_stopped_one_goes_on(tmp_path):
    pytest.importorskip("optuna", reason="pip install -r requirements-search.txt")
    one, other = (Study(tmp_path / name / "search.db", {"seeds": [0]}, SWEEP, 0) for name in "ab")
    seen = []
    for number in range(3):
        trial = one.propose()
        assert trial["number"] == number
        assert number or one.propose() == trial  # nobody has said what came of it
        assert trial["values"]["temperature"] in range(1, 9) and 0.5 <= trial["values"]["alpha"] <= 0.99
        assert trial == other.propose()
        for study in (one, other):
            study.tell(number, None if number == 1 else trial["values"]["alpha"])
        seen.append(trial["values"]["alpha"])
    assert [each["score"] for each in one.trials()] == [seen[0], None, *seen[2:]]
    assert len(set(seen)) == 3 and Study(one.file, {"seeds": [1]}, SWEEP, 0).trials() == []
    assert one.propose() != Study(tmp_path / "c/search.db", {"seeds": [0]}, SWEEP, 1).propose()


def test_the_best_trial_is_the_best_on_held_out_images(tmp_path):
    pytest.importorskip("optuna", reason="pip install -r requirements-search.txt")
    words = ["compare.py", *FLAGS, *OPTIONS, "val_fraction=0.3", "--sweep", "temperature=1..8", "alpha=0.1..0.99"]
    words += ["--output_dir", tmp_path / "out", "--runs", tmp_path / "runs"]
    succeeded(forked(*words, "--search", 2))
    done = succeeded(forked(*words, "--search", 3))
    assert "trial 2:" in done.stdout and "trial 1: temperature" in done.stdout.partition("held out")[2]
    trials = read_json(tmp_path / "out/search.json")
    assert [each["number"] for each in trials] == [0, 1, 2]
    best = max(trials, key=lambda each: each["score"])
    for trial in trials:
        record = read_json(tmp_path / f"out/records/trial{trial['number']}/seed0-resnet8-vanilla.json")
        assert {name: record["options"][name] for name in trial["values"]} == trial["values"]
        (last,) = read_rows(tmp_path / "runs" / record["folder"].rpartition("/")[2] / "metrics.jsonl")
        assert trial["score"] == last["val_accuracy"]["student"] != last["accuracy"]["student"]
    reported = read_json(tmp_path / "out/comparison.json")
    assert {run["options"].get("alpha") for run in reported["runs"]} == {None, best["values"]["alpha"]}
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 1 + 1 + 3  # teacher and student alone once
