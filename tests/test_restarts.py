"""Launchers: a run that is started again by itself, and two machines, here two launchers on one host.

Ten kills in a row, through `accelerate launch` started as users do: python -m tests.restarts.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.distributed.run

from common import UserError
from engine import distributed, rendezvous
from engine.command_line import parse
from engine.run_folder import RUN_KEYS, RunFolder
from tests.runs import ROOT, TINY, Fork, forked_two, free_port, read_json, read_rows, succeeded
from train_teacher import TeacherConfig

RUN = [*TINY, "--train_fraction", "0.2", "--batch_size", "32", "--epochs", "2"]
LATEST = ["--resume_from_checkpoint", "latest"]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
MIDDLE = 12  # an iteration in the middle of the second epoch: of 8 batches


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


def commands(kind: str) -> list[str]:
    """The blocks of docs/launching.md in a language, their lines joined."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/launching.md").read_text(), flags=re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def test_two_machines_start_again_together(whole, tmp_path):
    """The two launchers of the docs, on one host and with a process each; the second one's is killed."""
    line = next(block for block in commands("bash") if block.startswith("torchrun"))
    words, _, script = shlex.split(line)[1:], *line.partition("train_teacher.py")[1:]
    words = words[: words.index("train_teacher.py")]
    assert script.rstrip().endswith(" ".join(LATEST))
    here = {"10.0.0.1:29500": f"127.0.0.1:{free_port()}", "4": "1"}
    words = [here.get(word, word) for word in words] + ["--local_addr", "127.0.0.1"]
    words += ["tests/signalled.py", int(signal.SIGKILL), f"{MIDDLE}@1", "train_teacher.py", *RUN, *LATEST]
    machines = [
        Fork("tests/launched.py", "torchrun", *words, "--output_dir", tmp_path / "run", **ON_CPU) for _ in range(2)
    ]
    done = [succeeded(each.completed()) for each in machines]
    assert "at epoch 2/2, batch 1\n" in done[0].stdout + done[1].stdout
    same_result(tmp_path / "run", whole)


def test_only_processes_started_together_agree():
    """Three times on one store, each time in another order; after the first, words of the dead are there."""
    server, names = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []

    def process(rank: int, turn: int) -> str:
        time.sleep(0.05 * ((rank + turn) % 3))
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return rendezvous.agree(store, rank, 3, timedelta(seconds=20))

    for turn in range(3):
        with ThreadPoolExecutor(3) as pool:
            names += [set(pool.map(process, range(3), [turn] * 3))]
    assert all(len(name) == 1 for name in names) and len(set.union(*names)) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_longer_than_said(rank):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("word of 1", "of one who is gone")
    with pytest.raises(dist.DistError, match=r"(?i)time(d )?out"):
        rendezvous.agree(server, rank, 2, timedelta(seconds=0.2))


def test_a_launcher_that_is_asked_to_stop_lets_its_processes_save(tmp_path):
    """What `kill -TERM` of SLURM's step does."""
    run, command = tmp_path / "run", ["--standalone", "--nproc_per_node", "2", "--max_restarts", "3"]
    command += ["train_teacher.py", *RUN, "--epochs", "1000", *LATEST, "--output_dir", run]
    launcher = Fork("tests/launched.py", "torchrun", *command, **ON_CPU)
    while not (run / "checkpoints/last.safetensors").exists():
        assert launcher.wait(0.05) is None, launcher.communicate()
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate()
    assert launcher.returncode != 0 and errors.count("train_teacher.py: interrupted; saved.") == 1, errors


STUBS = {
    "scontrol": """if [ "$1" = show ]; then echo first; echo second
else echo "$@, $(cat $WORK/saved)" > "$WORK/requeued"; fi""",
    "srun": """trap 'sleep 0.3; echo saved > $WORK/saved; exit 143' TERM
sleep 0.1; echo "$@" > $WORK/starting; mv $WORK/starting $WORK/started; while :; do sleep 0.02; done""",
}


def test_the_slurm_script_saves_before_its_time_is_up_and_queues_again(tmp_path, monkeypatch):
    """Its shell, with srun and scontrol standing in for a cluster's; its command, with the real parsers."""
    (script,) = commands("sh")
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORK": str(tmp_path), "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", tmp_path / "job.sh"], env=os.environ | job | {"SLURM_JOB_NODELIST": "x"})
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7, saved\n"
    words = shlex.split((tmp_path / "started").read_text())
    assert words[0] == "torchrun"
    launched = torch.distributed.run.get_args_parser().parse_args(words[1:])
    assert (launched.nnodes, launched.rdzv_endpoint, launched.rdzv_id) == ("2", "first:29500", "7")
    monkeypatch.chdir(ROOT)
    config = parse(TeacherConfig, "", {}, launched.training_script_args)
    assert config.resume_from_checkpoint == "latest" and config.epochs == 240
    assert "#SBATCH --requeue" in script and "#SBATCH --signal=B:USR1@" in script


def test_a_finished_run_may_be_asked_to_go_on_where_its_checkpoint_is_kept(tmp_path):
    """A process may die after summary.json is written; without a checkpoint going on would train it anew."""
    folder = RunFolder(tmp_path, resume="latest")
    folder.lock()
    folder.begin(dict.fromkeys(sorted(RUN_KEYS), 1))
    folder.write_summary({})
    with pytest.raises(UserError, match="holds a finished run"):
        RunFolder(tmp_path, resume="latest")
    folder.checkpoints.mkdir()
    folder.last.touch()
    RunFolder(tmp_path, resume="latest")
    for options in ({}, {"resume": str(folder.last)}):
        with pytest.raises(UserError, match="holds a finished run"):
            RunFolder(tmp_path, **options)


def test_a_finished_run_goes_on_to_itself(whole):
    before = (whole / "model.safetensors").read_bytes()
    done = succeeded(forked_two("train_teacher.py", *RUN, *LATEST, "--output_dir", whole))
    assert "after its last epoch" in done.stdout and (whole / "model.safetensors").read_bytes() == before


def test_a_process_that_does_not_see_the_checkpoint_is_named(whole, tmp_path):
    code = (
        "import os, sys, pathlib, runpy\n"
        "is_file = pathlib.Path.is_file\n"
        "other = os.environ['RANK'] == '1'\n"
        "pathlib.Path.is_file = lambda path: is_file(path) and not (other and path.name == 'last.safetensors')\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = ["train_teacher.py", *RUN, "--output_dir", tmp_path, "--resume_from_checkpoint"]
    done = forked_two("-c", code, *arguments, whole / "checkpoints/last.safetensors")
    assert done.returncode == 2 and "process 1 does not find" in done.stderr and "Traceback" not in done.stderr


def test_a_connection_that_breaks_is_said_though_no_process_is_seen_to_be_gone(monkeypatch):
    error = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9")
    own = distributed.Process(0, distributed._machine(), os.getpid())
    monkeypatch.setattr(distributed, "_processes", [own])
    assert distributed.lost_connection(error) is None
    monkeypatch.setattr(distributed, "_processes", [own, distributed.Process(1, 5, 1)])
    assert "on another machine has ended or cannot be reached (Connection closed)" in distributed.lost_connection(error)
    monkeypatch.setattr(distributed, "_processes", [own, own])
    assert "a process has ended or cannot be reached (Connection closed)" in distributed.lost_connection(error)
    late = RuntimeError("[unbound_buffer.cc:84] Timed out waiting 8000ms for recv operation to complete")
    assert "(Timed out, within --process_timeout)" in distributed.lost_connection(late)
    assert distributed.lost_connection(RuntimeError("shapes cannot be multiplied")) is None
    monkeypatch.setattr(distributed, "_processes", [])  # while they tell each other who they are
    assert distributed.lost_connection(error) is None
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    assert "the run's processes have not come together (" in distributed.lost_connection(error)
    assert distributed.lost_connection(RuntimeError("shapes cannot be multiplied")) is None
