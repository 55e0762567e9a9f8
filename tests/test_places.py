"""Where a run meets its machine's limits one line says so: memory, a full disk behind a tracker, missing letters."""

import json

import pytest

from tests.runs import forked, succeeded
from tests.torture.runs import CHILD

SMALL = ["--model", "resnet8", "--image_size", "8", "--train_fraction", "0.1", "--batch_size", "48", "--epochs", "1"]


def disturbed(plan: dict, *arguments):
    return forked(CHILD, json.dumps(plan), "train_teacher.py", *arguments)


def test_too_little_memory_is_one_line(tmp_path):
    large = ["--model", "resnet8", "--image_size", "4096", "--epochs", "1", "--output_dir", tmp_path / "r"]
    done = disturbed({"memory": 2**30}, *large)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "out of memory (120594628608 bytes more were wanted)" in done.stderr and "--batch_size" in done.stderr


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_disk_that_fills_while_a_tracker_writes_is_one_line(tmp_path, at):
    """TensorBoard writes in a thread of its own, which would end in a traceback."""
    plan = {"folder": str(tmp_path / "r/tensorboard"), "at": at, "errno": "ENOSPC", "onwards": True}
    done = disturbed(plan, *SMALL, "--with_tracking", "--output_dir", tmp_path / "r")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"No space left on device ({tmp_path}/r/tensorboard" in done.stderr


def test_a_name_that_the_terminal_cannot_show_is_spelt_out():
    code = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    code += "from engine.distributed import run_script\n"
    code += "run_script(lambda: print('caf\\xe9 \\udcff'))"
    assert succeeded(forked("-c", code)).stdout == "caf\\xe9 \\udcff\n"
