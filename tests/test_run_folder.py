"""Whose a folder is, what may be replaced in it, and what a run that was killed leaves behind."""

import errno
import json
import multiprocessing
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from common import UserError
from engine.run_folder import RunFolder
from tests.runs import TINY, here, read_rows, succeeded

CONFIG = {"method": "kd", "dataset": "digits", "seed": 0, "epochs": 1, "output_dir": "r", "checkpointing_epochs": 1}


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "file", "file/r", "loop"])
def test_a_folder_that_cannot_be_is_refused_by_its_flag(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = here("train_teacher.py", *TINY, "--output_dir", tmp_path / name)
    assert done.returncode == 2 and f"--output_dir {tmp_path / name}: cannot be " in done.stderr


def finished(folder: Path) -> Path:
    """A folder as a finished run leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "checkpoints/last.safetensors").write_bytes(b"weights")
    (folder / "summary.json").write_text("{}")
    return folder


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "latest"}])
def test_what_a_kill_before_the_first_config_leaves_locks_nobody_out(tmp_path, options):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.1.tmp").touch()
    folder = RunFolder(tmp_path, **options)
    folder.lock()
    folder.begin(CONFIG)
    assert not list(tmp_path.glob(".*.tmp")) and (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize("stop", range(9))
def test_a_kill_while_an_old_run_is_removed_leaves_a_run(tmp_path, monkeypatch, stop):
    """Killed after any number of removals it can be overwritten, with the user's notes in it, and is not finished."""
    run = finished(tmp_path / "run")
    (run / "notes.txt").touch()
    folder = RunFolder(run, overwrite=True)
    folder.lock()
    left = iter(range(stop))
    with monkeypatch.context() as patch:
        for module, name in ((os, "unlink"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
            own = getattr(module, name)

            def killed(*arguments, own=own, **options):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return own(*arguments, **options)

            patch.setattr(module, name, killed)
        with suppress(KeyboardInterrupt):
            folder.begin(CONFIG)
    folder._lock.close()
    assert stop == 0 or not (run / "summary.json").exists()
    again = RunFolder(run, overwrite=True)
    again.lock()
    again.begin(CONFIG)
    assert sorted(os.listdir(run)) == [".lock", "config.yaml", "notes.txt"]


def test_an_old_run_that_cannot_be_removed_is_not_mixed_with_the_new_one(tmp_path, monkeypatch):
    run = finished(tmp_path / "run")
    folder = RunFolder(run, overwrite=True)
    folder.lock()
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        folder.begin(CONFIG)


def test_a_run_that_ended_meanwhile_is_not_wiped(tmp_path):
    late = RunFolder(tmp_path / "r")  # checked while the folder was free
    finished(tmp_path / "r")
    with pytest.raises(UserError, match="holds a finished run"):
        late.lock()
    assert (tmp_path / "r/checkpoints/last.safetensors").read_bytes() == b"weights"


def hold(path: Path, ready, end) -> None:
    folder = RunFolder(path, overwrite=True)
    folder.lock()
    ready.set()
    end.wait(60)


def test_a_folder_in_use_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, end))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run is writing"):
        RunFolder(tmp_path, overwrite=True).lock()
    end.set()
    process.join()
    RunFolder(tmp_path, overwrite=True).lock()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "latest"}])
@pytest.mark.parametrize("content", ["site: blog", "- a", "[unclosed", "method: kd"])
def test_another_programs_config_is_no_run(tmp_path, options, content):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "plots").mkdir()
    with pytest.raises(UserError, match="no run's"):
        RunFolder(tmp_path, **options)
    assert (tmp_path / "plots").is_dir()


def test_a_checkpoint_of_another_run_does_not_write_over_this_one(tmp_path):
    run, other = finished(tmp_path / "run"), finished(tmp_path / "other")
    for folder in (run, other):
        (folder / "summary.json").unlink()
    checkpoint = str(other / "checkpoints/last.safetensors")
    with pytest.raises(UserError, match="holds another run than --resume_from_checkpoint"):
        RunFolder(run, resume=checkpoint)
    RunFolder(other, resume=checkpoint)
    RunFolder(tmp_path / "new", resume=checkpoint)
    RunFolder(run, resume=checkpoint, overwrite=True)


def test_an_output_folder_that_is_an_input_is_refused_through_links_too(tmp_path):
    run = finished(tmp_path / "teacher")
    (tmp_path / "link").symlink_to(run)
    for place in (run, tmp_path / "link", run / "checkpoints/last.safetensors"):
        with pytest.raises(UserError, match=r"holds --teacher .*which the run reads"):
            RunFolder(run, overwrite=True, inputs={"--teacher": [place]})
    with pytest.raises(UserError, match="which the run reads"):
        RunFolder(tmp_path / "link", overwrite=True, inputs={"--weights": [run]})
    RunFolder(run / "student", inputs={"--teacher": [run]})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    RunFolder(tmp_path / "new", inputs={"the spec": [tmp_path / "loop"]})  # whoever reads it will say so


def test_the_teacher_survives_being_named_as_output(tmp_path):
    teacher = tmp_path / "t"
    succeeded(here("train_teacher.py", *TINY, "--output_dir", teacher))
    before = (teacher / "model.safetensors").read_bytes()
    done = here("distill.py", "--teacher", teacher, *TINY[2:], "--output_dir", teacher, "--overwrite")
    assert done.returncode == 2 and "which the run reads" in done.stderr
    assert (teacher / "model.safetensors").read_bytes() == before


def test_what_an_epochs_checkpoint_is_followed_by_is_made_good_on_resume(tmp_path):
    """Killed between last.safetensors and the rest: the anchor, best.safetensors and metrics are missing."""
    arguments = [*TINY[:-2], "--epochs", "2", "--anchors", "2", "--output_dir", tmp_path / "r"]
    succeeded(here("train_teacher.py", *arguments))
    run, saved = tmp_path / "r", tmp_path / "saved"
    shutil.copytree(run, saved)
    for gone in ("summary.json", "model.safetensors", "model.json", "metrics.jsonl", "checkpoints/best.safetensors"):
        (run / gone).unlink()
    shutil.rmtree(run / "anchors/0002")
    succeeded(here("train_teacher.py", *arguments, "--resume_from_checkpoint", "latest"))
    for name in ("model.safetensors", "anchors/0002/model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (saved / name).read_bytes()
    best = json.loads((run / "summary.json").read_text())["best"]["epoch"]
    assert (
        best != 2
        or (run / "checkpoints/best.safetensors").read_bytes() == (saved / "checkpoints/best.safetensors").read_bytes()
    )
    assert len(read_rows(run / "metrics.jsonl")) == 2


def test_a_replaced_teacher_is_noticed_on_resume(tmp_path):
    for name, seed in (("t", "0"), ("other", "1")):
        succeeded(here("train_teacher.py", *TINY, "--seed", seed, "--output_dir", tmp_path / name))
    arguments = ["--teacher", tmp_path / "t", "--student", "resnet8", *TINY[2:], "--output_dir", tmp_path / "s"]
    succeeded(here("distill.py", *arguments))
    (tmp_path / "s/summary.json").unlink()
    for file in ("model.safetensors", "model.json"):
        shutil.copy(tmp_path / "other" / file, tmp_path / "t" / file)
    done = here("distill.py", *arguments, "--resume_from_checkpoint", "latest")
    assert done.returncode == 2 and "the teacher" in done.stderr and "has changed" in done.stderr


def test_changed_labels_change_a_data_sets_fingerprint():
    from data.datasets import load_images

    one, other = load_images("digits", 8), load_images("digits", 8)
    assert one.fingerprint() == other.fingerprint()
    other.train.labels[0] = (other.train.labels[0] + 1) % 10
    assert one.fingerprint() != other.fingerprint()


def test_gates_that_are_not_finite_end_in_the_line_about_the_loss(tmp_path):
    from tests.runs import TINY_GTN

    done = here("train_teacher.py", *TINY_GTN, "--lr", "1e20", "--epochs", "2", "--output_dir", tmp_path / "r")
    assert done.returncode == 1 and "became" in done.stderr and "Traceback" not in done.stderr
    from objectives.gates import Gates

    gates = Gates([3, 3])
    with torch.no_grad():
        gates.phi[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="no longer finite"):
        gates.draw(torch.Generator())
