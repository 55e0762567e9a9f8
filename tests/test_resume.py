"""A run that was stopped, in whatever way, ends with the bits of one that was not."""

import signal
import time

import pytest

from tests.runs import TINY, TINY_GTN, python, read_json, read_rows, start, succeeded

# Small batches make epochs of some seconds, so that there is a middle to stop in.
COMMAND = [*TINY_GTN, "--batch_size", "8", "--epochs", "3", "--gate_holdout", "0.1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeeded(python("train_teacher.py", *COMMAND, "--output_dir", folder))
    return folder


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def same_result(run, whole) -> None:
    assert read_json(run / "model.json")["sha256"] == read_json(whole / "model.json")["sha256"]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [[(r["epoch"], r["losses"], r["accuracy"], r["gates"]) for r in read_rows(folder / "metrics.jsonl")]
            for folder in (run, whole)]  # fmt: skip
    assert rows[0] == rows[1]


def test_sigkill_in_the_middle_of_an_epoch(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start("train_teacher.py", *COMMAND, "--output_dir", run)
    wait_for((run / "checkpoints" / "last.safetensors").exists, process)
    time.sleep(0.6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "summary.json").exists()
    assert len(read_rows(run / "metrics.jsonl")) < 3
    done = succeeded(python("train_teacher.py", *COMMAND, "--output_dir", run, "--resume_from_checkpoint", "latest"))
    assert "resuming from" in done.stdout
    same_result(run, uninterrupted)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_saves_in_the_middle_of_an_epoch(uninterrupted, tmp_path, signum, code):
    run = tmp_path / "run"
    process = start("train_teacher.py", *COMMAND, "--output_dir", run)
    wait_for((run / "checkpoints" / "last.safetensors").exists, process)
    time.sleep(0.6)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--resume_from_checkpoint latest" in errors and "Traceback" not in errors
    done = succeeded(python("train_teacher.py", *COMMAND, "--output_dir", run, "--resume_from_checkpoint", "latest"))
    batch = int(done.stdout.split("batch ")[1].split()[0])
    assert batch > 1, "the signal came between two epochs: nothing was tested"
    same_result(run, uninterrupted)


def test_a_changed_option_is_refused_by_name(uninterrupted, tmp_path):
    checkpoint = uninterrupted / "checkpoints" / "last.safetensors"
    changed = [*COMMAND, "--lr", "0.01", "--output_dir", tmp_path / "run", "--resume_from_checkpoint", checkpoint]
    done = python("train_teacher.py", *changed)
    assert done.returncode == 2 and "--lr is 0.01" in done.stderr
    assert not (tmp_path / "run").exists()


def test_latest_without_a_checkpoint_says_so_and_starts(tmp_path):
    command = [*TINY_GTN, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"]
    assert "starting from the beginning" in succeeded(python("train_teacher.py", *command)).stdout


def test_a_student_stopped_in_the_middle_ends_alike(tmp_path):
    succeeded(python("train_teacher.py", *TINY, "--output_dir", tmp_path / "teacher"))
    command = ["--teacher", tmp_path / "teacher", "--student", "resnet8", "--batch_size", "8", "--epochs", "2"]
    succeeded(python("distill.py", *command, "--output_dir", tmp_path / "whole"))
    run = tmp_path / "run"
    process = start("distill.py", *command, "--output_dir", run)
    wait_for((run / "checkpoints" / "last.safetensors").exists, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    done = succeeded(python("distill.py", *command, "--output_dir", run, "--resume_from_checkpoint", "latest"))
    assert int(done.stdout.split("batch ")[1].split()[0]) > 1, "the signal came between two epochs: nothing was tested"
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    rows = [[(row["losses"], row["accuracy"]) for row in read_rows(each / "metrics.jsonl")]
            for each in (run, tmp_path / "whole")]  # fmt: skip
    assert rows[0] == rows[1]
