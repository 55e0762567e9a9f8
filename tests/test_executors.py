"""compare.py on a Ray cluster of two nodes on this machine, one of which is lost, and by submitit's local executor."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from common import UserError
from comparing.executors import EXECUTORS, check_executor
from comparing.places import Places
from comparing.plan import assignments, make_plan
from comparing.task import read_task, task_of
from tests.runs import PATIENCE, ROOT, TINY_GTN, Fork, forked, here, read_json, succeeded
from tests.test_compare import PLAN

MATRIX = ["--teachers", "vanilla", "mse", "--students", "resnet8", "--teacher_options", "model=resnet8"]
OPTIONS = ["dataset=digits", "image_size=8", "batch_size=64", "train_fraction=0.5"]


def arguments(folder: Path, epochs: int, executor: str) -> list:
    places = ["--output_dir", folder / "out", "--runs", folder / "runs"]
    return ["compare.py", *MATRIX, "--options", *OPTIONS, f"epochs={epochs}", "--executor", executor, *places]


def children(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def until(condition, process) -> None:
    """Wait for what a process or job that goes on will have done."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None or condition(), "it has ended"
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_task_is_the_run_that_was_planned(tmp_path):
    places = Places(tmp_path / "runs", tmp_path / "records", verbose=True)
    for run in make_plan(PLAN, "here").runs({"tiny": "digits"}):
        again, there = read_task(task_of(run, places).run)
        assert again == run and (again.key, again.command(there.runs)) == (run.key, run.command(places.runs))
    run.place, nowhere = "student", Places(tmp_path, None)
    again, there = read_task(task_of(run, nowhere).run)
    assert (again.folder, there.records) == ("student", None) and again.command(tmp_path)[-1] == str(
        tmp_path / "student"
    )


def test_what_cannot_be_started_is_one_line(monkeypatch):
    monkeypatch.setitem(EXECUTORS, "ray", "json")  # installed
    monkeypatch.setitem(EXECUTORS, "slurm", "not_installed")
    for arguments, said in (
        (("ray", {}, True), "--verbose: shows runs on this machine; by --executor ray"),
        (("local", {"num_cpus": 2}, False), "--executor_options num_cpus: --executor local has none"),
        (("slurm", {}, False), "--executor slurm: needs not_installed; pip install -r requirements-slurm.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check_executor(*arguments)
    check_executor("ray", {}, False)
    for name in ("ray", "slurm"):
        assert (ROOT / f"requirements-{name}.txt").is_file()
    done = here("compare.py", *MATRIX, "--executor", "condor")
    assert done.returncode == 2 and "--executor: invalid choice: 'condor'" in done.stderr


def test_a_run_whose_node_is_lost_goes_on_elsewhere(tmp_path):
    """Of two nodes of one core each, which have a teacher each, one is lost without a farewell."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="pip install -r requirements-ray.txt")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    runs = tmp_path / "runs"
    try:
        comparing = Fork(*arguments(tmp_path, 30, "ray"), RAY_ADDRESS=cluster.address)
        until(lambda: len(list(runs.glob("*/checkpoints/*"))) >= 2, comparing)
        cluster.remove_node(nodes[0], allow_graceful=False)
        done = succeeded(comparing.completed())
    finally:
        cluster.shutdown()
    starts = sorted(log.read_text().count("$ python") for log in runs.glob("*.log"))
    assert starts[:-1] == [1] * 4 and starts[-1] == 2, done.stdout
    (lost,) = [log for log in runs.glob("*.log") if log.read_text().count("$ python") == 2]
    assert "--resume_from_checkpoint latest" in lost.read_text()
    found = read_json(tmp_path / "out/comparison.json")
    assert (found["planned"], found["done"], found["failed"]) == (5, 5, {})
    local = succeeded(forked(*arguments(tmp_path / "local", 30, "local"), "--only", "vanilla"))  # the same figures
    alike = [read_json(folder / "out/records/seed0-vanilla.json") for folder in (tmp_path, tmp_path / "local")]
    assert alike[0]["curve"] == alike[1]["curve"], local.stdout


def test_a_stopped_comparison_on_ray_saves_its_runs(tmp_path):
    pytest.importorskip("ray", reason="pip install -r requirements-ray.txt")
    words = [*arguments(tmp_path, 1000, "ray"), "--only", "seed0-vanilla", "--executor_options", "num_cpus=1"]
    comparing = Fork(*words)
    until(lambda: list((tmp_path / "runs").glob("*/checkpoints/*")), comparing)
    comparing.send_signal(signal.SIGINT)
    assert comparing.wait() == 130 and "the same command goes on" in comparing.communicate()[0]
    (log,) = (tmp_path / "runs").glob("*.log")
    assert "interrupted; saved" in log.read_text()


def test_submitit_makes_runs_and_a_stopped_comparison_goes_on(tmp_path):
    pytest.importorskip("submitit", reason="pip install -r requirements-slurm.txt")
    words = [*arguments(tmp_path, 30, "slurm"), "--executor_options", "cluster=local"]
    runs = tmp_path / "runs"
    comparing = Fork(*words)
    until(lambda: len(list(runs.glob("*/checkpoints/*"))) >= 1, comparing)
    comparing.send_signal(signal.SIGINT)
    assert comparing.wait() == 130 and "the same command goes on" in comparing.communicate()[0]
    assert len(list(runs.glob("*/summary.json"))) < 3
    done = succeeded(forked(*words))
    logs = [log.read_text() for log in runs.glob("*.log")]
    assert len(logs) == 5 and any("--resume_from_checkpoint latest" in log for log in logs), done.stdout
    found = read_json(tmp_path / "out/comparison.json")
    assert (found["planned"], found["done"], found["failed"]) == (5, 5, {})


def test_a_fleets_students_are_the_same_by_jobs_of_their_own(tmp_path):
    """By submitit's local executor, the first attempt stopped by Ctrl-C, and in one pass of the teacher here."""
    pytest.importorskip("submitit", reason="pip install -r requirements-slurm.txt")
    succeeded(forked("train_teacher.py", *TINY_GTN, "--share_branches", "--output_dir", tmp_path / "t"))
    words = ["fleet.py", "--teacher", tmp_path / "t", "--budgets", "500params", "100kparams", "--rank", "macs"]
    words += ["--epochs", "20", "--batch_size", "32", "--output_dir"]
    succeeded(forked(*words, tmp_path / "here"))
    jobs = ["--executor", "slurm", "--executor_options", "cluster=local"]
    fleet = Fork(*words, tmp_path / "jobs", *jobs)
    until(lambda: list(tmp_path.glob("jobs/students/*/checkpoints/*")), fleet)
    fleet.send_signal(signal.SIGINT)
    assert fleet.wait() == 130 and "the same command goes on" in fleet.communicate()[1]
    done = succeeded(forked(*words, tmp_path / "jobs", *jobs))
    made = [{each.parent.name: each.read_bytes() for each in tmp_path.glob(f"{name}/students/*/model.safetensors")}
            for name in ("here", "jobs")]  # fmt: skip
    assert len(made[0]) == 2 and made[0] == made[1], done.stdout
    assert any("resuming from" in log.read_text() for log in tmp_path.glob("jobs/students/*.log"))


def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(tmp_path):
    pytest.importorskip("submitit", reason="pip install -r requirements-slurm.txt")
    from comparing.slurm import Slurm

    common = assignments("", [*OPTIONS, "epochs=30"])
    plan = {"teachers": {"vanilla": {"model": "resnet8"}}, "students": ["resnet8"], "seeds": [0], "common": common}
    run = make_plan(plan, "here").runs()[0]
    places = Places(tmp_path / "runs", tmp_path / "records")
    places.runs.mkdir()
    job = Slurm(tmp_path / "slurm", {"cluster": "local"}).start(run, places)
    folder = places.runs / run.folder
    until(lambda: (folder / "checkpoints/last.safetensors").exists(), job)
    (waiting,) = children(job.job.job_id)
    for pid in (waiting, *children(waiting)):
        os.kill(int(pid), signal.SIGUSR2)  # as Slurm does with all processes of a job before the end of its time
    until(lambda: (folder / "summary.json").exists(), job)
    assert job.wait() == 0 and len(list(places.records.glob("*.json"))) == 1
    log = Path(f"{folder}.log").read_text()
    assert log.count("$ python") == 2 and "interrupted; saved" in log and "--resume_from_checkpoint latest" in log


def test_what_submitit_says_of_a_failed_run_and_of_its_options(tmp_path):
    pytest.importorskip("submitit", reason="pip install -r requirements-slurm.txt")
    words = [*arguments(tmp_path, 1, "slurm"), "--only", "vanilla", "--executor_options", "cluster=local"]
    done = forked(*words, "--student_options", "batch_size=100000")
    assert done.returncode == 1 and "1 runs failed" in done.stderr, done.stderr
    assert "seed0-resnet8-vanilla: exit code 2: distill.py: error: --batch_size 100000" in done.stderr
    assert read_json(tmp_path / "out/comparison.json")["done"] == 1  # the teacher
    done = forked(*words, "slurm_partitoin=a", "--output_dir", tmp_path / "other")
    assert done.returncode == 2 and "--executor_options: " in done.stderr and len(done.stderr.splitlines()) == 1
