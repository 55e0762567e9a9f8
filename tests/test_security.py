"""Files made by an enemy, or damaged: one line that names them, nothing executed, nothing allocated for them, no wait.

docs/security.md says what is promised.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from common import MOST_TEXT, UserError, read_text
from data.decode import from_cell, read_rgb
from data.sources import folder_sources, parquet_sources
from distill import read_anchors
from engine.checkpoint import load_checkpoint
from engine.recipe import read_recipe
from engine.run_folder import RunFolder
from models import ModelInfo, create_model, load_pretrained, load_weights, save_pretrained
from models.pool import NAS_STUDENTS
from tests.runs import command, here
from train_teacher import Reference


class Payload:
    """Executes code in a reader that lets it: makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def teacher(folder: Path, weights: bytes | None = None, **changes) -> Path:
    """A run folder with a model; with other `weights`, whose checksum fits, and other entries in model.json."""
    save_pretrained(create_model("resnet8", 10), ModelInfo("resnet8", "digits", 10, 8, [0.5] * 3, [0.2] * 3), folder)
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
        changes["sha256"] = hashlib.sha256(weights).hexdigest()
    document = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(document))
    return folder


def pickled(payload: object) -> bytes:
    return pickle.dumps(payload)


def saved_by_torch(payload: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, **options)
    return file.getvalue()


def torchscript(payload: object) -> bytes:
    """An archive of code, which torch.load would pass on to torch.jit.load, with the payload beside it."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/extra.pkl", pickle.dumps(payload))
    return file.getvalue()


EXECUTABLE = {
    "pickle": pickled,
    "torch.save": saved_by_torch,
    "an old torch.save": lambda payload: saved_by_torch(payload, _use_new_zipfile_serialization=False),
    "in a state dict": lambda payload: saved_by_torch({"model": {"fc.weight": payload}}),
    "TorchScript": torchscript,
}


@pytest.mark.parametrize("kind", EXECUTABLE)
def test_code_in_a_file_runs_in_no_loader(tmp_path, kind):
    executed, file = tmp_path / "executed", tmp_path / "weights.pth"
    file.write_bytes(EXECUTABLE[kind](Payload(executed)))
    with warnings.catch_warnings(record=True) as beside:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match=r"--weights .*is damaged, or holds more than tensors") as refused:
            load_weights(create_model("resnet8", 10), str(file))
    assert not beside and "weights_only" not in str(refused.value)  # torch advises to execute it
    for name in (".safetensors", ".pt", ".pth.tar"):
        with pytest.raises(UserError, match="is damaged"):
            load_weights(create_model("resnet8", 10), str(file.rename(tmp_path / f"w{name}")))
        (tmp_path / f"w{name}").rename(file)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(teacher(tmp_path / "t", file.read_bytes()))
    with pytest.raises(UserError, match="cannot be loaded as a checkpoint"):
        load_checkpoint(file, nn.Linear(1, 1), {}, {}, {}, set())
    assert not executed.exists()
    if kind == "TorchScript":
        torch.jit.load(file)
    else:  # the payload is alive
        pickle.loads(file.read_bytes()) if kind == "pickle" else torch.load(file, weights_only=False)
        assert executed.exists()


RECIPES = {
    "a call": "!!python/object/apply:os.mkdir ['{path}']",
    "a call as a value": "lr: !!python/object/apply:os.mkdir ['{path}']",
    "a module": "lr: !!python/module:antigravity",
    "a class to import": "method: gtn\npool: {{class_path: payload_of_a_recipe.Pool}}",
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_data(tmp_path, case, monkeypatch):
    """A `class_path` is jsonargparse's, which imports the module that it names, here one beside the recipe."""
    recipe = tmp_path / "r.yaml"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload_of_a_recipe.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    recipe.write_text(RECIPES[case].format(path=tmp_path / "executed"))
    done = here("train_teacher.py", "--config", recipe, "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["!!python/object/apply:os.mkdir ['executed']", "[" * 1000, "a: &a [*a]", "\0"])
def test_a_hostile_config_yaml_in_an_output_folder_is_nobodys_run(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="holds files that are no run's"):
        RunFolder(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["config.yaml"]


HEADERS = {
    "no end": struct.pack("<Q", 2**63) + b"{}",
    "longer than the file": struct.pack("<Q", 10**9) + b"{}",
    "deep nesting": struct.pack("<Q", 5000) + b"[" * 5000,
    "a tensor of exabytes": (lambda header: struct.pack("<Q", len(header)) + header)(
        b'{"fc.weight": {"dtype": "F32", "shape": [1000000000, 1000000000], "data_offsets": [0, 4000000000000000000]}}'
    ),
    "offsets outside": (lambda header: struct.pack("<Q", len(header)) + header)(
        b'{"fc.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4096, 4100]}}'
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_is_believed_nothing(tmp_path, case):
    file = tmp_path / "w.safetensors"
    file.write_bytes(HEADERS[case])
    with pytest.raises(UserError, match="is damaged"):
        load_weights(create_model("resnet8", 10), str(file))
    with pytest.raises(UserError, match="cannot be loaded as a checkpoint"):
        load_checkpoint(file, nn.Linear(1, 1), {}, {}, {}, set())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(teacher(tmp_path / "t", file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**9},
        {"image_size": 10**9},
        {"name": "wrn16_100000"},
        {"spec": NAS_STUDENTS["nas_s"] | {"layers": [NAS_STUDENTS["nas_s"]["layers"][0] | {"out": 10**9}]}},
    ],
    ids=str,
)
def test_a_model_json_that_asks_for_any_memory_or_the_network_is_refused(tmp_path, change):
    with pytest.raises(UserError):
        load_pretrained(teacher(tmp_path, **change))


def test_a_model_json_opens_no_other_file(tmp_path):
    """`--student SPEC.json` is the user's word; a name in a file is not."""
    (tmp_path / "spec.json").write_text(json.dumps(NAS_STUDENTS["nas_s"]))
    for name in (str(tmp_path / "spec.json"), "../spec.json"):
        with pytest.raises(UserError, match=r"model\.json: 'name' cannot be"):
            load_pretrained(teacher(tmp_path / "t", name=name))


@pytest.mark.parametrize("std", [[10**400, 1, 1], [float("inf"), 1, 1], [float("nan"), 1, 1]])
def test_a_normalisation_beyond_all_numbers_is_refused(std):
    with pytest.raises(UserError, match=r"model\.json: 'std' cannot be"):
        ModelInfo("resnet8", "digits", 10, 8, [0.5] * 3, std).check()


def test_anchors_are_read_as_models_are(tmp_path):
    """Whatever stands in the folder, a link out of it too, goes through the same loader and has to fit."""
    run, executed = teacher(tmp_path / "t"), tmp_path / "executed"
    teacher(tmp_path / "elsewhere", pickled(Payload(executed)))
    (run / "anchors").mkdir()
    (run / "anchors/0001").symlink_to(tmp_path / "elsewhere")
    (run / "anchors/.DS_Store").touch()
    with pytest.raises(UserError, match="cannot be loaded"):
        read_anchors([str(run)], load_pretrained(run))
    assert not executed.exists()


def test_weights_that_unpack_to_far_more_than_they_take_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(60_000_000))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"unpacks to 0\.1 GB"):
        load_weights(create_model("resnet8", 10), str(path))


@pytest.mark.parametrize("kind", ["torch.sparse_coo, torch.float32", "torch.strided, torch.complex64"])
def test_tensors_that_are_not_plain_are_refused(tmp_path, kind):
    """Of complex ones torch would drop the imaginary parts, and warn."""
    state = create_model("resnet8", 10).state_dict()
    odd = state["fc.weight"].to_sparse() if "sparse" in kind else state["fc.weight"].to(torch.complex64)
    torch.save(state | {"fc.weight": odd}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"'fc\.weight' is no plain tensor \({kind}\)"):
        load_weights(create_model("resnet8", 10), str(tmp_path / "w.pth"))


def test_timms_training_checkpoints_are_read(tmp_path):
    """They hold the options of the run as an argparse.Namespace, which is harmless."""
    torch.manual_seed(0)
    state = create_model("resnet8", 10).state_dict()
    torch.save(
        {"epoch": 3, "arch": "x", "state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth.tar"
    )
    model = create_model("resnet8", 10)
    load_weights(model, str(tmp_path / "w.pth.tar"))
    assert torch.equal(model.fc.weight, state["fc.weight"])


def png(side: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("cell", [{"bytes": None, "path": "secret.png"}, {"bytes": None, "path": "../secret.png"}])
def test_a_cell_with_a_path_opens_no_file(tmp_path, cell, monkeypatch):
    """Only where the user named a folder (--data_dir) may a path lead into it; never out of it, nor by a link."""
    inside = tmp_path / "data"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for place in (tmp_path, inside):
        (place / "secret.png").write_bytes(png(8))
    with pytest.raises(ValueError, match="holds a path"):
        from_cell(cell)
    if cell["path"].startswith(".."):
        (inside / "link.png").symlink_to(tmp_path / "secret.png")
        for path in (cell["path"], str(inside / cell["path"]), str(inside / "link.png")):
            with pytest.raises(ValueError, match="leads out of"):
                from_cell(cell | {"path": path}, str(inside))
    else:
        assert from_cell(cell, str(inside)).size == (8, 8)


def test_an_image_of_absurd_size_is_refused_before_it_is_unpacked():
    """A PNG of 13 KB whose header says 2^31 - 1 by 8 pixels; and no warning of Pillow's beside the line."""
    data = bytearray(png(8))
    data[16:20] = struct.pack(">I", 2**31 - 1)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match=r"--dataset: cannot read the image x: Image size .* exceeds limit"):
        read_rgb(lambda: from_cell(bytes(data)), "x")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_only_formats_of_photographs_are_decoded(kind):
    """Pillow goes by the content, and would hand an EPS file over to Ghostscript, a program of its own."""
    with pytest.raises(UserError, match=r"cannot read the image x\.png: it is none of JPEG, PNG"):
        read_rgb(lambda: from_cell(png(16, kind)), "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000"])
def test_those_are_decoded(kind):
    assert read_rgb(lambda: from_cell(png(16, kind)), "x").size == (16, 16)


PIPES = {
    "recipe": ("r.yaml", lambda path: read_recipe(str(path))),
    "spec": ("s.json", lambda path: create_model(str(path), 10)),
    "weights": ("w.pth", lambda path: load_weights(create_model("resnet8", 10), str(path))),
    "checkpoint": ("c.safetensors", lambda path: load_checkpoint(path, nn.Linear(1, 1), {}, {}, {}, set())),
    "model.json": ("model.json", lambda path: load_pretrained(path.parent)),
    "summary.json": ("summary.json", lambda path: Reference(str(path.parent))),
    "config.yaml": ("config.yaml", lambda path: RunFolder(path.parent)),
    "lock": (".lock", lambda path: RunFolder(path.parent).lock()),
    "parquet": ("x.parquet", lambda path: parquet_sources(str(path), None)),
    "image": ("a/x.png", lambda path: read_rgb(folder_sources(str(path.parents[1]))[0].row(0).open, "x")),
}


@pytest.mark.parametrize("kind", PIPES)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path, kind):
    name, read = PIPES[kind]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits"))
    signal.alarm(10)
    try:
        with pytest.raises(UserError):
            read(tmp_path / name)
    finally:
        signal.alarm(0)


def test_a_text_without_end_is_not_read_to_its_end():
    with pytest.raises(OSError, match="File too large"):
        read_text("/dev/zero")
    assert MOST_TEXT <= 2**26


def test_a_recipe_may_come_from_a_process():
    """bash's <(...) is a pipe, and a pipe can be read only once."""
    script = "import sys; from engine.recipe import read_recipe; print(read_recipe(sys.argv[1]))"
    done = command(["bash", "-c", f"{sys.executable} -c '{script}' <(sleep 0.1; echo 'lr: 0.3')"])
    assert done.stdout == "{'lr': 0.3}\n", done.stderr


@pytest.mark.parametrize(
    "name", ["wrn16_100000", "wrn100000_2", "densenet40_99999", "wrn16_" + "9" * 5000, "pool:" + "1" * 5000]
)
def test_networks_of_absurd_sizes_are_refused_before_anything_is_made(name):
    with pytest.raises(UserError, match="--model"):
        create_model(name, 10, argument="--model")
