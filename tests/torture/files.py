"""Files made by hand, or damaged: recipes, checkpoints, weights, specs, run folders, data sets, methods."""

import io
import json
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
import yaml
from PIL import Image

from engine.checkpoint import _digest
from models import create_model
from tests.runs import TINY_POOL
from tests.torture.runs import SIZE, Bases
from tests.torture.values import ODD_WORDS, damaged, mutated

TEACH = ["--model", "resnet8", *SIZE, "--epochs", "1"]
LEARN = ["--student", "resnet8", *SIZE, "--epochs", "1"]
RESUMED = ["--method", "gtn", "--model", "resnet8", *SIZE, "--epochs", "2", *TINY_POOL]
RECIPES = sorted(Path("recipes").glob("*.yaml"))
OWN = """
import torch
from losses.method import Method


class Own(Method):
    paper, usual = "mine", "1"
    terms = {"own": 1.0}

    def forward(self, student, teacher, batch):
        return {"own": (student.logits - teacher.logits).square().mean()}
"""


def recipe(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A recipe with a changed value, or damaged as text."""
    config = yaml.safe_load((bases.generic / "config.yaml").read_text())
    config = {key: value for key, value in config.items() if key != "output_dir" and value is not None}
    text = yaml.safe_dump(mutated(config, random, random.randint(1, 3)), allow_unicode=random.random() < 0.5)
    if random.random() < 0.4:
        text = damaged(text.encode(), random).decode("utf-8", "surrogateescape")
    if random.random() < 0.2:
        text = "".join(random.choice("-:?[]{}&*!|>'\"%@`#, \n\tab1~<") for _ in range(random.randint(1, 60)))
    (place / "r.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    return "train_teacher.py", ["--config", place / "r.yaml"]


def checkpoint(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """An unfinished run whose checkpoint was changed, with the right checksum or as bytes."""
    run = place / "run"
    shutil.copytree(bases.generic, run)
    for gone in ("summary.json", "model.safetensors", "model.json"):
        (run / gone).unlink()
    path = run / "checkpoints/last.safetensors"
    if random.random() < 0.25:
        path.write_bytes(damaged(path.read_bytes(), random))
    else:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            state = json.loads(file.metadata()["state"])
        if random.random() < 0.7:
            part = random.choice([*state, None])
            state = state | {part: mutated(state[part], random)} if part else mutated(state, random)
        else:
            tensors = _other_tensors(tensors, random)
        document = json.dumps(state)
        metadata = {"state": document, "sha256": _digest(tensors, document)}
        safetensors.torch.save_file(tensors, path, metadata)
    return "train_teacher.py", [*RESUMED, "--output_dir", run, "--resume_from_checkpoint", "latest"]


def weights(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A file of weights with changed tensors, wrapped or damaged."""
    state: dict = _other_tensors(create_model("resnet8", 10).state_dict(), random)
    path = place / f"w{random.choice(['.pth', '.pt', '.safetensors', '.pth.tar', '.bin', ''])}"
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: each.contiguous().clone() for name, each in state.items()}, path)
    else:
        wraps = [state, {"model": state}, {"state_dict": state, "epoch": 1}, {"model": {"model": state}}, [state]]
        wraps += [{1: torch.zeros(2)}, {}, {"model": None}, torch.zeros(3), {"model": {1: 2}}, state | {"x": None}]
        torch.save(random.choice(wraps), path, _use_new_zipfile_serialization=random.random() < 0.8)
    if random.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), random))
    if random.random() < 0.5:
        return "train_teacher.py", [*TEACH, "--weights", path]
    return "distill.py", ["--teacher", "resnet8", "--teacher_weights", path, *LEARN]


def spec(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A student's spec with a changed value, or damaged."""
    from models import find_spec
    from models.pool import Pool

    sizes = {"stem": 4, "head": 8, "candidates": ["res3x2", "identity", "zero"]}
    pool = Pool(**sizes, widths=[4, 4, 4, 8, 8, 8], strides=[1, 1, 1, 2, 2, 1])
    document = mutated(find_spec(f"pool:{random.randrange(99)}", pool), random, random.randint(0, 2))
    text = json.dumps(document)
    path = place / "s.json"
    path.write_bytes(damaged(text.encode(), random) if random.random() < 0.3 else text.encode())
    if random.random() < 0.5:
        return "distill.py", ["--teacher", bases.teacher, *LEARN, "--student", path]
    return "train_teacher.py", ["--method", "gtn", *TEACH, *TINY_POOL, "--pool_students", path, "pool:2"]


def teacher(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A run folder in which a file was changed, removed, emptied or made a folder; as each kind of input."""
    run = place / "teacher"
    source = random.choice([bases.teacher, bases.generic])
    shutil.copytree(source, run)
    names = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml")]
    names += [run / "model.safetensors"]
    path = random.choice(names)
    way = random.random()
    if way < 0.6 and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), random)))
    elif way < 0.6 and path.suffix == ".jsonl":
        rows = mutated([json.loads(line) for line in path.read_text().splitlines()], random)
        path.write_text("\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])))
    elif way < 0.8:
        path.write_bytes(damaged(path.read_bytes(), random))
    else:
        path.unlink()
        if way < 0.87:
            path.mkdir()
        elif way < 0.94:
            path.symlink_to(path)
    return random.choice([
        ("distill.py", ["--teacher", run, *LEARN]),
        ("distill.py", ["--teacher", run, *LEARN, "--method", "rco"]),
        ("distill.py", ["--teacher", run, *LEARN, "--student", "pool:1"]),
        ("train_teacher.py", ["--weights", run, *SIZE, "--epochs", "1"]),
        ("train_teacher.py", [*TEACH, "--vanilla_run", run]),
        ("train_teacher.py", [*TEACH, "--output_dir", run, "--resume_from_checkpoint", "latest"]),
        ("distill.py", ["--method", "none", *LEARN, "--student", run / "model.json"]),
        ("distill.py", ["--method", "none", *LEARN, "--weights", run]),
    ])  # fmt: skip


def image_folder(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A folder of images, some of them odd."""
    root = place / "images"
    for label in range(random.choice([0, 1, 2, 2, 3])):
        folder = root / random.choice(["", "", "train"]) / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(random.choice([0, 1, 6, 12])):
            (folder / f"{number}{random.choice(['.png'] * 8 + ['.jpg', '.txt', '', '.PNG', '.gif'])}").write_bytes(
                picture(random)
            )
        if random.random() < 0.2:
            (folder / random.choice(["inner", "a.png", ".DS_Store"])).mkdir(exist_ok=True)
    root.mkdir(exist_ok=True)
    if random.random() < 0.2:
        (root / random.choice(["loop", "class0", "x.png"])).with_suffix(".png").symlink_to(root / "nowhere")
    more = ["--pipeline", random.choice(["auto", "device", "workers"]), "--data_workers", random.choice(["0", "1"])]
    size = ["--image_size", "8", "--batch_size", "4", "--epochs", "1"]
    return "train_teacher.py", ["--model", "resnet8", *size, "--dataset", f"folder:{root}", *more]


def parquet(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A parquet file with odd columns, labels or images."""
    count = random.choice([0, 1, 5, 30, 30])
    images = [{"bytes": picture(random) if random.random() < 0.5 else png(), "path": None} for _ in range(count)]
    labels: list = [number % 3 for number in range(count)]
    if count and random.random() < 0.5:
        odd = [-1, 7, 2**40, 2**63 - 1, None, 1.5, float("nan"), "a", True, [1], {"a": 1}]
        labels[random.randrange(count)] = random.choice(odd)
    if random.random() < 0.2:
        images = random.choice([[b"x"] * count, ["x"] * count, [None] * count, list(range(count))])
    names = [("image", "label")] * 6 + [("img", "label"), ("label", "image"), ("x", "y"), ("image", "fine_label")]
    try:
        table = pyarrow.table(dict(zip(random.choice(names), (images, labels), strict=True)))
    except (pyarrow.ArrowException, OverflowError):
        table = pyarrow.table({"image": images, "label": list(map(str, labels))})
    path = place / random.choice(["x.parquet", "x-train.parquet"])
    pyarrow.parquet.write_table(table, path)
    if random.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), random))
    size = ["--image_size", "8", "--batch_size", "4", "--epochs", "1", "--cache_dir", place / "cache"]
    more = ["--streaming"] if random.random() < 0.2 else []
    return "train_teacher.py", ["--model", "resnet8", *size, "--dataset", f"parquet:{place}/*.parquet", *more]


def own_method(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A method in a file of the user's, with a line lost or changed."""
    lines = OWN.splitlines()
    at = random.randrange(1, len(lines))
    other = ["", "    raise RuntimeError('mine')", "x = 1 / 0", "import nothing_there", "        return {}", "\t  )"]
    other += [
        "        return None",
        "        return {'own': 1}",
        "        return {'own': student.logits}",
        "    terms = 3",
    ]
    other += [
        "        return {'other': student.logits.sum()}",
        "    terms = {'own': 'x'}",
        "    terms = {'own': float('nan')}",
    ]
    lines[at] = random.choice(other)
    (place / "own.py").write_text("\n".join(lines))
    name = random.choice(["Own"] * 5 + ["Missing", "", "Method", *ODD_WORDS[:6]])
    return "distill.py", ["--teacher", bases.teacher, *LEARN, "--method", f"{place}/own.py:{name}"]


def output(random: random.Random, place: Path, bases: Bases) -> tuple[str, list]:
    """A folder for the run that cannot be, or holds something else."""
    target = place / "out"
    kind = random.randrange(6)
    if kind == 0:
        target.write_text("a file")
    elif kind == 1:
        target.symlink_to(place / "nowhere")
    elif kind == 2:
        target.mkdir()
        (target / random.choice(["notes.txt", "config.yaml", "checkpoints", ".lock", "model.json"])).mkdir()
    elif kind == 3:
        (target / "config.yaml").parent.mkdir()
        config = mutated(yaml.safe_load((bases.teacher / "config.yaml").read_text()), random)
        (target / "config.yaml").write_text(yaml.safe_dump(config))
    elif kind == 4:
        target = place / ("x" * 300)
    else:
        target = Path(random.choice(["/dev/null", "/proc/x", "/sys/x", "/dev/null/x", "/proc/self/fd/x"]))
    more = random.choice([[], ["--overwrite"], ["--resume_from_checkpoint", "latest"], ["--with_tracking"]])
    return "train_teacher.py", [*TEACH, "--output_dir", target, *more]


def picture(random: random.Random) -> bytes:
    """An image file: mostly a right one, of any size and mode, else damaged or none at all."""
    mode = random.choice(["RGB"] * 6 + ["L", "1", "P", "RGBA", "LA", "I;16", "CMYK", "F"])
    size = random.choice([(8, 8)] * 6 + [(1, 1), (1, 300), (200, 3), (9, 8)])
    buffer = io.BytesIO()
    image = Image.new(mode, size)
    image.save(buffer, "TIFF" if mode in ("CMYK", "F") else "PNG")
    data = buffer.getvalue()
    return damaged(data, random) if random.random() < 0.15 else data


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _other_tensors(tensors: dict, random: random.Random) -> dict:
    """A state dict in which one tensor is of another kind, shape, name or content."""
    tensors, name = dict(tensors), random.choice(sorted(tensors))
    tensor = tensors[name]
    changes = [
        lambda: tensors.pop(name),
        lambda: tensors.update(
            {name: tensor.to(random.choice([torch.float64, torch.float16, torch.int32, torch.bool]))}
        ),
        lambda: tensors.update({name: tensor.reshape(-1)[:-1].clone()}),
        lambda: tensors.update({name: tensor[None].clone()}),
        lambda: tensors.update({name: torch.full_like(tensor, 3) / 0}),
        lambda: tensors.update({name: torch.zeros(0)}),
        lambda: tensors.update({name: torch.zeros(())}),
        lambda: tensors.update({name + random.choice(["x", ".weight", "/0"]): tensor.clone()}),
        lambda: tensors.update({name: tensor.to(torch.complex64)}),
        lambda: tensors.update({name: tensor.to(torch.bfloat16)}),
        lambda: None,
    ]
    random.choice(changes)()
    return tensors


MADE = {
    each.__name__: each
    for each in (recipe, checkpoint, weights, spec, teacher, image_folder, parquet, own_method, output)
}
