"""Every option of both scripts, at a value that is not its default, followed to what it changes in the run.

A script runs up to the point where training would begin. An option that is in no table below, and not among the
exceptions with the test that has it, fails `test_no_option_is_forgotten`.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.batch import Batch
from data.datasets import load_images
from distill import DistillConfig
from engine.command_line import parse
from engine.loop import Loop
from engine.schedule import learning_rate
from models import ModelInfo, create_model, save_pretrained
from models.pool import Pool
from objectives.distillation import Distillation
from tests.runs import here, succeeded
from train_teacher import TeacherConfig

CONFIGS = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}
Table = dict[str, tuple[str, Callable[[Loop], object], object]]  # option: (value as typed, what it changes, to what)


def weights(loop: Loop) -> dict:
    return loop.objective.term_weights


def student_or_teacher(loop: Loop) -> torch.nn.Module:
    return loop.objective.trained_model()


def first_weights(name: str, seed: int) -> list[float]:
    torch.manual_seed(seed)
    return create_model(name, 10).conv1.weight.flatten()[:5].tolist()


def sgd(key: str) -> Callable[[Loop], object]:
    return lambda loop: loop.optimizers["weights"].param_groups[0][key]


def rates(loop: Loop) -> list[float]:
    return [round(learning_rate(loop.config, epoch), 9) for epoch in range(8)]


RATES = [0.06, 0.03, 0.03, 0.015] * 2  # twice through half of eight epochs, from 0.03 times 100 over 50

COMMON: Table = {
    "seed": ("4", lambda loop: (loop.train.seed, student_or_teacher(loop).conv1.weight.flatten()[:5].tolist()),
             (4, first_weights("resnet14", 4))),
    "image_size": ("12", lambda loop: loop.train.one(0).images.shape[-1], 12),
    "batch_size": ("100", lambda loop: len(loop.train.one(0).labels), 100),
    "gradient_accumulation_steps": ("2", lambda loop: len(loop._gradients(loop.train.one(0))), 2),
    "epochs": ("8", rates, RATES),
    "lr": ("0.03", rates, RATES),
    "lr_batch_size": ("50", rates, RATES),
    "lr_schedule": ("multistep", rates, RATES),
    "lr_milestones": ("1 3", rates, RATES),
    "lr_gamma": ("0.5", rates, RATES),
    "lr_restarts": ("2", rates, RATES),
    "stop_after": ("3", lambda loop: loop.config.last_epoch, 3),
    "momentum": ("0.7", sgd("momentum"), 0.7),
    "weight_decay": ("0.002", sgd("weight_decay"), 0.002),
    "nesterov": ("true", sgd("nesterov"), True),
    "crop_padding": ("3", lambda loop: int(loop.train.plan(0).offsets.max()), 6),
    "flip": ("true", lambda loop: 0.4 < loop.train.plan(0).flips.float().mean() < 0.6, True),
    "cutout": ("2", lambda loop: loop.train.augmentation.cutout, 2),
    "exclude_classes": ("3 5", lambda loop: sorted(set(range(10)) - set(loop.train.split.labels.tolist())), [3, 5]),
    "train_fraction": ("0.4", lambda loop: len(loop.train.split) + len(loop.val), pytest.approx(0.4 * 1144, abs=9)),
    "val_fraction": ("0.25", lambda loop: len(loop.val) / len(loop.train.split), pytest.approx(1 / 3, abs=0.02)),
    "mixed_precision": ("bf16", lambda loop: loop.accelerator.mixed_precision, "bf16"),
    "process_timeout": ("77", lambda loop: loop.accelerator.init_handler.timeout, timedelta(seconds=77)),
    "output_dir": ("{folder}/run", lambda loop: loop.folder.path.name, "run"),
    "overwrite": ("true", lambda loop: loop.folder.overwrite, True),
    "resume_from_checkpoint": ("latest", lambda loop: loop.folder.resume, "latest"),
}  # fmt: skip
PLACES: Table = {  # images in files, decoded by workers
    "dataset": ("folder:{images}", lambda loop: student_or_teacher(loop).fc.out_features, 2),
    "augment": ("resized_crop", lambda loop: loop.train.augmentation.kind, "resized_crop"),
    "pipeline": ("workers", lambda loop: type(loop.train).__name__, "WorkerLoader"),
    "data_workers": ("0", lambda loop: loop.train.workers, 0),
}
MODERN: Table = {
    "aa": ("trivialaugment", lambda loop: loop.train.augmentation.policy, "trivialaugment"),
    "reprob": ("0.4", lambda loop: loop.train.augmentation.erasing, 0.4),
    "opt": ("adamw", lambda loop: type(loop.optimizers["weights"]).__name__, "AdamW"),
    "lr_warmup_epochs": ("3", lambda loop: learning_rate(loop.config, 0), 0.05 / 4),
    "model_ema_decay": ("0.97", lambda loop: loop.objective.average.decay, 0.97),
}
WEIGHTS: Table = {
    "weights": ("{file}", lambda loop: student_or_teacher(loop).fc.weight[0, :3].tolist(), [0.25] * 3),
}


def joint(loop: Loop) -> tuple[float, list[float]]:
    """The KL of two branches on logits that are fixed here, and its gradient for the teacher's first image."""
    branches, teacher = LOGITS[:2], LOGITS[2].clone().requires_grad_()
    term = loop.objective.joint_terms(branches, teacher, Batch(teacher, LABELS))["branch_kl"]
    (gradient,) = torch.autograd.grad(term, teacher)
    return round(term.item(), 7), [round(value, 7) for value in gradient[0].tolist()]


LOGITS = torch.sin(torch.arange(3 * 4 * 10, dtype=torch.float64)).view(3, 4, 10)
LABELS = torch.tensor([1, 7, 2, 2])


def expected_joint() -> tuple[float, list[float]]:
    """At temperature 2, KL(teacher || branch); half of its gradient."""
    teacher = LOGITS[2].clone().requires_grad_()
    p, qs = ((each / 2).log_softmax(-1) for each in (teacher, LOGITS[:2]))
    kl = (p.exp() * (p - qs)).sum(-1).mean()
    gradient = torch.autograd.grad(kl, teacher)[0][0]
    return round(kl.item(), 7), [round(value, 7) for value in (0.5 * gradient).tolist()]


def frozen(loop: Loop) -> list[bool]:
    found = []
    for epoch in (0, 1):
        loop.objective.begin_epoch(epoch)
        found.append(any(parameter.requires_grad for parameter in loop.objective.teacher.parameters()))
    return found


def gate_candidates(loop: Loop) -> int:
    draws = loop.objective.gates.draw_gate_step(torch.Generator().manual_seed(0))
    return max(len(draw.candidates) for draw in draws)


def first_block(loop: Loop) -> int:
    parts = loop.objective.teacher.blocks[0].modules()
    return sum(isinstance(part, torch.nn.Conv2d) and part.kernel_size != (1, 1) for part in parts)


def saved_supernet(loop: Loop) -> bool:
    loop.objective.save_beside(loop.folder.path)
    return (loop.folder.path / "supernet.safetensors").is_file()


def anchors(loop: Loop) -> list[str]:
    for epoch in range(1, 7):
        loop.after_epoch(epoch, {"accuracy": {"teacher": 0.0}})
    return sorted(path.name for path in (loop.folder.path / "anchors").iterdir())


BRANCHES: Table = {  # of SFTN and of GTN
    "teacher_weight": ("1.5", lambda loop: weights(loop)["teacher_ce"], 1.5),
    "branch_weight": ("0.75", lambda loop: weights(loop)["branch_ce"], 0.75),
    "alpha": ("2", lambda loop: weights(loop)["branch_kl"], 2.0),
    "freeze_teacher_epochs": ("1", frozen, [False, True]),
    "temperature": ("2", joint, expected_joint()),
    "kl_direction": ("forward", joint, expected_joint()),
    "teacher_kl_share": ("0.5", joint, expected_joint()),
    "branches": ("1 3", lambda loop: [*loop.objective.predict(loop.train.one(0).images, 0)],
                 ["teacher", "branch1", "branch3"]),
    "teacher_cut": ("depth", first_block, 3),  # convolutions of 13; a stage ends after the first
}  # fmt: skip
SFTN: Table = {"method": ("sftn", lambda loop: type(loop.objective).__name__, "SFTN"), **BRANCHES}
SFTN |= {
    "model": ("resnet14", lambda loop: len(loop.objective.teacher.layer1), 2),
    "student": ("resnet8x2", lambda loop: loop.objective.branches[0][-1][-1].in_features, 128),
}
PLAIN_SUM = {"teacher_ce": 1.0, "branch_ce": 1.0, "branch_kl": 2.0}
PLAIN: Table = {  # where alpha is what it is from the start
    "method": ("sftn", weights, PLAIN_SUM),
    "student": ("resnet8", weights, PLAIN_SUM),
    "alpha": ("2", weights, PLAIN_SUM),
}
GTN: Table = {"method": ("gtn", lambda loop: type(loop.objective).__name__, "GTN"), **BRANCHES}
GTN |= {
    "model": ("resnet14", lambda loop: len(loop.objective.teacher.layer1), 2),
    "alpha_phi": ("-0.5", lambda loop: weights(loop)["gate_kl"], -0.5),
    "gate_every": ("3", lambda loop: [i for i in range(7) if loop.objective.phase(i)], [2, 5]),
    "gate_steps": ("add", lambda loop: loop.objective.phases[0].additional, True),
    "gate_lr": ("0.01", lambda loop: loop.optimizers["gates"].param_groups[0]["lr"], 0.01),
    "full_gates": ("true", gate_candidates, 3),
    "paths": ("one", lambda loop: len(loop.objective.gates.counts), 5),  # those of the longest branch, not of all
    "share_branches": ("true", lambda loop: len({id(b.supernet.fc) for b in loop.objective.branches}), 1),
    "save_supernet": ("true", saved_supernet, True),
    "pool": ("", lambda loop: loop.objective.branches[1].supernet.head[0].out_channels, 6),
}
SMALL_POOL = Pool(stem=4, head=6, widths=[4, 4, 4, 6, 6, 6], strides=[1, 1, 1, 2, 2, 1],
                  candidates=["res3x2", "identity", "zero"])  # fmt: skip
POOL = "--pool.stem 4 --pool.head 6 --pool.widths 4 4 4 6 6 6 --pool.strides 1 1 1 2 2 1 "
POOL += "--pool.candidates res3x2 identity zero"


def offered(seeds: tuple[int, ...]) -> list[list[str]]:
    """What these members of the pool take in each layer behind its first block."""
    choices = [[layer["type"] for layer in SMALL_POOL.sample(seed)["layers"][2:-2]] for seed in seeds]
    return [list(dict.fromkeys(names)) for names in zip(*choices, strict=True)]


STUDENTS: Table = {
    "method": ("gtn", lambda loop: len(loop.objective.phases), 1),
    "gate_holdout": ("0.1", lambda loop: (len(loop.objective.phases[0].split), len(loop.train.split)), (144, 1293)),
    "pool_students": (
        "pool:1 pool:2",
        lambda loop: [[name[:3] if name.startswith("res") else name for name in layer.names]
                      for layer in loop.objective.branches[0].supernet.layers],
        offered((1, 2)),
    ),
}  # fmt: skip
TWO_CLASSES: Table = {
    "binary": ("2 5 7", lambda loop: (student_or_teacher(loop).fc.out_features, loop.test.labels.sum().item()),
               (2, (load_images("digits", 8).test.labels[:, None] == torch.tensor([2, 5, 7])).sum().item())),
}  # fmt: skip
SCHEDULE: Table = {
    "schedule": ("2/6", lambda loop: (loop.config.epochs, rates(loop)[:6]),
                 (6, [0.05] * 2 + [0.005] * 2 + [0.0005] * 2)),
    "anchors": ("2", anchors, ["0003", "0006"]),
    "smoothing": ("0.2", lambda loop: smoothed(loop), True),
}  # fmt: skip


def smoothed(loop: Loop) -> bool:
    batch = loop.train.one(0)
    logits = loop.objective.teacher(batch.images).detach()
    found = loop.objective(batch, 0)["ce"].item()
    return found == pytest.approx(F.cross_entropy(logits, batch.labels, label_smoothing=0.2).item(), rel=1e-5)


def terms(loop: Loop) -> dict[str, float]:
    loop.objective.begin_epoch(0)
    loop.objective.eval()
    return {name: round(value.item(), 4) for name, value in loop.objective(loop.train.one(0), 0).items()}


def kl_at(temperature: float) -> Callable[[Loop], bool]:
    """Whether the loss's KL is the one between teacher and student at this temperature."""

    def compare(loop: Loop) -> bool:
        objective: Distillation = loop.objective
        found, images = terms(loop)["kl"], loop.train.one(0).images
        p, q = ((net(images) / temperature).log_softmax(1) for net in (objective.frozen[0], objective.student))
        return found == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), abs=1e-4)

    return compare


TAUGHT = "--teacher {teacher} --student resnet8"
KD: Table = {
    "student": ("resnet14", lambda loop: len(loop.objective.student.layer1), 2),
    "teacher": ("{teacher}", lambda loop: loop.objective.frozen[0].fc.weight[0, :3].tolist(), [0.25] * 3),
    "alpha": ("0.3", weights, pytest.approx({"ce": 0.7, "kl": 0.3 * 9})),
    "temperature": ("3", kl_at(3.0), True),
    "cache_teacher": ("memory", lambda loop: loop.objective.cache_logits, True),
    "stop_kd_epoch": ("3", lambda loop: loop.objective.stop_kd_epoch, 3),
}
STORED: Table = {
    "cache_teacher": ("disk", lambda loop: loop.objective.cache_logits, False),
    "cache_views": ("2", lambda loop: (loop.train.cycle, loop.objective.stored_logits.views), (2, 2)),
    "cache_folder": ("{folder}/logits", lambda loop: loop.objective.stored_logits.place.name, "logits"),
    "cache_top_k": ("3", lambda loop: loop.objective.stored_logits.top_k, 3),
}
SUM = pytest.approx({"ce": 0.6, "kl": 0.4 * 9, "at": 10.0, "dkd_target": 0.5 * 2 * 9, "dkd_others": 0.5 * 5 * 9})
JOINED: Table = {
    "method": ("at+dkd", weights, SUM),
    "method_weights": ("10 0.5", weights, SUM),
    "ce_weight": ("0.6", weights, SUM),
    "kd_weight": ("0.4", weights, SUM),
    "temperature": ("3", kl_at(3.0), True),
    "dkd_alpha": ("2", weights, SUM),
    "dkd_beta": ("5", weights, SUM),
}
WARMUP: Table = {
    "method": ("ft", lambda loop: type(loop.objective.methods[1]).__name__, "FT"),
    "warmup_epochs": ("3", lambda loop: loop.warmup, 3),
    "unlabeled": (
        "folder:{images}",
        lambda loop: sorted(set(loop.train.unlabeled.split.indices.tolist())),
        [*range(40)],
    ),
    "unlabeled_ratio": ("2", lambda loop: (next(loop.train.epoch(0)).labels == -100).sum().item(), 128),
}
PEERS: Table = {
    "method": ("dml", lambda loop: type(loop.objective).__name__, "Peers"),
    "peers": ("resnet14 resnet8x2", lambda loop: [len(p.layer1) for p in loop.objective.peers], [1, 2, 1]),
    "kd_weight": ("0.3", weights, {"ce": 1.0, "kl": 0.3}),
}
NAMED: Table = {
    "teacher_weights": ("{file}", lambda loop: loop.objective.frozen[0].fc.weight[0, :3].tolist(), [0.25] * 3),
    "teacher_mean": ("0.1 0.2 0.3", lambda loop: loop.objective.frozen[0].info.mean, [0.1, 0.2, 0.3]),
    "teacher_std": ("0.4 0.5 0.6", lambda loop: loop.objective.frozen[0].info.std, [0.4, 0.5, 0.6]),
    "teacher_image_size": (
        "16",
        lambda loop: loop.objective.frozen[0].prepared(loop.train.one(0).images).shape[2:],
        (16, 16),
    ),
    "teacher_interpolation": ("nearest", lambda loop: loop.objective.frozen[0].interpolation, "nearest"),
    "teacher_classes": ("{classes}", lambda loop: loop.objective.frozen[0].order.tolist(), list(range(10))[::-1]),
    "student": ("pool:3", lambda loop: loop.objective.student.fc.in_features, 6),
    "pool": ("", lambda loop: loop.objective.student.stem[0].out_channels, 4),
}

# (script, what else is typed, table)
SETTINGS = {
    "teachers": ("train_teacher.py", "--model resnet14", COMMON),
    "teachers-images": ("train_teacher.py", "--model resnet8 --image_size 16 --batch_size 8", PLACES),
    "teachers-weights": ("train_teacher.py", "--model resnet8 --image_size 8", WEIGHTS),
    "teachers-classes": ("train_teacher.py", "--model resnet8 --image_size 8", TWO_CLASSES),
    "students-classes": ("distill.py", "--method none --student resnet8 --image_size 8", TWO_CLASSES),
    "schedule": ("train_teacher.py", "--model resnet8 --image_size 8", SCHEDULE),
    "sftn": ("train_teacher.py", "--image_size 8 --batch_size 16", SFTN),
    "sftn-plain": ("train_teacher.py", "--model resnet8 --image_size 8", PLAIN),
    "gtn": ("train_teacher.py", f"--image_size 8 --batch_size 16 {POOL}", GTN),
    "gtn-students": ("train_teacher.py", f"--model resnet8 --image_size 8 {POOL}", STUDENTS),
    "students": ("distill.py", "--method none --student resnet14", COMMON),
    "teachers-modern": ("train_teacher.py", "--model resnet8 --image_size 8", MODERN),
    "students-modern": ("distill.py", "--method none --student resnet8 --image_size 8", MODERN),
    "students-images": ("distill.py", "--method none --student resnet8 --image_size 16 --batch_size 8", PLACES),
    "students-weights": ("distill.py", "--method none --student resnet8 --image_size 8", WEIGHTS),
    "kd": ("distill.py", "--crop_padding 0", KD),
    "stored": ("distill.py", TAUGHT, STORED),
    "joined": ("distill.py", TAUGHT, JOINED),
    "warm-up": ("distill.py", TAUGHT, WARMUP),
    "peers": ("distill.py", "--student resnet8 --image_size 8", PEERS),
    "teacher-by-name": ("distill.py", f"--teacher resnet8 --image_size 8 {POOL}", NAMED),
}
ELSEWHERE = {  # option: the test that follows it, as here it would need more than a run that begins
    "clip_grad": "test_modern.py: the step's length is that of gradients scaled to the norm",
    "mixup": "test_modern.py: what pixels and labels are mixed of",
    "cutmix": "test_modern.py: the same",
    "data_dir": "test_pipelines.py: a set by name from a local copy",
    "image_column": "test_hub_sets.py: columns and splits are chosen",
    "label_column": "test_hub_sets.py: the same",
    "split_train": "test_hub_sets.py: the same",
    "split_test": "test_hub_sets.py: the same",
    "cache_dir": "test_pipelines.py: the same",
    "offline": "test_data.py: cifar without a network",
    "streaming": "test_pipelines.py: a stream holds every image once",
    "checkpointing_epochs": "test_training.py: what a checkpoint holds after each epoch",
    "freeze": "test_freezing.py: what stays as it came",
    "evaluation_epochs": "test_training.py: what is evaluated",
    "compile": "test_compiled.py: regions are compiled",
    "cuda_graph": "test_loop.py: needs a GPU, else is refused",
    "kernels": "test_kd.py: the choice of implementation says what it did",
    "students": "test_together.py: each student is as if it were alone",
    "methods": "test_together.py: the same",
    "teacher_stages": "test_foreign.py: maps of named submodules, and a run with them",
    "student_stages": "test_foreign.py: the same",
    "pretrained": "test_weights.py: published weights come from torch's cache",
    "vanilla_run": "test_scripts.py: a teacher behind the vanilla one is reported",
    "with_tracking": "test_options.py: tensorboard gets the project and the options",
    "report_to": "test_options.py: the same; the only tracker that is installed is the default",
    "tracker_project_name": "test_options.py: the same",
    "run_name": "test_options.py: trackers call a run as they are told, or as its folder",
}


class Begun(Exception):  # noqa: N818 - not an error
    """Training would begin."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A trained teacher, the file of its weights, and images in folders."""
    folder = tmp_path_factory.mktemp("places")
    teacher = create_model("resnet8", 10)
    teacher.fc.weight.data.fill_(0.25)
    info = ModelInfo("resnet8", "digits", 10, 8, [0.5] * 3, [0.25] * 3)
    (folder / "teacher").mkdir()
    save_pretrained(teacher, info, folder / "teacher")
    safetensors.torch.save_file(teacher.state_dict(), folder / "own.safetensors")
    generator = np.random.default_rng(0)
    for number in range(40):
        place = folder / "images" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place)
    (folder / "classes.json").write_text(json.dumps({str(digit): 9 - digit for digit in range(10)}))
    files = {"file": folder / "own.safetensors", "classes": folder / "classes.json"}
    return {"teacher": folder / "teacher", "images": folder / "images", **files}


def begin(script: str, words: list[str], monkeypatch) -> Loop:
    """The loop of a run that would now train."""
    begun = []

    def run(loop):
        begun.append(loop)
        raise Begun

    monkeypatch.setattr(Loop, "run", run)
    with pytest.raises(Begun):
        raise AssertionError(succeeded(here(script, *words)).stdout)
    return begun[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_options_arrive(name, places, tmp_path, monkeypatch):
    script, more, table = SETTINGS[name]
    typed = [word for option, (value, *_) in table.items() if value for word in (f"--{option}", *value.split())]
    words = [word.format(folder=tmp_path, **places) for word in (*more.split(), *typed)]
    words += [] if "output_dir" in table else ["--output_dir", str(tmp_path / "run")]
    loop, config = begin(script, words, monkeypatch), parse(CONFIGS[script], "", {}, words)
    (tmp_path / "run").mkdir(exist_ok=True)
    for option, (_, found, expected) in table.items():
        assert getattr(config, option) != default(CONFIGS[script], option), f"--{option}: is at its default"
        assert found(loop) == expected, f"--{option}"


def default(config_class: type, option: str) -> object:
    each = config_class.__dataclass_fields__[option]
    return each.default if each.default_factory is MISSING else each.default_factory()


@pytest.mark.parametrize("script", CONFIGS)
def test_no_option_is_forgotten(script):
    followed = {option for at, _, table in SETTINGS.values() if at == script for option in table}
    every = {each.name for each in fields(CONFIGS[script])}
    assert every - followed - ELSEWHERE.keys() == set(), "give each a row in a table, at a value that it changes"
    assert not followed & ELSEWHERE.keys() and ELSEWHERE.keys() <= {
        each.name for config in CONFIGS.values() for each in fields(config)
    }


def test_colour_images_are_normalised_by_channel(tmp_path, monkeypatch):
    """Three channels of unlike means and deviations: what networks see of the training split has 0 and 1 in each."""
    generator = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        colours = generator.normal((60, 120, 200), (10, 30, 15), (8, 8, 3)).clip(0, 255)
        Image.fromarray(colours.astype(np.uint8)).save(place)
    words = ["--dataset", f"folder:{tmp_path}/images", "--model", "resnet8", "--crop_padding", 0, "--batch_size", 48]
    loop = begin("train_teacher.py", [*map(str, words), "--output_dir", str(tmp_path / "run")], monkeypatch)
    seen: Tensor = torch.cat([batch.images for batch in loop.train.epoch(0)])
    assert len(seen) == 48
    assert seen.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 3, abs=1e-3)
    assert seen.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 3, abs=1e-3)
