"""Every recipe is what the tables say, is understood by its script, and names networks and methods that there are."""

import pytest
import torch

from distill import DistillConfig
from engine.command_line import parse
from losses.registry import find_methods
from models import create_model
from objectives.registry import TEACHERS
from recipes.tables import HERE, as_text, recipes
from train_teacher import TeacherConfig

FILES = {str(path.relative_to(HERE))[:-5]: path for path in HERE.rglob("*.yaml")}


def test_the_files_are_those_of_the_tables():
    """`python recipes/tables.py` writes them; those at the top are written by hand."""
    tables = recipes()
    assert {name for name in FILES if "/" in name} == set(tables)
    for name, (comment, options) in tables.items():
        text = as_text(comment, options)
        assert FILES[name].read_text() == text, name
        assert 8 <= len(text.splitlines()) <= 20, name


@pytest.mark.parametrize("kind", ["teachers", "students", ""])
def test_every_recipe_is_understood_and_can_be_built(kind):
    networks = set()
    for name, path in FILES.items():
        if kind != (name.split("/")[1] if "/" in name else ""):
            continue
        student = kind == "students" or name.endswith("_kd")
        config = parse(DistillConfig if student else TeacherConfig, "", {}, ["--config", str(path)])
        size = 224 if config.dataset.startswith("imagenet") else 32
        names = [config.student, *config.peers] if student else [config.model, config.student]
        networks |= {(each, size) for each in names if each is not None}
        if student:
            assert find_methods(config.method)
        else:
            assert config.method in TEACHERS
            config.check()
    assert len(networks) >= (2 if not kind else 10)
    with torch.device("meta"):
        for name, size in networks:
            assert create_model(name, 100, image_size=size).blocks


def test_schedules_are_the_papers():
    config = parse(TeacherConfig, "", {}, ["--config", str(FILES["cifar10/teachers/wrn16_8_15_50"])])
    assert config.epochs == 50 and config.lr_milestones == [15, 30, 45] and config.lr_gamma == 0.2
    config = parse(TeacherConfig, "", {}, ["--config", str(FILES["imagenet/teachers/resnet50_stop35"])])
    assert config.last_epoch == 35 and config.lr_milestones == [30, 60, 90]
