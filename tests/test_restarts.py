"""Launchers: a run that is started again by itself, and two machines, here two launchers on one host.

Ten kills in a row, through `accelerate launch` started as users do: python -m tests.restarts.
"""

import signal

import pytest

from tests.runs import TINY_GTN, Fork, forked_two, free_port, read_json, read_rows, succeeded

RUN = [*TINY_GTN, "--train_fraction", "0.2", "--batch_size", "32", "--gate_every", "4", "--epochs", "2"]
LATEST = ["--resume_from_checkpoint", "latest"]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
MIDDLE = 14  # an iteration in the middle of the second epoch: of 8 batches, and 2 gate steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeeded(forked_two("train_teacher.py", *RUN, "--output_dir", folder))
    return folder


def same_result(run, whole) -> None:
    assert read_json(run / "model.json")["sha256"] == read_json(whole / "model.json")["sha256"]
    rows = [
        [(r["losses"], r["accuracy"], r["images"]) for r in read_rows(each / "metrics.jsonl")] for each in (run, whole)
    ]
    assert rows[0] == rows[1]


def test_a_killed_process_is_started_again_and_goes_on(whole, tmp_path):
    command = ["--multi_gpu", "--num_processes", "2", "--main_process_port", free_port(), "--max_restarts", "3"]
    command += ["tests/signalled.py", int(signal.SIGKILL), f"{MIDDLE}@1", "train_teacher.py"]
    launcher = Fork(
        "tests/launched.py", "accelerate", *command, *RUN, *LATEST, "--output_dir", tmp_path / "run", **ON_CPU
    )
    done = succeeded(launcher.completed())
    assert "starting from the beginning" in done.stdout and "at epoch 2/2, batch 1\n" in done.stdout
    same_result(tmp_path / "run", whole)
