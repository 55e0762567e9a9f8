"""Two processes on a CPU train in step, and count everything once."""

import pytest
import torch

from data.augment import Normalise
from data.datasets import load_images
from models import load_pretrained
from tests.runs import TINY, TINY_GTN, TINY_POOL, forked, forked_two, launch_two, read_json, read_rows, succeeded

EPOCHS = 2


def test_same_paths_same_weights_and_each_image_once_an_epoch(tmp_path):
    arguments = [*TINY_GTN, "--epochs", EPOCHS, "--output_dir", tmp_path / "run"]
    succeeded(forked_two("tests/two_process_driver.py", tmp_path, *arguments))
    first, second = (read_json(tmp_path / f"rank{rank}.json") for rank in range(2))
    assert first["paths"] == second["paths"] and len(first["paths"]) > 20
    assert first["weights"] == second["weights"] and first["buffers"] == second["buffers"]
    assert first["undrawn_untouched"] and second["undrawn_untouched"]
    images = len(load_images("digits", 8).train)
    assert not set(first["seen"][: images // 2]) & set(second["seen"][: images // 2])
    assert sorted(first["seen"] + second["seen"]) == sorted(list(range(images)) * EPOCHS)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["images"] for row in rows] == [images] * EPOCHS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "teacher"
    done = succeeded(launch_two("train_teacher.py", *TINY_GTN, "--epochs", EPOCHS, "--output_dir", folder))
    return folder, done.stdout


def test_the_scripts_print_and_write_once(teacher):
    folder, output = teacher
    assert output.count("teacher_ce") == 1 and output.count("next: ") == 1 and "2 process(es)" in output
    assert read_json(folder / "summary.json")["processes"] == 2


def test_accuracy_counts_every_test_image_exactly_once(teacher):
    """The accuracy that two processes report is that of the saved model, computed in one."""
    folder, _ = teacher
    model, data = load_pretrained(folder), load_images("digits", 8)
    normalise = Normalise(model.info.mean, model.info.std, torch.device("cpu"))
    with torch.no_grad():
        right = (model(normalise(data.test.images)).argmax(1) == data.test.labels).sum().item()
    assert read_json(folder / "summary.json")["top1"] == pytest.approx(100 * right / len(data.test), abs=1e-6)


def test_distillation_runs_in_two_processes_with_teacher_logits_cached_or_not(teacher, tmp_path):
    arguments = ["--teacher", teacher[0], "--student", "pool:1", "--epochs", 1, "--batch_size", 128, *TINY_POOL]
    losses = []
    for cached in ("memory", "no"):
        run = tmp_path / cached
        done = forked_two("distill.py", *arguments, "--crop_padding", 0, "--cache_teacher", cached, "--output_dir", run)
        assert ("teacher logits: cached before training, of 1,437" in succeeded(done).stdout) == (cached == "memory")
        losses.append(read_rows(run / "metrics.jsonl")[0]["losses"])
        told = read_json(run / "summary.json")["teachers"][0]
        assert told["sha256"] == read_json(teacher[0] / "model.json")["sha256"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_one_and_two_processes_learn_alike(tmp_path):
    """Not to the bit, since BatchNorm normalises each share by itself; half or twice the step is off by more."""
    succeeded(forked("train_teacher.py", *TINY, "--output_dir", tmp_path / "one"))
    succeeded(forked_two("train_teacher.py", *TINY, "--output_dir", tmp_path / "two"))
    one, two = (read_rows(tmp_path / run / "metrics.jsonl")[0] for run in ("one", "two"))
    assert one["images"] == two["images"]
    assert one["losses"]["ce"] == pytest.approx(two["losses"]["ce"], rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs such a launch is right")
def test_two_processes_that_do_not_know_of_each_other_stop(tmp_path):
    done = forked_two("train_teacher.py", *TINY_GTN, "--output_dir", tmp_path / "run", on_cpu=False)
    assert done.returncode != 0
    assert "do not know of each other" in done.stderr and "ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sftn_trains_in_two_processes(tmp_path):
    """Each epoch ends in a check that both processes hold the same weights; the teacher is frozen in the first."""
    command = [*TINY, "--method", "sftn", "--student", "resnet8x2", "--freeze_teacher_epochs", "1", "--epochs", "2"]
    succeeded(forked_two("train_teacher.py", *command, "--output_dir", tmp_path / "t"))
    rows = read_rows(tmp_path / "t" / "metrics.jsonl")
    assert [row["images"] for row in rows] == [1437, 1437]
    assert set(rows[0]["losses"]) == {"teacher_ce", "branch_ce", "branch_kl"}
    assert rows[0]["accuracy"]["teacher"] < 20 < rows[1]["accuracy"]["branch3"] + rows[1]["accuracy"]["teacher"]
