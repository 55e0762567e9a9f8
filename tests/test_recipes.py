"""The papers' tables: every row's commands are understood, name what there is, and hold the papers' figures."""

import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch

from common import UserError
from distill import DistillConfig
from engine.command_line import parse
from losses.registry import find_methods
from models import create_model
from objectives.registry import TEACHERS
from recipes import Row, Teacher, table, tables
from train_teacher import TeacherConfig

ROOT = Path(__file__).parents[1]
CONFIGS = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}
PLACES = ("--output_dir", "--teacher", "--weights")  # any words to the parsers,
NETWORKS = ("--model", "--student", "--peers")  # and so are these


def commands() -> list[str]:
    return list(dict.fromkeys(each for one in tables().values() for each in one.commands()))


def split(command: str, without: tuple[str, ...] = PLACES) -> tuple[str, list[str], dict[str, str]]:
    """(script, arguments but those `without`, the words of those); all have one word."""
    _, script, *words = shlex.split(command)
    taken = {flag: word for flag, word in pairwise(words) if flag in without}
    return script, [word for word in words if word not in taken and word not in taken.values()], taken


def understood(command: str) -> TeacherConfig | DistillConfig:
    script, arguments, _ = split(command)
    return parse(CONFIGS[script], "", {}, arguments)


def test_every_command_is_understood_and_names_networks_and_methods_that_there_are(monkeypatch):
    """Commands that differ in places and networks alone are one to the parsers."""
    monkeypatch.chdir(ROOT)
    networks, known = set(), {}
    for command in commands():
        script, arguments, names = split(command, PLACES + NETWORKS)
        if (key := (script, *arguments)) not in known:
            config = known[key] = understood(command)
            assert config.method in TEACHERS if script == "train_teacher.py" else find_methods(config.method)
        networks |= {(names[flag], known[key].dataset) for flag in NETWORKS if flag in names}
    assert len(networks) > 50
    with torch.device("meta"):
        for name, dataset in networks:
            assert len(create_model(name, 100, image_size=224 if "imagenet" in dataset else 32).blocks) == 4


def test_a_run_folder_holds_one_run_whose_teacher_is_trained_before():
    for name, each in tables().items():
        places = {}
        for command in each.commands("out", ["--seed", "3"]):
            words = shlex.split(command)
            options = dict(pairwise(words))
            assert words[:3] == ["python", words[1], "--config"] and words[-2:] == ["--seed", "3"]
            assert options["--output_dir"].startswith("out/") and len(options["--output_dir"].split("/")[-1]) < 200
            assert places.setdefault(options["--output_dir"], command) == command
            assert all(options.get(flag, command) in (command, *places) for flag in ("--teacher", "--weights")), name
        for row in each.rows:
            assert row.folder("out") in places and shlex.split(row.commands("out")[-1])[-1] == row.folder("out")
    folders = [shlex.split(command)[-1] for command in commands()]
    assert len(set(folders)) == len(folders)


def test_settings_are_those_of_the_recipes_of_gtn(monkeypatch):
    monkeypatch.chdir(ROOT)
    for model in ("resnet32", "wrn40_2"):
        for method in ("vanilla", "gtn"):
            (command,) = Teacher("cifar100", model, method).commands()
            assert understood(command) == parse(
                TeacherConfig, "", {}, ["--config", f"recipes/cifar100_{model}_{method}.yaml"]
            )


def parsed(row: Row) -> tuple[TeacherConfig, DistillConfig] | tuple[TeacherConfig]:
    """The teacher's options and the student's."""
    return tuple(map(understood, row.commands()))


def rows(name: str, **wanted: object) -> list[Row]:
    return [row for row in table(name).rows if all(getattr(row, key) == value for key, value in wanted.items())]


def test_options_that_the_papers_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    for row, alpha, tau, lr, kd in (
        (rows("sftn/5")[0], 1.0, 1.0, 0.01, None),
        (rows("sftn/5")[6], 1.0, 5.0, 0.05, None),
        (rows("sftn/6")[6], 3.0, 1.0, 0.05, None),
        (rows("sftn/2", method="vid")[1], 3.0, 1.0, 0.01, 1.0),
        (rows("sftn/3", method="crd")[1], 1.0, 1.0, 0.1, None),
    ):
        teacher, student = parsed(row)
        assert (teacher.alpha, teacher.temperature, student.lr, student.kd_weight) == (alpha, tau, lr, kd)
    joined = {row.method for row in table("sftn/1").rows if row.options.get("kd_weight")}
    assert joined == {"fitnets", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "oh"}
    assert {row.method for row in table("sftn/3").rows if "kd_weight" in row.options} == {"fitnets", "sp", "oh"}
    for label in ("SFTN-4", "RCO-EEI-4"):
        _, long = parsed(rows("sftn/4", label=label)[0])
        assert (long.epochs, long.lr_restarts, long.lr_milestones) == (960, 4, [150, 180, 210])
    early, student = parsed(rows("eskd/10", method="at+kd")[1])
    assert (early.epochs, early.lr_milestones, early.lr_gamma) == (65, [20, 40, 60], 0.2)
    assert (student.epochs, student.ce_weight, student.kd_weight) == (200, 0.1, 0.9)
    assert parsed(rows("eskd/4")[2])[0].last_epoch == 50
    gammas = [row.options["method_weights"][0] for row in rows("mse/1", student="resnet32", method="dkd")]
    assert gammas == [0.2, 1.0, 2.0, 4.0, 8.0] * 2


def test_generic_teachers_of_imagenet200_start_from_one_adapted_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    adapted, generic, student = parsed(rows("gtn/imagenet200", method="kd")[2])
    assert (adapted.pretrained, adapted.epochs, generic.pretrained, generic.epochs) == (True, 15, False, 240)
    assert (generic.freeze_teacher_epochs, generic.alpha, generic.lr_milestones) == (60, 1.0, [60, 90, 120])
    assert (student.lr, student.lr_schedule, student.temperature) == (0.1, "cosine", 4.0)


def test_figures_give_the_means_that_sftn_prints():
    """Section 4.2.1: 1.58 points over all methods and pairs, 1.10 between the best students; and the tables' means."""
    pairs: dict[tuple, dict[str, list[float]]] = {}
    for row in [*table("sftn/1").rows, *table("sftn/2").rows]:
        if row.teacher:
            pair = pairs.setdefault((row.teacher.model, row.student), {"vanilla": [], "sftn": []})
            pair[row.teacher.method].append(row.figures["student"])
    assert len(pairs) == 8 and {len(each) for pair in pairs.values() for each in pair.values()} == {12}
    gain = mean(mean(pair["sftn"]) - mean(pair["vanilla"]) for pair in pairs.values())
    best = mean(max(pair["sftn"]) - max(pair["vanilla"]) for pair in pairs.values())
    assert (round(gain, 2), round(best, 2)) == (1.58, 1.10)
    for name, size, key, printed in (
        ("sftn/6", 4, "teacher", [79.46, 78.48, 77.48, 74.14, 77.78]),
        ("sftn/6", 4, "student", [76.07, 76.71, 76.43, 74.87, 74.60]),
        ("sftn/9", 6, "student", [74.48, 75.94, 75.78, 75.94, 76.66, 76.15, 75.78, 76.95, 76.86]),
        ("sftn/8", 7, "kl", [0.84, 0.39]),
        ("sftn/8", 7, "cka", [0.89, 0.96]),
    ):
        values = [row.figures[key] for row in table(name).rows]
        means = [mean(values[start : start + size]) for start in range(0, len(values), size)]
        assert means == pytest.approx(printed, abs=0.012), (name, key)


def test_tables_agree_where_they_print_the_same_run():
    """A teacher has one accuracy a paper, but for SFTN's ablations, which were run anew."""
    seen: dict[tuple, float] = {}
    for name, each in tables().items():
        for row in each.rows:
            for key in ("teacher", "student"):
                if key in row.figures and name not in ("sftn/5", "sftn/6"):
                    run = row.teacher.folder() if key == "teacher" else row.folder()
                    value = seen.setdefault((each.paper, run, key), row.figures[key])
                    assert value == row.figures[key], (name, row.describe())
    five, six = ([row.figures for row in table(name).rows[:4]] for name in ("sftn/5", "sftn/6"))
    assert five == six


def test_tables_are_listed_and_shown():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "recipes", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert [line.split()[0] for line in run("--list").stdout.splitlines()] == list(tables())
    lines = run("--show", "sftn/1", "--output_dir", "runs/one", "--extra=--seed 2").stdout.splitlines()
    shown = [line for line in lines if not line.startswith("#")]
    assert shown == table("sftn/1").commands("runs/one", ["--seed", "2"])
    assert len(lines) - len(shown) == 1 + len(table("sftn/1").rows)
    wrong = run("--show", "sftn/12")
    assert wrong.returncode == 2 and "error: --show: unknown name 'sftn/12'; did you mean sftn/" in wrong.stderr
    with pytest.raises(UserError, match="--paper: unknown name 'kd/1'"):
        table("kd/1")
