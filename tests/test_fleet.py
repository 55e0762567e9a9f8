"""fleet.py: from a teacher to measured files by one command, which goes on wherever it was killed."""

import json
import shutil
import signal
import sys

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.distributed import RunError
from models import load_pretrained
from models.network import count_parameters
from models.pool import Pool
from searching import device
from searching.members import Members
from shipping import fleet
from shipping.proof import excess
from shipping.report import exceeded, within
from tests.runs import TINY_GTN, forked, forked_signalled, here, read_json, read_rows, succeeded
from tests.test_search import made_up

BUDGETS = ["500params", "100ms", "90ms,100kparams"]  # a small member, and twice the largest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet") / "t"
    succeeded(forked("train_teacher.py", *TINY_GTN, "--share_branches", "--output_dir", folder))
    return folder


@pytest.fixture(scope="module")
def profile(teacher):
    """A file of latencies that claim to be of this device, so that finalists are measured whole here."""
    content = made_up(Members(Pool(**load_pretrained(teacher).info.pool)), (0.1, -0.01), size=8)
    content["device"], content["onnxruntime"] = device.here()
    path = teacher.parent / "profile.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def command(teacher, profile):
    words = ["fleet.py", "--teacher", teacher, "--budgets", *BUDGETS, "--profile", profile, "--rank", "macs"]
    words += ["--finalists", "1", "--epochs", "2", "--batch_size", "128"]
    return [*words, "--quantize", "int8", "--calibration_images", "50", "--max_drop", "100", "--output_dir"]


@pytest.fixture(scope="module")
def whole(command, teacher):
    """A fleet that nothing has stopped, and what was printed."""
    return teacher.parent / "whole", succeeded(forked(*command, teacher.parent / "whole")).stdout


def made(folder) -> dict:
    """What a fleet is, without what was measured in time: weights by student, and fleet.json's other entries."""
    found = read_json(folder / "fleet.json")
    for student in found["students"].values():
        for file in student["files"].values():
            del file["ms"], file["sha256"], file["bytes"]  # the folder's name is in its metadata
    weights = {path.parent.name: path.read_bytes() for path in folder.glob("students/*/model.safetensors")}
    chosen = [{name: each[name] for name in ("budget", "student", "choice", "over")} for each in found["budgets"]]
    return {"weights": weights, "students": found["students"], "budgets": chosen}


def test_each_budget_gets_files_that_keep_to_it(whole, teacher):
    folder, said = whole
    found, searched = read_json(folder / "fleet.json"), read_json(folder / "search/search.json")
    by_budget = {each["budget"]: each for each in found["budgets"]}
    assert list(by_budget) == ["500params", "100ms", "90ms-100kparams"]
    assert by_budget["100ms"]["student"] == by_budget["90ms-100kparams"]["student"] == "100ms"
    assert {path.name for path in folder.glob("students/*")} == {"500params", "100ms"} == set(found["students"])
    assert said.count("$ python search.py") == said.count("$ python distill.py") == 1
    for name, each in by_budget.items():
        student = found["students"][each["student"]]
        network = load_pretrained(folder / "students" / each["student"])
        assert each["choice"] == searched["students"][name]["choice"] and each["over"] == {}
        assert student["params"] == count_parameters(network) == each["promised"]["params"]
        assert student["macs"] == each["promised"]["macs"] and student["params"] <= each["limits"].get("params", 1e9)
        exported = read_json(folder / "students" / each["student"] / "export/export.json")["files"]
        assert set(student["files"]) == {"model.onnx", "model.int8.onnx"} == set(exported)
        for file, shipped in student["files"].items():
            assert 0 < shipped["ms"] < 90 and shipped["drop"] == exported[file]["network_top1"] - exported[file]["top1"]
        assert student["files"]["model.onnx"]["top1"] == pytest.approx(student["top1"])
    assert by_budget["100ms"]["promised"]["ms"] == searched["students"]["100ms"]["measured_ms"]
    assert found["teacher"]["top1"] == read_json(teacher / "summary.json")["top1"]
    assert found["onnxruntime"] == onnxruntime.__version__ and found["versions"]["torch"]
    assert "# 500params, distilled for digits" in (folder / "students/500params/export/README.md").read_text()
    page = (folder / "report.html").read_text()
    assert (
        "data:image/png;base64," in page and "500params" in page and found["commands"][1] in page.replace("&#39;", "'")
    )
    for unit, members in searched["fronts"].items():
        name, scale, digits = {"ms": ("ms", 1, 3), "params": ("k params", 1e3, 1), "macs": ("M MACs", 1e6, 2)}[unit]
        for place in (0, len(members) - 1):
            cost = f"{members[place]['costs'][unit] / scale:,.{digits}f}"
            words = [name, f"{place + 1}/{len(members)}", cost]
            assert any(
                all(f" {word} " in f" {' '.join(line.split())} " for word in words) for line in said.splitlines()
            )
            assert all(f">{word}</td>" in page for word in words)
    assert all(doubt in said for doubt in found["doubts"]) and "share a student" in said


def test_killed_and_begun_again_it_is_the_same_and_nothing_is_trained_twice(whole, command, tmp_path):
    cut = tmp_path / "cut"
    stopped = forked_signalled(signal.SIGTERM, 14, *command, cut)
    assert stopped.returncode == 128 + signal.SIGTERM and stopped.stderr.count("\n") == 1
    assert "the same command goes on" in stopped.stderr and not (cut / "fleet.json").exists()
    before = (cut / "search/search.json").read_bytes()
    (cut / "search/.search.json.1.tmp").touch()  # as a kill leaves it
    shutil.rmtree(cut / "students/500params")
    said = succeeded(forked(*command, cut)).stdout
    assert "search.py" not in said and "--resume_from_checkpoint latest" in said
    assert (cut / "search/search.json").read_bytes() == before
    assert made(cut) == made(whole[0])
    assert [row["epoch"] for row in read_rows(cut / "students/100ms/metrics.jsonl")] == [1, 2]

    (cut / "students/500params/summary.json").unlink()  # killed behind the last step of one, which is not repeated
    shutil.rmtree(cut / "students/100ms/export")
    times = {path: path.stat().st_mtime_ns for path in cut.glob("students/100ms/*.*")}
    rows = read_rows(cut / "students/500params/metrics.jsonl")
    said = succeeded(forked(*command, cut)).stdout
    assert said.count("$ python distill.py") == said.count("$ python export.py") == 1
    assert made(cut) == made(whole[0]) and rows == read_rows(cut / "students/500params/metrics.jsonl")
    assert times == {path: path.stat().st_mtime_ns for path in cut.glob("students/100ms/*.*")}


def test_what_is_slower_than_its_budget_is_said(whole, command, monkeypatch):
    monkeypatch.setattr(device, "milliseconds", lambda *_: 100.0)
    done = here(*command, whole[0])
    message = (
        "not within the budget: 90ms-100kparams: model.onnx takes 100 ms, more than 90 ms + 5%; 90ms-100kparams: mod"
    )
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert "Not within the budget: 90ms-100kparams" in (whole[0] / "report.html").read_text()
    monkeypatch.setattr(device, "milliseconds", lambda *_: 94.0)
    assert here(*command, whole[0]).returncode == 0
    monkeypatch.setattr("shipping.proof.of_this_device", lambda profile: False)
    monkeypatch.setattr(device, "milliseconds", lambda *_: 1000.0)
    done = here(*command, whole[0])
    assert done.returncode == 0 and "here no budget in ms could be checked" in done.stdout
    page = (whole[0] / "report.html").read_text()
    assert "could not be checked here: 100ms, 90ms-100kparams" in page and "keeps to its budget" not in page
    assert [each["checked"] for each in read_json(whole[0] / "fleet.json")["budgets"]] == [True, False, False]
    assert done.stdout.count("not checked") == 4  # two files for each of these budgets


def test_what_was_changed_by_hand_is_one_line(whole, command, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(whole[0], folder)
    for path, message in {
        "students/100ms/export/model.onnx": "is not the file that was proven",
        "search/search.json": "does not hold these budgets",
    }.items():
        (folder / path).write_text("{}")
        done = here(*command, folder)
        assert done.returncode == 2 and f"{folder / path}: {message}" in done.stderr and done.stderr.count("\n") == 1


def test_a_student_that_is_not_shipped_keeps_no_other_from_it(whole, command, tmp_path, monkeypatch):
    folder = tmp_path / "f"
    shutil.copytree(whole[0], folder)
    for export in folder.glob("students/*/export"):
        shutil.rmtree(export)
    ship = fleet.MAINS["export.py"]

    def fail():
        if "500params" in sys.argv[1]:
            raise RunError("model.int8.onnx is not shipped")
        ship()

    monkeypatch.setitem(fleet.MAINS, "export.py", fail)
    done = here(*command, folder)
    message = f"500params: model.int8.onnx is not shipped; python distill.py --output_dir {folder}/students/NAME"
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(read_json(folder / "fleet.json")["students"]) == ["100ms"]
    monkeypatch.undo()
    by_hand = ["export.py", folder / "students/500params", "--formats", "onnx", "pt2"]
    succeeded(forked(*by_hand))
    succeeded(here(*command, folder))
    assert list(read_json(folder / "fleet.json")["students"]["500params"]["files"]) == ["model.onnx"]
    succeeded(forked(*by_hand, "--overwrite", "--with_preprocessing"))
    done = here(*command, folder)
    assert done.returncode == 2 and "500params/export: was made --with_preprocessing" in done.stderr


def test_a_student_that_diverges_keeps_no_other_from_being_shipped(whole, teacher, tmp_path):
    """It starts from weights that are no numbers."""
    folder, weights = tmp_path / "f", tmp_path / "weights"
    tensors = load_file(whole[0] / "students/500params/model.safetensors")
    weights.mkdir()
    shutil.copy(whole[0] / "students/100ms/model.safetensors", weights / "100kparams.safetensors")
    save_file(tensors | {"fc.weight": tensors["fc.weight"] * torch.nan}, weights / "500params.safetensors")
    words = [
        "fleet.py",
        "--teacher",
        teacher,
        "--budgets",
        "500params",
        "100kparams",
        "--rank",
        "macs",
        "--epochs",
        "1",
    ]
    words += ["--batch_size", "128", "--weights", weights, "--output_dir", folder]
    times = []
    for _ in range(2):
        done = forked(*words)
        assert done.returncode == 1 and "500params: was not distilled; python distill.py --output" in done.stderr
        assert done.stderr.count("\n") == 1
        found = read_json(folder / "fleet.json")
        assert list(found["students"]) == ["100kparams"] and list(found["failed"]) == ["500params"]
        assert "model.onnx" in found["students"]["100kparams"]["files"] and "failed" in done.stdout
        assert "Failed: 500params (was not distilled)" in (folder / "report.html").read_text()
        times.append({path: path.stat().st_mtime_ns for path in folder.glob("students/100kparams/**/*.*")})
    assert times[0] == times[1]
    save_file(tensors, weights / "500params.safetensors")
    succeeded(forked(*words))
    assert list(read_json(folder / "fleet.json")["students"]) == ["500params", "100kparams"]


def test_a_limit_is_one_of_every_file():
    student = {"params": 300, "macs": 2e6, "files": {"a": {"ms": 1.0}, "b": {"ms": 1.06}}}
    assert excess({"params": 300, "macs": 2e6, "ms": 1.06}, student) == {}
    assert excess({"ms": 1.02}, student) == {}
    found = {"budget": "1ms", "checked": True, "over": excess({"ms": 1.0}, student)}
    assert found["over"] == {"b": ["b takes 1.06 ms, more than 1 ms + 5%"]}
    assert [within(found, name) for name in "ab"] == ["yes", "no"]
    found["over"] = excess({"params": 299, "ms": 2.0}, student)
    assert [within(found, name) for name in "ab"] == ["no", "no"]
    assert exceeded({"budgets": [found]}) == ["1ms: takes 300 parameters, more than 299 parameters"]
    takes = ["takes 2.00 million MACs, more than 1.00 million MACs"]
    assert excess({"macs": 1e6}, student) == {"a": takes, "b": takes}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--teacher: name the run folder of one trained teacher"),
        (("--teacher", "T", "T"), "name the run folder of one trained teacher"),
        (("--teacher", "T"), "--output_dir: name the folder"),
        (("--teacher", "/nowhere", "OUT"), "--teacher /nowhere: "),
        (("--teacher", "T", "OUT"), "--budgets: name at least one"),
        (("--teacher", "T", "--budgets", "1lightyear", "OUT"), "'1lightyear' is no budget"),
        (("--teacher", "T", "--budgets", "3params", "OUT"), "the smallest member, "),
        (("--teacher", "T", "--budgets", "1ms", "--profile", "OLD", "OUT"), "is of opset 17, not 18"),
        (
            ("--teacher", "T", "--budgets", "1Mparams", "--student", "pool:1", "OUT"),
            "--student pool:1 (for distill.py)",
        ),
        (("--teacher", "T", "--budgets", "1Mparams", "--max_drop", "-1", "OUT"), "--max_drop -1.0: "),
        (("--teacher", "T", "--executor_options", "num_cpus=2", "OUT"), "num_cpus: --executor local has none"),
        (("--teacher", "T", "--budgets", "1Mparams", "--paths", "1", "OUT"), "--paths 1: "),
        (("--teacher", "T", "--budgets", "1Mparams", "--epochs", "0", "OUT"), "--epochs 0: "),
        (("--teacher", "T", "--budgets", "3params", "--method", "rco", "OUT"), "--method rco: goes with no other"),
        (("--teacher", "T", "--budgets", "1Mparams", "--image_size", "16", "OUT"), "--image_size 16: "),
        (("--teacher", "T", "--budgets", "1Mparams", "--pool.stem", "16", "OUT"), "has a pool of its own"),
        (("--teacher", "T", "--budgets", "1Mparams", "--output_dir", "T"), "holds --teacher"),
        (("--teacher", "T", "--budgets", "1Mparams", "--output_dir", "T/.."), "holds --teacher"),
        (("--teacher", "T", "--budgets", "1Mparams", "--output_dir", "T/plots"), "holds files that are no fleet's"),
        (("--teacher", "T", "--budgets", "1Mparams", "--output_dir", "OLD"), "is a file"),
    ],
)
def test_bad_input_is_one_line(words, message, teacher, profile, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(read_json(profile) | {"opset": 17}))
    given = {"T": [teacher], "OUT": ["--output_dir", tmp_path / "f"], "OLD": [tmp_path / "old.json"]}
    given |= {"T/..": [teacher.parent], "T/plots": [teacher / "plots"]}
    done = here("fleet.py", *(each for word in words for each in given.get(word, [word])))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_other_options_are_refused_unless_they_may_replace_it(whole, command, teacher, tmp_path):
    done = here(*command, whole[0], "--epochs", "3")
    assert done.returncode == 2 and "was made with epochs 2, not 3; choose another folder" in done.stderr
    assert done.stderr.count("\n") == 1 and (whole[0] / "fleet.json").is_file()
    folder = tmp_path / "f"
    shutil.copytree(whole[0], folder)
    words = ["fleet.py", "--teacher", teacher, "--budgets", "3params", "--output_dir", folder]
    assert "--overwrite replaces it" in here(*words).stderr and (folder / "students/100ms").is_dir()
    assert "the smallest member" in here(*words, "--overwrite").stderr  # which has left nothing of it
    assert {each.name for each in folder.iterdir()} == {".lock", "fleet.yaml", "search"}
    assert [str(each.relative_to(folder)) for each in folder.glob("search/**/*")] == ["search/students"]
