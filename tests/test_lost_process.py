"""Two processes of which one is killed or stopped: one line that says which is gone, and nothing lost."""

import signal
import subprocess

from tests.runs import TINY_GTN, Fork, free_port, read_json, read_rows

RUN = [*TINY_GTN, "--epochs", "2", "--image_size", "8", "--batch_size", "64", "--gate_every", "4"]


def two(folder, *arguments, end: tuple | None = None) -> list[subprocess.CompletedProcess]:
    """Both ranks of train_teacher.py, started as a launcher does; `end`: (iteration, ranks, signal)."""
    words = ["train_teacher.py", *RUN, "--output_dir", str(folder), *arguments]
    code = (
        "import os, runpy, signal, sys\n"
        "from engine.loop import Loop\n"
        "step = Loop.step\n"
        f"end = {end!r}\n"
        "def ending(loop, batch, totals):\n"
        "    if end and loop.progress.iteration == end[0] and loop.rank in end[1]:\n"
        "        os.kill(os.getpid(), end[2])\n"
        "    step(loop, batch, totals)\n"
        "Loop.step = ending\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    ranks = [Fork("-c", code, *words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    return [rank.completed() for rank in ranks]


def test_a_killed_process_is_named_by_the_other_and_the_run_goes_on(tmp_path):
    whole = two(tmp_path / "whole")
    assert [each.returncode for each in whole] == [0, 0], whole[0].stderr
    survivor, killed = two(tmp_path / "r", end=(25, (1,), int(signal.SIGKILL)))
    assert killed.returncode == -signal.SIGKILL and survivor.returncode == 1
    lines = [line for line in survivor.stderr.splitlines() if line.startswith("train_teacher.py:")]
    assert len(lines) == 1 and "process 1 (pid" in lines[0] and "--resume_from_checkpoint latest" in lines[0]
    assert "Traceback" not in survivor.stderr
    resumed = two(tmp_path / "r", "--resume_from_checkpoint", "latest")
    assert [each.returncode for each in resumed] == [0, 0], resumed[0].stderr
    # Stopped within an epoch, each process gets its own BatchNorm statistics back.
    stopped = two(tmp_path / "s", end=(27, (0,), int(signal.SIGTERM)))
    assert [each.returncode for each in stopped] == [143, 143], stopped[0].stderr
    two(tmp_path / "s", "--resume_from_checkpoint", "latest")
    digests = [read_json(tmp_path / name / "model.json")["sha256"] for name in ("whole", "r", "s")]
    assert digests[0] == digests[1] == digests[2]
    rows = [[(row["losses"], row["images"], row["accuracy"]) for row in read_rows(tmp_path / name / "metrics.jsonl")]
            for name in ("whole", "r", "s")]  # fmt: skip
    assert rows[0] == rows[1] == rows[2]  # sums over processes that are carried on are counted once


def test_a_process_whose_peer_never_comes_says_so_in_one_line(tmp_path):
    """One that waits for connections, and one that looks for the other; in a launcher either would be ended."""
    for rank in ("0", "1"):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        place |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
        words = ["train_teacher.py", *RUN, "--process_timeout", "1", "--output_dir", tmp_path / rank]
        alone = Fork(*words, **place).completed()
        lines = [line for line in alone.stderr.splitlines() if line.startswith("train_teacher.py:")]
        assert alone.returncode == 1 and len(lines) == 1 and "Traceback" not in alone.stderr
        assert "have not come together" in lines[0] and "--process_timeout" in lines[0]
