"""A run that was stopped, in whatever way, ends with the bits of one that was not."""

import signal

import pytest

from tests.runs import TINY_GTN, Fork, forked, forked_signalled, read_json, read_rows, succeeded

COMMAND = [*TINY_GTN, "--epochs", "2", "--gate_holdout", "0.1"]
MIDDLE = 32  # an iteration in the middle of the second epoch: of 11 batches, and as many gate steps less one
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeeded(forked("train_teacher.py", *COMMAND, "--output_dir", folder))
    return folder


def same_result(run, whole) -> None:
    assert read_json(run / "model.json")["sha256"] == read_json(whole / "model.json")["sha256"]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [[(r["epoch"], r["losses"], r["accuracy"], r["gates"]) for r in read_rows(folder / "metrics.jsonl")]
            for folder in (run, whole)]  # fmt: skip
    assert rows[0] == rows[1]


def test_sigkill_in_the_middle_of_an_epoch(uninterrupted, tmp_path):
    run = tmp_path / "run"
    killed = forked_signalled(signal.SIGKILL, MIDDLE, "train_teacher.py", *COMMAND, "--output_dir", run)
    assert killed.returncode == -signal.SIGKILL and not (run / "summary.json").exists()
    assert len(read_rows(run / "metrics.jsonl")) == 1
    done = succeeded(forked("train_teacher.py", *COMMAND, "--output_dir", run, *RESUME))
    assert "resuming from" in done.stdout and "epoch 2/2, batch 1\n" in done.stdout
    same_result(run, uninterrupted)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_saves_in_the_middle_of_an_epoch(uninterrupted, tmp_path, signum, code):
    run = tmp_path / "run"
    stopped = forked_signalled(signum, MIDDLE, "train_teacher.py", *COMMAND, "--output_dir", run)
    assert stopped.returncode == code
    assert "--resume_from_checkpoint latest" in stopped.stderr and "Traceback" not in stopped.stderr
    done = succeeded(forked("train_teacher.py", *COMMAND, "--output_dir", run, *RESUME))
    assert int(done.stdout.split("epoch 2/2, batch ")[1].split()[0]) > 1
    same_result(run, uninterrupted)


def test_a_signal_from_outside_stops_a_run(tmp_path):
    run = tmp_path / "run"
    process = Fork("train_teacher.py", *TINY_GTN, "--epochs", "1000", "--output_dir", run)
    while not (run / "checkpoints" / "last.safetensors").exists():
        assert process.wait(0.02) is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "--resume_from_checkpoint latest" in errors


def test_a_changed_option_is_refused_by_name(uninterrupted, tmp_path):
    checkpoint = uninterrupted / "checkpoints" / "last.safetensors"
    changed = [*COMMAND, "--lr", "0.01", "--output_dir", tmp_path / "run", "--resume_from_checkpoint", checkpoint]
    done = forked("train_teacher.py", *changed)
    assert done.returncode == 2 and "--lr is 0.01" in done.stderr
    assert not (tmp_path / "run").exists()


def test_latest_without_a_checkpoint_says_so_and_starts(tmp_path):
    command = [*TINY_GTN, "--output_dir", tmp_path / "run", *RESUME]
    assert "starting from the beginning" in succeeded(forked("train_teacher.py", *command)).stdout
