"""A user's mistake gets one line, exit code 2, and touches nothing: through the real scripts' mains, and where a run
begins or there is a run already, in processes of their own."""

import io
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
from PIL import Image

from engine.run_folder import RUN_KEYS, RunFolder
from tests.runs import TINY, forked, here, read_rows, succeeded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished vanilla teacher of the digits."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    succeeded(forked("train_teacher.py", *TINY, "--output_dir", folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(script: str, *arguments, words: tuple[str, ...], code: int = 2, by=here) -> None:
    done = by(script, *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and lines[0].startswith(f"{script}: "), done.stderr
    for each in words:
        assert each in lines[0]


TEACHER_MISTAKES = {
    "model": (["--model", "resnt20"], ("--model", "resnt20", "resnet20")),
    "method": (["--method", "gnt"], ("--method", "gnt", "did you mean gtn")),
    "data set": (["--dataset", "cifar1O"], ("--dataset", "cifar1O", "did you mean cifar10")),
    "flag": (["--learning_rate", "1"], ("--learning_rate",)),
    "temperature": (["--temperature", "0"], ("--temperature 0",)),
    "batch": (["--batch_size", "2000"], ("--batch_size 2000", "1437")),
    "pool": (["--method", "gtn", "--pool.widths", "1", "2"], ("pool.widths", "[1, 2]")),
    "vanilla run": (["--vanilla_run", "missing"], ("--vanilla_run", "missing")),
    "checkpoint": (["--resume_from_checkpoint", "missing.safetensors"], ("missing.safetensors",)),
    "image size": (
        ["--method", "gtn", "--image_size", "9", "--pool.strides", *"111111"],
        ("factor of 2", "5x5", "9x9"),
    ),
    "fp16 without a gpu": (["--mixed_precision", "fp16"], ("fp16",)),
}


@pytest.mark.parametrize("case", TEACHER_MISTAKES)
def test_mistakes_in_training_a_teacher(case, tmp_path):
    arguments, words = TEACHER_MISTAKES[case]
    refused("train_teacher.py", *arguments, "--output_dir", tmp_path / "run", words=words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
def test_a_mistake_in_a_process_of_its_own(script):
    refused(script, "--epochs", "0", words=("--epochs 0",), by=forked)


def test_an_unknown_key_in_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("epoch: 3\n")
    refused("train_teacher.py", "--config", tmp_path / "r.yaml", words=("r.yaml", "'epoch'", "--epochs"))


STUDENT_MISTAKES = {
    "student": (["--student", "resnet9"], ("--student", "resnet9", "resnet8")),
    "seed": (["--student", "pool:one"], ("--student pool:one", "pool:SEED")),
    "spec": (["--student", "missing.json"], ("--student missing.json",)),
    "method": (["--method", "dk"], ("--method", "did you mean dkd or kd")),
    "temperature": (["--temperature", "-1"], ("--temperature -1",)),
    "alpha": (["--alpha", "2"], ("--alpha 2",)),
    "image size": (["--image_size", "7"], ("--image_size 7", "from 8 to 4096")),
    "pointless teacher": (["--method", "none"], ("--method none",)),
}


def test_a_wrong_spec_is_named_with_its_flag(tmp_path):
    (tmp_path / "s.json").write_text('{"layers": [1]}')
    for script, flags in (("distill.py", ["none", "--student"]), ("train_teacher.py", ["sftn", "--student"])):
        words = (f"--student {tmp_path}/s.json: spec: ",)
        refused(script, "--method", *flags, tmp_path / "s.json", "--output_dir", tmp_path / "r", words=words)


@pytest.mark.parametrize("case", STUDENT_MISTAKES)
def test_mistakes_in_distilling(case, run, tmp_path):
    arguments, words = STUDENT_MISTAKES[case]
    refused("distill.py", "--teacher", run, *arguments, "--output_dir", tmp_path / "run", words=words)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_missing_or_no_model(tmp_path):
    refused("distill.py", words=("--teacher", "kd"))
    refused("distill.py", "--teacher", tmp_path, words=("--teacher", str(tmp_path), "no trained model"))


def write_images(path: Path, images: list[bytes], labels: list[int]) -> None:
    cells = [{"bytes": image, "path": None} for image in images]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), path)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_teacher_of_other_classes(run, tmp_path):
    write_images(tmp_path / "x.parquet", [picture()] * 30, [0, 1, 2] * 10)
    arguments = ["--teacher", run, "--dataset", f"parquet:{tmp_path}/x.parquet", "--output_dir", tmp_path / "run"]
    refused("distill.py", *arguments, words=("has 10 classes, the images 3", "--teacher_classes"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        ([picture()] * 10, [0, 1, 2, 3, -4] * 2, ("row 4", "-4")),
        ([picture()] * 10, [0, 1, 2, 3, 900] * 2, ("class 4",)),
        ([picture()] * 9 + [picture()[:30]], [0, 1] * 5, ("x-train.parquet row 9", "cannot read the image")),
        ([], [], ("empty",)),
    ],
)
def test_bad_images_and_labels(tmp_path, images, labels, words):
    write_images(tmp_path / "x-train.parquet", images, labels)
    write_images(tmp_path / "x-test.parquet", [picture()] * 2, [0, 1])
    refused("train_teacher.py", "--dataset", f"parquet:{tmp_path}/*.parquet", words=words)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_model_and_checkpoint(run, tmp_path, damage):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "model.safetensors", tmp_path / "run" / "checkpoints" / "last.safetensors"):
        data = file.read_bytes()
        flipped = data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]
        file.write_bytes({"truncated": data[:-100], "flipped": flipped}[damage])
    refused("distill.py", "--teacher", tmp_path / "run", words=("--teacher", "model.safetensors"), by=forked)
    (tmp_path / "run" / "summary.json").unlink()  # a run that was stopped
    before = contents(tmp_path / "run")
    arguments = [*TINY, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"]
    refused("train_teacher.py", *arguments, words=("--resume_from_checkpoint", "last.safetensors"), by=forked)
    assert contents(tmp_path / "run") == before


def test_a_finished_run_and_foreign_files_are_not_touched(run, tmp_path):
    before = contents(run)
    refused("train_teacher.py", *TINY, "--output_dir", run, words=("--output_dir", "finished run", "--overwrite"))
    assert contents(run) == before
    # Even when overwriting is asked for, a mistake elsewhere costs nothing.
    refused("train_teacher.py", "--overwrite", "--output_dir", run, "--batch_size", "5000", words=("--batch_size",))
    assert contents(run) == before
    (tmp_path / "thesis.tex").write_text("important")
    refused("train_teacher.py", *TINY, "--overwrite", "--output_dir", tmp_path, words=("no run's",))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_that_another_run_is_writing_to(tmp_path):
    other = RunFolder(tmp_path / "run")
    other.lock()
    other.begin(dict.fromkeys(RUN_KEYS, 1))
    before = contents(other.path)
    arguments = [*TINY, "--overwrite", "--output_dir", other.path]
    refused("train_teacher.py", *arguments, words=("another run",), by=forked)
    assert contents(other.path) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY, "--epochs", "3", "--lr", "1e30", "--lr_schedule", "constant", "--output_dir", run]
    words = ("'ce' became", "iteration", "last good checkpoint: none yet")
    refused("train_teacher.py", *arguments, words=words, code=1, by=forked)
    assert read_rows(run / "metrics.jsonl") == [] and not (run / "summary.json").exists()


def test_a_recipe_in_another_encoding(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"# caf\xe9\nlr: 0.1\n")
    refused("train_teacher.py", "--config", tmp_path / "r.yaml", words=("r.yaml",))


def test_a_seed_beyond_64_bits(tmp_path):
    refused("train_teacher.py", "--seed", 10**20, "--output_dir", tmp_path / "run", words=("--seed",))


def test_a_vanilla_run_with_another_summary(tmp_path):
    (tmp_path / "summary.json").write_text("[1]")
    refused("train_teacher.py", "--vanilla_run", tmp_path, words=("--vanilla_run",))


TAMPERED = [{"pool": {"bogus": 1}}, {"image_size": "big"}, {"image_size": -3}, {"std": [0.1]}, {"std": [0, 0, 0]}]
TAMPERED += [{"mean": "x"}, {"dataset": None}]


@pytest.mark.parametrize("change", TAMPERED, ids=str)
def test_a_model_json_that_makes_no_sense(run, tmp_path, change):
    shutil.copytree(run, tmp_path / "t")
    path = tmp_path / "t" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    arguments = ["--teacher", tmp_path / "t", "--student", "pool:1", "--epochs", 1, "--output_dir", tmp_path / "s"]
    refused("distill.py", *arguments, words=("--teacher",))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_are_not_finite_are_neither_saved_nor_called_good(tmp_path, epochs):
    """The loss of an epoch's last batch is finite; the update after it is not."""
    run = tmp_path / "run"
    arguments = [*TINY, "--batch_size", "1437", "--epochs", epochs, "--lr", "3e38", "--weight_decay", "10"]
    done = forked("train_teacher.py", *arguments, "--lr_schedule", "constant", "--output_dir", run)
    assert done.returncode == 1 and "last good checkpoint: none yet" in done.stderr, done.stderr[-300:]
    for path in run.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(path).values()), path
