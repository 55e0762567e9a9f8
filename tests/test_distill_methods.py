"""Every method through distill.py: a tiny run, stopped and resumed in each of its stages, and in two processes."""

import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from losses.registry import METHODS
from models import create_model
from tests.runs import TINY, forked, forked_signalled, forked_two, here, read_json, read_rows, succeeded

NAMES = [name for name, method in METHODS.items() if method.needs_teacher]
WARM = [name for name in NAMES if METHODS[name].warmup_epochs]
BATCHES = 3  # an epoch
FIXED = ["--student", "resnet8", "--train_fraction", "0.1", "--batch_size", "48", "--epochs", "1"]
FIXED += ["--lr", "0.01"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "teacher"
    succeeded(forked("train_teacher.py", *TINY, "--anchors", "1", "--output_dir", folder))
    return folder


def arguments(teacher: Path, name: str, folder: Path, *more: str) -> list:
    warmup = ["--warmup_epochs", "1"] if any(each in WARM for each in name.split("+")) else []
    return ["--teacher", teacher, "--method", name, *FIXED, *warmup, *more, "--output_dir", folder]


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Where the runs' folders are, and what they printed."""
    folder = tmp_path_factory.mktemp("methods")
    done = {name: succeeded(forked("distill.py", *arguments(teacher, name, folder / name))) for name in NAMES}
    return folder, {name: each.stdout for name, each in done.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs(runs, teacher, name):
    folder, method = runs[0] / name, METHODS[name]
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == ([0, 1] if method.warmup_epochs else [1])
    assert set(rows[-1]["losses"]) >= {"ce"} and rows[-1]["accuracy"]["student"] >= 0 and rows[-1]["images"] == 144
    summary = read_json(folder / "summary.json")
    assert summary["method"] == name and summary["loss"]["ce"] >= 0
    assert summary["teachers"][0]["sha256"] == read_json(teacher / "model.json")["sha256"]
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert saved.keys() == create_model("resnet8", 10).state_dict().keys()


def test_the_output_shows_the_loss_and_the_warm_up(runs):
    output = runs[1]
    for name, loss in {"at": "1 ce + 1000 at", "kd": "0.1 ce + 14.4 kl", "sp": "1 ce + 3000 sp"}.items():
        assert f"loss: {loss}\n" in output[name]
    for name in WARM:
        assert " 1/1 " in output[name].split("warm-up 1/1")[1]


@pytest.mark.parametrize("name", [*WARM, "crd", "vid"])
def test_a_run_stopped_in_any_stage_ends_alike(runs, teacher, name, tmp_path):
    stages = [1, BATCHES + 1] if name in WARM else [1]
    for stop in stages:
        command = arguments(teacher, name, tmp_path / f"at{stop}")
        assert forked_signalled(signal.SIGTERM, stop, "distill.py", *command).returncode == 143
        succeeded(forked("distill.py", *command, "--resume_from_checkpoint", "latest"))
    expected = safetensors.torch.load_file(runs[0] / name / "model.safetensors")
    for stop in stages:
        found = safetensors.torch.load_file(tmp_path / f"at{stop}" / "model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), stop
        rows, before = (read_rows(path / name_) for path, name_ in
                        ((tmp_path / f"at{stop}", "metrics.jsonl"), (runs[0] / name, "metrics.jsonl")))  # fmt: skip
        assert [row["losses"] for row in rows] == [row["losses"] for row in before]


@pytest.mark.parametrize("name", ["crd", "sskd", "sckd"])
def test_two_processes_train_alike(runs, teacher, name, tmp_path):
    """They end (each epoch checks that both hold the same weights and banks) and see every image once."""
    done = succeeded(forked_two("distill.py", *arguments(teacher, name, tmp_path / name)))
    assert "2 process(es)" in done.stdout
    row = read_rows(tmp_path / name / "metrics.jsonl")[-1]
    assert row["images"] == 144
    one = read_rows(runs[0] / name / "metrics.jsonl")[-1]["losses"]
    assert row["losses"]["ce"] == pytest.approx(one["ce"], rel=0.25)


def test_rco_walks_along_the_anchors(tmp_path):
    """Two anchors of a teacher of three epochs; the student spends half of its epochs with each."""
    teach = [*TINY, "--train_fraction", "0.1", "--batch_size", "48", "--epochs", "3", "--anchors", "2"]
    succeeded(forked("train_teacher.py", *teach, "--output_dir", tmp_path / "t"))
    assert sorted(path.name for path in (tmp_path / "t" / "anchors").iterdir()) == ["0002", "0003"]
    last, final = (safetensors.torch.load_file(path / "model.safetensors") for path in
                   (tmp_path / "t" / "anchors" / "0003", tmp_path / "t"))  # fmt: skip
    assert all(torch.equal(last[key], final[key]) for key in final)
    student = ["--teacher", tmp_path / "t", *FIXED, "--epochs", "4", "--lr", "0.1", "--lr_schedule", "cosine"]
    succeeded(forked("distill.py", *student, "--method", "rco", "--output_dir", tmp_path / "rco"))
    rows = read_rows(tmp_path / "rco" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.05, 0.1, 0.05])  # the schedule starts anew
    done = here("distill.py", "--teacher", tmp_path / "rco", *FIXED, "--method", "rco", "--output_dir", tmp_path / "n")
    assert done.returncode == 2 and "needs one teacher trained with --anchors" in done.stderr


def test_mistakes_in_methods_are_one_line(teacher, tmp_path):
    for extra, message in {
        ("--method", "atx"): "--method: unknown name 'atx'",
        ("--method", "at+kd", "--method_weights", "1"): "--method_weights: 1 for the 2 of --method",
        ("--method", "at", "--kd_weight", "-1"): "--kd_weight -1.0: must be",
        ("--method", "at", "--teacher_weights", "x.pth"): "--teacher_weights x.pth: needs one teacher",
    }.items():
        command = ["--teacher", teacher, *FIXED, *extra, "--output_dir", tmp_path / "no"]
        done = here("distill.py", *command)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "no").exists()


def test_teachers_by_name_and_several_of_them(teacher, tmp_path):
    state = create_model("resnet8x2", 10).state_dict()
    torch.save({"epoch": 240, "model": state}, tmp_path / "own.pth")
    named = ["--teacher", "resnet8x2", "--teacher_weights", tmp_path / "own.pth", "--image_size", "8", *FIXED]
    joined = ["--method", "at+kd", "--method_weights", "500", "2", "--output_dir", tmp_path / "named"]
    output = succeeded(forked("distill.py", *named, *joined)).stdout
    several = ["--teacher", teacher, teacher, "--method", "dkd", "--output_dir", tmp_path / "two"]
    succeeded(forked("distill.py", *several, *FIXED))
    assert "loss: 1 ce + 32 kl + 500 at" in output and "at+kd from resnet8x2 in resnet8x2" in output
    assert len(read_json(tmp_path / "two" / "summary.json")["teachers"]) == 2
