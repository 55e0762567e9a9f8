"""The scripts from end to end, through the launcher and plainly: what a run leaves behind and says."""

import io
import json
import re
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image

import distill
import train_teacher
from distill import DistillConfig
from engine.command_line import parse
from models import create_model, load_pretrained
from models.pool import Pool
from tests.runs import TINY, TINY_GTN, TINY_POOL, forked, here, launch, python, read_json, read_rows, succeeded

SUMMARY = {"method", "model", "dataset", "seed", "top1", "top5", "best", "epochs", "seconds", "images_per_second"}
SUMMARY |= {"peak_memory_bytes", "parameters", "versions", "device", "git_commit", "sha256", "warnings", "processes"}
STUDENT = ["--student", "pool:1", "--epochs", "1", "--batch_size", "128"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "teacher"
    command = [*TINY_GTN, "--epochs", "2", "--val_fraction", "0.1", "--with_tracking", "--output_dir", folder]
    return folder, succeeded(launch("train_teacher.py", *command))


def test_a_teachers_run_folder_is_complete(teacher):
    folder, _ = teacher
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["method"], config["dataset"], config["epochs"]) == ("gtn", "digits", 2)
    assert config["pool"]["widths"] == [4, 4, 4, 8, 8, 8] and config["lr"] == 0.05
    assert summary_is_complete(folder)["best"]["chosen_on"] == "val"
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row["accuracy"]) == ["teacher", "branch1", "branch2", "branch3"]
        assert set(row["losses"]) == {"teacher_ce", "branch_ce", "branch_kl", "gate_ce", "gate_kl"}
        assert {"lr", "images_per_second", "seconds", "gates", "gate_entropy", "val_accuracy"} <= set(row)
    assert {p.name for p in (folder / "plots").iterdir()} == {"accuracy.png", "losses.png", "gates.png"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.safetensors", "best.safetensors"}
    assert any((folder / "tensorboard").iterdir())
    assert not (folder / "supernet.safetensors").exists()


def summary_is_complete(folder) -> dict:
    summary = read_json(folder / "summary.json")
    assert set(summary) >= SUMMARY
    assert summary["top1"] == next(iter(read_rows(folder / "metrics.jsonl")[-1]["accuracy"].values()))
    assert 0 <= summary["top1"] <= summary["top5"] <= 100
    return summary


def test_the_teacher_is_a_plain_model(teacher):
    model = load_pretrained(teacher[0])
    assert (model.info.name, model.info.dataset, model.info.image_size) == ("resnet8", "digits", 8)
    assert not [name for name in model.state_dict() if "branch" in name or "gate" in name]
    assert model.info.pool["widths"] == [4, 4, 4, 8, 8, 8]


def test_tensorboard_holds_the_epochs(teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(teacher[0] / "tensorboard" / "student-friendly-teachers")).Reload()
    assert {"loss/teacher_ce", "accuracy/branch1", "lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/teacher_ce")] == [1, 2]


def test_the_output_is_a_table_and_a_summary_without_bars(teacher):
    folder, done = teacher
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr and "Traceback" not in done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r" *[12]/2 ", line)]
    assert len(rows) == 2 and done.stdout.count("teacher_ce") == 1
    for message in (f"{folder}/model.safetensors", f"{folder}/summary.json", "gates.png", "seed 0", "val split"):
        assert message in done.stdout


def test_the_next_command_that_is_printed_works(teacher):
    line = next(line for line in teacher[1].stdout.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words[:2] == ["python", "distill.py"]
    config = parse(DistillConfig, "", {}, words[2:])
    assert config.teacher == [str(teacher[0])] and config.student == "pool:7"


def test_distilling_draws_the_student_from_the_teachers_pool(teacher, tmp_path):
    options = [*STUDENT, "--lr", "0.02", "--train_fraction", "0.9", "--seed", "3"]
    done = succeeded(forked("distill.py", "--teacher", teacher[0], *options, "--output_dir", tmp_path / "kd"))
    summary = summary_is_complete(tmp_path / "kd")
    digest = read_json(teacher[0] / "model.json")["sha256"]
    assert summary["teachers"] == [{"path": str(teacher[0]), "model": "resnet8", "sha256": digest}]
    student = load_pretrained(tmp_path / "kd")
    assert [layer["out"] for layer in student.info.spec["layers"][1:7]] == [4, 4, 4, 8, 8, 8]
    assert student.info.mean == load_pretrained(teacher[0]).info.mean and student.info.image_size == 8
    assert set(read_rows(tmp_path / "kd" / "metrics.jsonl")[0]["losses"]) == {"ce", "kl"}
    # The command it suggests trains the very same architecture alone, with the same options.
    words = shlex.split(next(x for x in done.stdout.splitlines() if x.startswith("next: ")).removeprefix("next: "))
    succeeded(forked(words[1], *words[2:]))
    alone = load_pretrained(f"{tmp_path}/kd-alone")
    assert alone.info.spec == student.info.spec
    configs = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("kd", "kd-alone")]
    other = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert other <= {"method", "teacher", "student", "output_dir", "pool", "image_size", "alpha"}
    assert set(read_rows(tmp_path / "kd-alone" / "metrics.jsonl")[0]["losses"]) == {"ce"}


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    """The first run by `python` itself, and so without a launcher too."""
    hashes = []
    for name, seed, start in (("a", 1, python), ("b", 1, forked), ("c", 2, forked)):
        run = tmp_path / name
        succeeded(start("train_teacher.py", *TINY_GTN, "--seed", seed, "--output_dir", run))
        hashes.append(read_json(run / "model.json")["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "options",
    [
        ["--gate_holdout", "0.2", "--full_gates", "--save_supernet", "--kl_direction", "forward"],
        ["--share_branches", "--mixed_precision", "bf16", "--gate_every", "0", "--lr_schedule", "constant"],
    ],
)
def test_options_of_gtn_run(options, tmp_path):
    run = tmp_path / "run"
    succeeded(forked("train_teacher.py", *TINY_GTN, *options, "--output_dir", run))
    losses = read_rows(run / "metrics.jsonl")[0]["losses"]
    assert ("gate_kl" in losses) == ("0.2" in options)
    assert (run / "supernet.safetensors").exists() == ("--save_supernet" in options)


def test_a_teacher_for_given_students(tmp_path):
    """--pool_students, as names and as a spec's file: the supernet and the teacher's pool hold what they take."""
    sizes = {"widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 1]}  # those of TINY_POOL
    wide = Pool(stem=4, head=8, candidates=["res3x2", "identity", "zero"], **sizes)
    spec = tmp_path / "mine.json"
    spec.write_text(json.dumps(wide.sample(4)))
    run = tmp_path / "run"
    chosen = ["--pool_students", "pool:1", spec, "--branches", "2", "3"]
    succeeded(forked("train_teacher.py", *TINY_GTN, *chosen, "--gate_every", "2", "--output_dir", run))
    row = read_rows(run / "metrics.jsonl")[-1]
    assert set(row["accuracy"]) == {"teacher", "branch2", "branch3"}
    pool = Pool(**read_json(run / "model.json")["pool"])
    offered = [list(row["gates"]["branch2"][f"L{layer}"]) for layer in (4, 5, 6)]
    assert offered == [pool.choices(layer) for layer in (3, 4, 5)] != [wide.choices(layer) for layer in (3, 4, 5)]
    # pool:1 of the smaller pool is another network, so the students are kept as files
    assert read_json(run / "students" / "pool1.json") == wide.sample(1)
    assert read_json(run / "students" / "mine.json") == wide.sample(4)
    student = [run / "students" / "pool1.json", "--epochs", "1", "--output_dir", tmp_path / "student"]
    succeeded(forked("distill.py", "--teacher", run, "--student", *student))
    succeeded(forked("train_teacher.py", "--config", run / "config.yaml", "--output_dir", tmp_path / "again"))
    assert read_json(tmp_path / "again" / "model.json")["sha256"] == read_json(run / "model.json")["sha256"]
    other = ["--pool_students", "pool:1", "nas_s", "--output_dir", tmp_path / "n"]
    refused = here("train_teacher.py", *TINY_GTN, *other)
    assert refused.returncode == 2 and "--pool_students nas_s: is in no pool with pool:1" in refused.stderr
    assert not (tmp_path / "n").exists()


def test_gates_of_their_own_leave_the_weights_all_other_images(tmp_path):
    run = tmp_path / "run"
    succeeded(forked("train_teacher.py", *TINY_GTN, "--gate_holdout", "0.2", "--output_dir", run))
    # 1437 images less a fifth are 9 batches for the weights, and between each two of them comes one for the
    # gates, whose 288 images make batches of 128, 128 and 32, again and again.
    assert read_rows(run / "metrics.jsonl")[0]["images"] == (1437 - 288) + 3 * 128 * 2 + 2 * 32


def test_a_teacher_behind_the_vanilla_one_is_reported(teacher, tmp_path):
    vanilla = tmp_path / "vanilla"
    succeeded(forked("train_teacher.py", *TINY, "--epochs", "4", "--batch_size", "32", "--output_dir", vanilla))
    run = ["--vanilla_run", vanilla, "--teacher_kl_share", "0", "--output_dir", tmp_path / "gtn"]
    done = succeeded(forked("train_teacher.py", *TINY_GTN, *run))
    assert "warning: the teacher reaches" in done.stdout
    assert len(read_json(tmp_path / "gtn" / "summary.json")["warnings"]) == 1


@pytest.mark.parametrize("script", [train_teacher, distill])
def test_help_and_listings(script):
    name = f"{script.__name__}.py"
    text = succeeded(here(name, "--help")).stdout
    assert f"python {name}" in text and "accelerate launch" in text and "default: " in text
    lines = islice(script.LISTINGS["models"](), 4)  # all of it: tests/test_zoo.py
    assert [line.split()[0] for line in lines] == ["name", "resnet8", "resnet14", "resnet20"]
    assert ("vanilla: " if script is train_teacher else "\nnone ") in here(name, "--list_methods").stdout


def test_importing_a_script_starts_nothing():
    done = python("-c", "import train_teacher, distill")
    assert done.returncode == 0 and done.stdout == done.stderr == ""


def test_a_model_of_any_family_can_be_student_and_teacher(tmp_path):
    succeeded(forked("train_teacher.py", *TINY, "--model", "wrn10_1", "--output_dir", tmp_path / "t"))
    arguments = ["--teacher", tmp_path / "t", "--student", "resnet8x2", "--epochs", 1, "--batch_size", 128]
    succeeded(forked("distill.py", *arguments, *TINY_POOL, "--output_dir", tmp_path / "s"))
    assert load_pretrained(tmp_path / "s").info.name == "resnet8x2"


def test_the_next_command_knows_the_place_and_the_classes(tmp_path):
    classes = ("--binary", "0", "2", "4", "--exclude_classes", "1")
    done = succeeded(forked("train_teacher.py", *TINY, *classes, "--output_dir", tmp_path / "my teacher"))
    words = shlex.split(next(x for x in done.stdout.splitlines() if x.startswith("next: ")).removeprefix("next: "))
    config = parse(DistillConfig, "", {}, words[2:])
    assert config.teacher == [f"{tmp_path}/my teacher"]
    assert config.binary == [0, 2, 4] and config.exclude_classes == [1]


def test_every_place_of_images_trains_and_starts_from_given_weights(tmp_path):
    """Workers give the very batches that the set in memory gives; a stream is read in an order of its own."""
    write_pictures(tmp_path / "train.parquet", range(60))
    write_pictures(tmp_path / "test.parquet", range(60, 80))
    body = create_model("resnet8", 10).state_dict()
    torch.save({"model": body}, tmp_path / "body.pth")
    fixed = ["--model", "resnet8", "--dataset", f"parquet:{tmp_path}/*.parquet", "--cache_dir", tmp_path / "cache"]
    fixed += ["--image_size", "8", "--batch_size", "16", "--epochs", "1", "--cutout", "3"]
    fixed += ["--weights", tmp_path / "body.pth"]
    losses, places = {}, {"memory": [], "workers": ["--pipeline", "workers"], "stream": ["--streaming"]}
    for place, options in places.items():
        done = succeeded(forked("train_teacher.py", *fixed, *options, "--output_dir", tmp_path / place))
        assert "body.pth, classifier fresh: 2 classes instead of 10" in done.stdout
        row = read_rows(tmp_path / place / "metrics.jsonl")[0]
        assert row["images"] == 60
        losses[place] = row["losses"], row["accuracy"]
        message = {"memory": "images: all on cpu", "workers": "decoded by workers", "stream": "images: streamed"}[place]
        assert message in done.stdout
    assert losses["memory"] == losses["workers"] != losses["stream"]
    done = here("train_teacher.py", *fixed, "--pretrained", "--output_dir", tmp_path / "no")
    assert done.returncode == 2 and "--weights" in done.stderr and not (tmp_path / "no").exists()


def write_pictures(path: Path, numbers: range) -> None:
    cells = []
    for number in numbers:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": [n % 2 for n in numbers]}), path)


def test_other_teachers_run_and_suggest_their_student(tmp_path):
    branches = ["--method", "sftn", "--student", "resnet8x2", "--train_fraction", "0.2"]
    done = succeeded(forked("train_teacher.py", *TINY, *branches, "--output_dir", tmp_path / "sftn"))
    row = read_rows(tmp_path / "sftn" / "metrics.jsonl")[0]
    assert list(row["accuracy"]) == ["teacher", "branch1", "branch2", "branch3"]
    assert "--student resnet8x2 --method kd" in done.stdout
    assert load_pretrained(tmp_path / "sftn").info.name == "resnet8"  # branches are gone
    mse = ["--method", "mse", "--schedule", "1/3", "--stop_after", "2", "--lr_gamma", "0.5", "--train_fraction", "0.2"]
    done = succeeded(forked("train_teacher.py", *TINY, *mse, "--output_dir", tmp_path / "mse"))
    rows = read_rows(tmp_path / "mse" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [0.05, 0.025] and set(rows[0]["losses"]) == {"mse"}
    assert read_json(tmp_path / "mse" / "summary.json")["epochs"] == 2 and "2/2" in done.stdout
