"""compare.py: what a plan's runs are, their keys, that each is made once whatever happens, and what is reported."""

import json
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.split import divide
from common import UserError
from comparing.cost import estimate, of_run
from comparing.local import Forks, slots
from comparing.making import check_folder
from comparing.order import execute
from comparing.places import Places, work_list
from comparing.plan import Plan, assignments, make_plan, read_plan
from comparing.planned import CONFIGS
from comparing.records import recorded
from engine.command_line import flags, parse
from engine.forks import result_of
from reports.statistics import student_interval
from tests.runs import ROOT, Fork, forked, here, read_json, read_rows, succeeded

POOL = {"stem": 4, "head": 8, "candidates": ["res3x2", "identity", "zero"], "widths": [4, 4, 4, 8, 8, 8]}
POOL |= {"strides": [1, 1, 1, 2, 2, 1]}
TINY = {"dataset": "tiny", "image_size": 8, "batch_size": 128, "epochs": 1, "train_fraction": 0.3}
PLAN = {
    "common": TINY,
    "teacher": {"model": "resnet8"},
    "teachers": {
        "vanilla": {"method": "vanilla"},
        "gtn": {"method": "gtn", "weights": "vanilla", "pool": POOL},
        "sftn": {"method": "sftn", "pool": POOL, "for_each_student": True, "distill": {"temperature": 2.0}},
    },
    "distill": {"pool": POOL},
    "students": ["resnet8", "pool:1"],
    "seeds": [0, 1],
}


def runs(**changes) -> dict:
    return {run.name: run for run in make_plan(PLAN | changes, "here").runs({"tiny": "digits"})}


def test_a_forks_end_leaves_its_parents_folders():
    with tempfile.TemporaryDirectory() as folder:
        assert result_of(lambda: 7) == 7
        assert Path(folder).is_dir()


def test_a_plans_runs_are_seeds_times_teachers_and_students():
    found = runs()
    assert len(found) == 2 * (1 + 1 + 2 + 2 * (1 + 3))  # SFTN has a teacher a student
    assert found["seed1-pool1-sftn"].teacher is found["seed1-sftn-pool1"]
    assert found["seed1-pool1-sftn"].options["temperature"] == 2.0
    assert "temperature" not in found["seed1-pool1-gtn"].options
    assert found["seed1-pool1-gtn"].teacher is found["seed1-gtn"]
    assert found["seed0-gtn"].weights is found["seed0-vanilla"]
    assert found["seed0-resnet8-alone"].config.method == "none" and found["seed0-resnet8-alone"].teacher is None
    assert not any("alone" in name for name in runs(alone=None))


def test_methods_and_sweeps_multiply_what_reads_them():
    teachers = PLAN["teachers"] | {"sftn": {"method": "sftn", "for_each_student": True}}
    sweep = {"temperature": [1, 2], "teacher.gate_every": [2, 4]}
    found = runs(methods={"kd": {}, "dkd": {}, "dml": {}}, sweep=sweep, teachers=teachers)
    names = {name for name in found if name.startswith("seed0-pool1")}
    teachers = ("vanilla", "gtn_gate_every=2", "gtn_gate_every=4", "sftn")
    methods = ("kd_temperature=1", "kd_temperature=2", "dkd_temperature=1", "dkd_temperature=2")
    expected = {f"seed0-pool1-{teacher}-{method}" for teacher in teachers for method in methods}
    assert names == expected | {"seed0-pool1-alone", "seed0-pool1-peers-dml"}
    assert found["seed0-pool1-gtn_gate_every=4-kd_temperature=1"].teacher.config.gate_every == 4
    with pytest.raises(UserError, match="--sweep: unknown name 'gate_every'"):
        runs(sweep={"gate_every": [2]})
    with pytest.raises(UserError, match="--sweep dkd_beta: none of kd reads it"):
        runs(sweep={"dkd_beta": [2]})
    with pytest.raises(UserError, match="--sweep temperature: teacher 'sftn' sets it"):
        runs(sweep=sweep)


def test_keys_are_the_configurations_whatever_a_run_is_called():
    one, other = runs(), runs(teachers={"standard": {"method": "vanilla", "lr": 0.05}}, seeds=[1, 0])
    assert one["seed0-vanilla"].key == other["seed0-standard"].key  # 0.05 is the default
    assert one["seed0-vanilla"].key != one["seed1-vanilla"].key
    assert one["seed0-pool1-vanilla"].key == other["seed0-pool1-standard"].key
    changed = runs(teachers={"vanilla": {"method": "vanilla", "smoothing": 0.1}})
    assert one["seed0-vanilla"].key != changed["seed0-vanilla"].key
    assert one["seed0-pool1-vanilla"].key != changed["seed0-pool1-vanilla"].key  # through its teacher
    assert one["seed0-pool1-alone"].key == changed["seed0-pool1-alone"].key
    unread = runs(distill={"pool": POOL, "dkd_beta": 3.0}, common=TINY | {"checkpointing_epochs": 7})
    assert unread["seed0-pool1-vanilla"].key == one["seed0-pool1-vanilla"].key
    assert len({run.key for run in one.values()}) == len(one)


@pytest.mark.parametrize("name", ["seed1-gtn", "seed0-pool1-sftn", "seed0-resnet8-alone"])
def test_a_command_gives_the_configuration_that_was_planned(name):
    run = runs(distill={"pool": POOL, "dkd_beta": 3.0, "exclude_classes": [], "flip": False})[name]
    script, *words = run.command(Path("runs"))
    config = parse(CONFIGS[script], "", {}, words)
    assert (config.output_dir, config.dataset, config.seed) == (f"runs/{run.folder}", "digits", run.seed)
    given = {"output_dir", "dataset", "seed", "teacher", "weights"}
    planned = {name: value for name, value in run.config.as_dict().items() if name not in given}
    assert {name: value for name, value in config.as_dict().items() if name not in given} == planned
    if run.weights:
        assert config.weights == f"runs/{run.weights.folder}"


def test_words_and_errors():
    assert flags({"a": [], "b": False, "c": True, "d": {"e": [1, 2]}, "f": None, "g": 0.5}) == [
        "--a=[]", "--b=false", "--c", "--d.e", "1", "2", "--g", "0.5",
    ]  # fmt: skip
    assert assignments("--options", ["a=1", "b=[x, y]", "c=d=e"]) == {"a": 1, "b": ["x", "y"], "c": "d=e"}
    for content, said in (
        ({"seeds": [0], "students": ["resnet8"]}, "here: 'teachers' is missing"),
        (PLAN | {"studnets": []}, "here: unknown name 'studnets'; did you mean students"),
        (PLAN | {"seeds": 3}, "'seeds' is to be a list"),
        ([], "a YAML mapping"),
    ):
        with pytest.raises(UserError, match=said):
            make_plan(content, "here")
    with pytest.raises(UserError, match="seed0-vanilla: unknown key 'epocs'; did you mean --epochs"):
        _ = runs(common=TINY | {"epocs": 3})["seed0-vanilla"].key
    with pytest.raises(UserError, match="starts from 'gtn', which comes after"):
        runs(teachers={"a": {"method": "vanilla", "weights": "gtn"}, "gtn": {"method": "gtn"}})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--teacher vanilla", "options: unknown name '--teacher'; did you mean --teachers"),
        ("--seeds one", "--seeds: invalid int value: 'one'"),
        ("--seeds", "--seeds: expected at least one argument"),
        ("--scale tiny", "--scale: invalid choice: 'tiny'"),
        ("nothing.yaml", "nothing.yaml: cannot read the plan"),
        ("--teachers vanilla", "give a plan, or --teachers and --students"),
        ("--paper sftn/99", "--paper: unknown name 'sftn/99'"),
        ("--paper sftn/8 --data cifar10=digits", "--data: unknown name 'cifar10'; did you mean cifar100?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, said):
    done = here("compare.py", *words.split())
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_costs_are_images_times_operations():
    found = runs()
    vanilla, student = of_run(found["seed0-vanilla"]), of_run(found["seed0-resnet8-vanilla"])
    images = round(1437 * 0.3)
    forward = vanilla.flops / (3 * images + 360)  # a training step is three forward passes
    assert vanilla.images == images and vanilla.bytes == 4 * 78_042  # resnet8 of 10 classes
    assert student.flops == pytest.approx(images * 4 * forward + 360 * forward)  # its teacher is a resnet8, too
    assert of_run(found["seed0-gtn"]).flops > vanilla.flops
    total = result_of(lambda: estimate([found["seed0-vanilla"], *runs().values()]))
    assert total["runs"] == len(found) and total["seconds"] > 2 * len(found)


MATRIX = PLAN | {
    "teachers": {"vanilla": {}, "mse": {"method": "mse"}},
    "students": ["resnet8", "pool:1"],
    "alone": None,
}


def test_a_matrix_that_is_killed_goes_on_and_makes_nothing_twice(tmp_path):
    """2 teachers x 2 students x 2 seeds, killed as no program can notice, with a run under way."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    arguments = ["compare.py", tmp_path / "plan.yaml", "--data", "tiny=digits", "--output_dir", tmp_path / "out"]
    arguments += ["--runs", tmp_path / "runs"]
    records, folder = tmp_path / "out/records", tmp_path / "out"
    killed = Fork(*arguments)
    while len(list(records.glob("*.json"))) < 5 and killed.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = {path: path.read_bytes() for path in records.glob("*.json")}
    assert 5 <= len(before) < 12
    done = succeeded(forked(*arguments))
    left = int(re.search(r"plan: 12 runs, (\d+) to be made", done.stdout)[1])
    assert 11 - len(before) <= left <= 12 - len(before)  # the run under way may have come to its end
    assert f"[{left}/{left}]" in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    starts = {log.stem: log.read_text().count("$ python") for log in (tmp_path / "runs").glob("*.log")}
    assert len(starts) == 12 and sorted(starts.values())[:-1] == [1] * 11 and max(starts.values()) <= 2
    reported = read_json(folder / "comparison.json")
    assert (reported["planned"], reported["done"], reported["failed"]) == (12, 12, {})
    # The tables again, by hand, from the run folders.
    top1 = {}
    for path in (tmp_path / "runs").glob("*/summary.json"):
        config, summary = yaml.safe_load((path.parent / "config.yaml").read_text()), read_json(path)
        if "student" in config and "teacher" in config:
            source = read_json(Path(config["teacher"][0]) / "summary.json")["method"]
            top1[source, config["student"], config["seed"]] = summary["top1"]
    assert len(top1) == 8
    for row in reported["means"][:2]:
        for source, cell in row["cells"].items():
            assert cell["mean"] == pytest.approx(sum(top1[source, row["student"], seed] for seed in (0, 1)) / 2)
    for record in reported["runs"]:
        assert ("kl_curve" in record) == (record["variant"] == "kd")
        rows = read_rows(tmp_path / "runs" / Path(record["folder"]).name / "metrics.jsonl")
        assert record.get("kl_curve", []) == [round(row["losses"]["kl"], 4) for row in rows if "kl" in row["losses"]]
    paired = [statistics.mean(top1["mse", s, n] - top1["vanilla", s, n] for s in MATRIX["students"]) for n in (0, 1)]
    (difference,) = reported["differences"]
    assert (difference["one"], difference["other"]) == ("mse", "vanilla")
    assert difference["mean"] == pytest.approx(statistics.mean(paired))
    assert difference["interval"] == pytest.approx(student_interval(paired))
    table = (folder / "comparison.md").read_text()
    assert f"{difference['mean']:+.2f}" in table and "12 of 12 runs" in table
    # Another comparison finds them; a changed option is another run.
    other = make_plan(MATRIX | {"students": ["pool:1"], "methods": ["kd", "at"]}, "here").runs({"tiny": "digits"})
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {run.folder in folders for run in other if run.method in (None, "kd")} == {True}
    assert {run.folder in folders for run in other if run.method == "at"} == {False}


def test_a_failure_stays_alone_and_is_told(tmp_path):
    content = MATRIX | {"students": ["resnet8"], "seeds": [0], "common": TINY | {"train_fraction": 0.2}}
    content["teachers"] = {"vanilla": {}, "broken": {"smoothing": 0.1, "batch_size": 100_000}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["compare.py", tmp_path / "plan.yaml", "--data", "tiny=digits", "--output_dir", tmp_path / "out"]
    arguments += ["--runs", tmp_path / "runs"]
    done = forked(*arguments)
    assert done.returncode == 1
    assert "failed    seed0-broken: exit code 2: train_teacher.py: error: --batch_size 100000" in done.stderr
    assert "seed0-resnet8-broken: needs seed0-broken, which failed" in done.stderr
    assert read_json(tmp_path / "out/comparison.json")["done"] == 2  # vanilla and its student
    report = forked(*arguments, "--report")
    assert report.returncode == 0 and "2 of 4 runs are done" in report.stdout


def test_a_dry_run_costs_nothing_and_says_what_it_would_do(tmp_path):
    arguments = ["--teachers", "vanilla", "sftn", "--students", "resnet8", "--sweep", "temperature=1,2", "--seeds", 0]
    arguments += ["--options", "epochs=1", "image_size=8", "--teacher_options", "model=resnet8"]
    done = succeeded(forked("compare.py", *arguments, "--dry_run", "--output_dir", tmp_path / "out"))
    commands = [line for line in done.stdout.splitlines() if line.startswith("python ")]
    assert len(commands) == 2 + 1 + 2 * 2 and sum("--temperature 2" in each for each in commands) == 2
    assert "10,059 training images" in done.stdout and not (tmp_path / "out").exists()


def test_runs_wait_for_what_they_read_and_a_deadline_leaves_them(tmp_path):
    planned = list(runs(seeds=[0]).values())
    places = Places(tmp_path / "runs", tmp_path / "records")
    (tmp_path / "records").mkdir()
    left = work_list(planned, places)
    assert [run.name for run in left] == [run.name for run in planned]
    outcome = execute(left, places, Forks(slots(1)), time.monotonic() - 1, lambda *_: None)
    assert outcome.left == [run.name for run in planned] and not outcome.made
    # Of a student without a record, and a teacher that has one but no folder, both are made again.
    for run in planned:
        if run.name != "seed0-pool1-gtn":
            (tmp_path / "records" / f"{run.name}.json").write_text(json.dumps({"run": run.name, "key": run.key}))
    assert [run.name for run in work_list(planned, places)] == ["seed0-vanilla", "seed0-gtn", "seed0-pool1-gtn"]


def test_records_are_read_by_key_and_old_ones_by_name(tmp_path):
    run = runs()["seed0-vanilla"]
    path = tmp_path / "seed0-vanilla.json"
    assert recorded(run, tmp_path) is None
    for content, known in (({"top1": 1}, True), ({"key": run.key}, True), ({"key": "other"}, False)):
        path.write_text(json.dumps(content))
        assert (recorded(run, tmp_path) is not None) == known
    path.write_text("{")
    with pytest.raises(UserError, match="is no record"):
        recorded(run, tmp_path)


def test_a_folder_of_other_options_is_refused(tmp_path):
    run = runs()["seed0-vanilla"]
    there = run.config.as_dict() | {"dataset": "digits", "checkpointing_epochs": 9, "seed": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(there))
    check_folder(run, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(there | {"momentum": 0.8}))
    with pytest.raises(UserError, match=r"was made with momentum 0.8, not 0.9"):
        check_folder(run, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_is_understood_by_the_scripts(path):
    plan = read_plan(path)
    first = Plan(**{**vars(plan), "seeds": plan.seeds[:1], "students": plan.students[:1]})
    assert all(run.key for run in first.runs())


def test_old_records_are_reported(tmp_path):
    records = ROOT / "benchmarks/results/evidence/digits"
    arguments = [ROOT / "benchmarks/plans/digits.yaml", "--records", records, "--output_dir", tmp_path]
    arguments += ["--seeds", *range(10, 14)]
    done = succeeded(forked("compare.py", *arguments, "--report"))
    assert "| pool:2 | 92.57 ± 0.97 | 95.42 ± 0.48 | 97.50 ± 0.23 | +2.08 |" in done.stdout
    assert "gtn - vanilla | +1.91 | +1.53 to +2.29 | 8 | 4 |" in done.stdout and "32 of 32 runs" in done.stdout


def test_a_split_takes_the_first_images_of_each_class_and_then_the_next():
    assert divide([0, 1, 0, 0, 1, 1, 0], 2, 1) == ([0, 2, 1, 4], [3, 5])
    with pytest.raises(SystemExit, match="class 1 has 2 images"):
        divide([0, 0, 0, 1, 1], 2, 1)
