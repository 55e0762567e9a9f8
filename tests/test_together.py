"""Several students in one run: each as if it were alone, from one evaluation of the teacher a batch."""

import json
import os
import re
import shutil
import signal
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from common import UserError
from data.datasets import load_images
from distill import DistillConfig
from engine.console import Console
from engine.distributed import Interrupted
from engine.loop import Loop
from engine.run_folder import RunFolder
from engine.together import run_together
from losses.method import Outputs
from losses.registry import find_methods
from models import create_model
from objectives.distillation import Distillation, build_methods
from objectives.shared import SharedOutputs
from tests.runs import TINY_GTN, TINY_POOL, forked, forked_two, here, succeeded

SMALL = ["--image_size", "8", "--batch_size", "128", "--epochs", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "t"
    succeeded(forked("train_teacher.py", *TINY_GTN, "--output_dir", folder))
    return folder


def outcome(folder):
    """Weights and the record of every epoch, but for times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if "second" not in name} for row in rows]
    return (folder / "model.safetensors").read_bytes(), kept, (folder / "model.json").read_text()


def alone(folder, *options):
    """The outcome of a student's own run."""
    succeeded(forked("distill.py", *options, "--output_dir", folder))
    found = outcome(folder)
    shutil.rmtree(folder)
    return found


def test_each_student_is_as_if_it_were_alone(teacher, tmp_path):
    """Methods on logits, on features and with a warm-up, which differ in what they need of the teacher."""
    options, warmup = ["--teacher", teacher, *SMALL], {"at+kd": [], "ft": ["--warmup_epochs", "1"]}
    students = ["resnet8", "pool:1"]
    words = [*options, *warmup["ft"], "--students", *students, "--methods", *warmup]
    succeeded(forked("distill.py", *words, "--output_dir", tmp_path / "all"))
    assert sorted(os.listdir(tmp_path / "all")) == ["pool1-at+kd", "pool1-ft", "resnet8-at+kd", "resnet8-ft"]
    for student, method in product(students, warmup):
        own = ["--student", student, "--method", method]
        together = tmp_path / "all" / f"{student.replace(':', '')}-{method}"
        assert outcome(together) == alone(tmp_path / "one", *options, *warmup[method], *own), (student, method)


def test_baselines_and_peers_beside_a_teachers_students_are_as_if_they_were_alone(teacher, tmp_path):
    """Peers see two copies of a batch, and the teacher knows images by another mean than the data set's own: neither
    changes what the others see, whatever comes first. Images of the teacher's size, and the student of its pool."""
    folder = tmp_path / "t"
    shutil.copytree(teacher, folder)
    info = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(info | {"mean": [0.4] * 3, "std": [0.3] * 3}))
    size, data = ["--image_size", "8"], ["--dataset", "digits"]
    words = ["--teacher", folder, "--student", "pool:1", *SMALL[2:]]
    methods = ["kdcl", "none", "kd", "dml"]
    succeeded(forked("distill.py", *words, "--methods", *methods, "--output_dir", tmp_path / "all"))
    found = {method: outcome(tmp_path / "all" / f"pool1-{method}") for method in methods}
    assert found["kd"] == alone(tmp_path / "one", *words, "--method", "kd")
    free = [*words[2:], *TINY_POOL, *size, *data]
    for method in ("kdcl", "none"):
        assert found[method] == alone(tmp_path / "one", *free, "--method", method), method
    again = ["--config", tmp_path / "all/pool1-dml/config.yaml"]
    assert found["dml"] == alone(tmp_path / "one", *again)


def test_two_processes_and_a_cached_teacher(teacher, tmp_path):
    """One table of logits for all students; the processes take the same turns."""
    options = ["--teacher", teacher, *SMALL, "--crop_padding", "0", "--cache_teacher", "memory"]
    succeeded(forked_two("distill.py", *options, "--students", "resnet8", "pool:1", "--output_dir", tmp_path / "all"))
    succeeded(forked_two("distill.py", *options, "--student", "pool:1", "--output_dir", tmp_path / "one"))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "all/pool1")


def test_stopped_and_killed_students_go_on_as_one(teacher, tmp_path):
    command = ["distill.py", "--teacher", teacher, *SMALL, "--students", "resnet8", "pool:1", "--output_dir"]
    succeeded(forked(*command, tmp_path / "whole"))
    stopped = forked("tests/signalled.py", int(signal.SIGTERM), 14, *command, tmp_path / "cut")
    assert stopped.returncode == 128 + signal.SIGTERM and stopped.stderr.count("\n") == 1
    shutil.rmtree(tmp_path / "cut/pool1")  # as if killed between the writing of the two: one begins again
    succeeded(forked(*command, tmp_path / "cut", "--resume_from_checkpoint", "latest"))
    for name in ("resnet8", "pool1"):
        assert outcome(tmp_path / "cut" / name) == outcome(tmp_path / "whole" / name)


class Counting(nn.Module):
    """Counts the images that its network sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, images, **options):
        self.images += len(images)
        return self.network(images, **options)

    @property
    def fc(self):
        return self.network.fc


class Failing(Distillation):
    """Diverges in the ninth iteration."""

    def forward(self, batch, iteration):
        return {name: term * (torch.nan if iteration == 8 else 1.0) for name, term in super().forward(batch, 0).items()}


def loops(folder, kinds, **options):
    data = load_images("digits", 8)
    config = DistillConfig(method="at+kd", image_size=8, batch_size=128, epochs=2, dataset="digits", **options)
    teacher, shared, made = Counting(create_model("resnet8", 10)), SharedOutputs(), {}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        student = create_model("resnet8", 10)
        built, weights = build_methods(find_methods("at+kd"), student, [teacher], 8, 10, None, config)
        objective = kind(student, [teacher], built, weights, shared=shared, options=config)
        made[name] = Loop(objective, data, config, Accelerator(), RunFolder(folder / name), Console(False))
    teacher.images = 0
    return made, teacher, shared


@pytest.mark.parametrize("parts", [1, 2])
def test_the_teacher_sees_a_batch_once(tmp_path, parts):
    made, teacher, shared = loops(
        tmp_path, {"a": Distillation, "b": Distillation, "c": Distillation}, gradient_accumulation_steps=parts
    )
    assert run_together(made, shared.next_batch) == {}
    assert teacher.images == 2 * len(made["a"].train.loader.split) and len(shared) == parts  # the last batch's
    weights = [[*loop.objective.student.state_dict().values()] for loop in made.values()]
    assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[2], strict=True))


def test_a_student_that_diverges_stops_alone(tmp_path):
    made, _, shared = loops(tmp_path, {"a": Failing, "b": Distillation})
    failed = run_together(made, shared.next_batch)
    assert list(failed) == ["a"] and "became nan in iteration 8" in str(failed["a"])
    assert made["b"].progress.epoch == 2 and made["b"].folder.last.is_file()


def test_all_are_saved_when_one_signal_stops_them(tmp_path):
    made, _, shared = loops(tmp_path, {"a": Distillation, "b": Distillation})
    step = made["b"].step

    def signalled(batch, totals):
        if made["b"].progress.iteration == 4:
            os.kill(os.getpid(), signal.SIGINT)
        step(batch, totals)

    made["b"].step = signalled
    with pytest.raises(Interrupted, match="all are saved"):
        run_together(made, shared.next_batch)
    assert abs(made["a"].progress.batch - made["b"].progress.batch) <= 1
    assert all(loop.folder.last.is_file() for loop in made.values())


def test_outputs_are_shared_within_a_batch_alone():
    shared, images, made = SharedOutputs(), torch.zeros(4, 3, 2, 2), []

    def compute():
        made.append(Outputs(torch.zeros(4, 2)))
        return made[-1]

    assert shared.get(images, "a", compute) is shared.get(images.view_as(images), "a", compute)
    shared.get(images[:2], "a", compute)  # a part, of the same place in memory
    shared.get(images, "b", compute)
    assert len(made) == 3
    shared.next_batch()
    shared.get(images, "a", compute)
    assert len(made) == 4


def test_the_usual_folder_of_several_names_the_teachers_data_set(teacher, monkeypatch):
    made = []

    def stop(config, *names):
        made.append(config)
        raise UserError("seen")

    monkeypatch.setattr("distill.Run", stop)
    here("distill.py", "--teacher", teacher, "--students", "resnet8", "pool:1")
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d-distilled-students-digits/resnet8", made[0].output_dir)


@pytest.mark.parametrize("students", [["--students", "resnet8", "pool:1"], ["--student", "resnet8"]])
def test_several_students_are_not_told_of_what_they_are_refused(teacher, students, tmp_path, monkeypatch):
    def stop(*_):
        raise UserError("introduced")

    monkeypatch.setattr("distill.advice", lambda *_: "--cuda_graph is several times as fast")
    monkeypatch.setattr("distill.run_together", stop)
    monkeypatch.setattr("engine.loop.Loop.run", stop)
    done = here("distill.py", "--teacher", teacher, *students, "--image_size", "8", "--output_dir", tmp_path / "x")
    assert "introduced" in done.stderr and "loss: " in done.stdout
    assert ("--cuda_graph" in done.stdout) == (students[0] == "--student")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--students", "resnet8", "resnet8"], "--students resnet8: there are two for the folder"),
        (["--methods", "kd", "kd"], "--methods kd: there are two for the folder"),
        (["--methods", "kd", "rco"], "--method rco: goes with no other"),
        (["--students", "resnet8", "--method", "rco"], "--method rco: goes with no other"),
        (["--methods", "kd", "--dkd_beta", "2"], "not read by --method kd"),
        (["--methods", "kd", "none", "--cuda_graph"], "--cuda_graph: records a step with the teacher's own for each"),
        (["--students", "a.json", "--resume_from_checkpoint", "x"], "it can only be 'latest'"),
    ],
)
def test_what_cannot_be_trained_together(teacher, arguments, line, tmp_path):
    ended = here("distill.py", "--teacher", teacher, *arguments, "--output_dir", tmp_path / "x")
    assert ended.returncode == 2 and line in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
