"""The command line: recipes, flags that win over them, and one clear line for a mistake."""

from pathlib import Path

import pytest

from common import UserError
from distill import DistillConfig
from engine.command_line import parse
from engine.config import RunConfig
from train_teacher import TeacherConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def teacher(*argv: str) -> TeacherConfig:
    return parse(TeacherConfig, "usage", {"models": ["a", "b"]}, list(argv))


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 0.2\nmethod: gtn\nepochs: 7\npool:\n  stem: 8\n  widths: [1, 2, 3]\n  strides: [1, 1, 2]\n")
    return str(path)


def test_defaults_are_the_dataclass_own():
    assert teacher() == TeacherConfig()


@pytest.mark.parametrize("before", [True, False])
def test_a_recipe_sets_defaults_and_flags_win_wherever_they_stand(recipe, before):
    flags = ["--lr", "0.3", "--pool.stem", "4"]
    config = teacher(*(flags if before else []), "--config", recipe, *([] if before else flags))
    assert (config.lr, config.epochs, config.method) == (0.3, 7, "gtn")
    assert (config.pool.stem, config.pool.widths) == (4, [1, 2, 3])


def test_a_recipe_by_equals_sign(recipe):
    assert teacher("--lr=0.3", f"--config={recipe}").epochs == 7 and teacher(f"--config={recipe}").lr == 0.2


@pytest.mark.parametrize("written", [["1", "2", "2"], ["[1,2,2]"], ["[1, 2, 2]"]])
def test_lists_as_words_or_in_brackets(written):
    flags = ("--lr_milestones", "--pool.widths", "--pool.strides")
    config = teacher("--method", "gtn", *(word for flag in flags for word in (flag, *written)))
    assert config.lr_milestones == config.pool.widths == config.pool.strides == [1, 2, 2]


def test_booleans_alone_or_with_a_value():
    config = teacher("--overwrite", "--nesterov", "false", "--flip", "--seed", "3")
    assert (config.overwrite, config.nesterov, config.flip, config.seed) == (True, False, True, 3)


def test_a_students_pool_is_optional_and_can_be_given_in_parts():
    def student(*argv):
        return parse(DistillConfig, "usage", {}, list(argv))

    assert student().pool is None
    assert student("--pool.stem", "4", "--pool.candidates", "res3x2", "identity").pool.candidates == [
        "res3x2",
        "identity",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown option --lrr; did you mean --lr?"),
        (["--pool.widht", "1"], "did you mean --pool.widths?"),
        (["--lr", "fast"], "--lr fast: expected float"),
        (["--lr", ""], "--lr '': expected float"),
        (["--epochs", "9" * 5000], "--epochs: Exceeds the limit (4300 digits)"),
        (["--method", "gtn", "--pool", "8"], "--pool: takes no value itself; give its parts: --pool.candidates, "),
        (["--epochs", "1.5"], "--epochs 1.5: expected int"),
        (["--lr_schedule", "plateau"], "--lr_schedule plateau: expected one of"),
        (["--image_size", "big"], "--image_size big: expected int"),
        (["--epochs"], "--epochs"),
        (["stray"], "stray"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config"], "--config"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--lr", "1e39"], "--lr 1e+39: must be above 0 and at most 3e+38"),
        (["--weight_decay", "1e39"], "--weight_decay 1e+39: must be from 0 to 3e+38"),
        (["--epochs", "0"], "--epochs 0: must be from 1 to a million"),
        (["--batch_size", "1"], "--batch_size 1"),
        (["--momentum", "1"], "--momentum 1.0"),
        (["--val_fraction", "1"], "--val_fraction 1.0"),
        (["--nesterov", "--momentum", "0"], "--nesterov"),
        (["--seed", "-1"], "--seed -1"),
        (["--process_timeout", "1e55"], "--process_timeout 1e+55: must be above 0 seconds and at most 2592000"),
        (["--checkpointing_epochs", "0"], "--checkpointing_epochs 0"),
    ],
)
def test_mistakes_are_one_line_that_names_them(argv, message):
    with pytest.raises(UserError) as error:
        teacher(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "Parser key" not in str(error.value) and "sys." not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lrr: 1", "unknown key 'lrr'; did you mean --lr?"),
        ("- 1", "mapping"),
        ("", "mapping"),
        ("a: [", "cannot read"),
    ],
)
def test_recipes_with_mistakes_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        teacher("--config", str(path))
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: fast", "--lr fast: expected float"),
        ("pool: {stem: big}", "--pool.stem big: expected int"),
        ("pool: {widht: [1]}", "unknown key 'pool.widht'; did you mean --pool.widths?"),
        ("pool: {stem: }", "'pool.stem' has no value"),
        ("lr: {a: }", "--lr {'a': None}: expected float"),
        ("pool: [1]", "recipe.yaml: 'pool' cannot be [1]; it is a mapping of any of candidates, head, "),
        ("pool: runs/t", "'pool' cannot be 'runs/t'"),
    ],
)
def test_recipes_with_wrong_values_are_refused_by_option(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        teacher("--config", str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_listings_print_and_stop(capsys):
    with pytest.raises(SystemExit) as stop:
        teacher("--list_models")
    assert stop.value.code == 0 and capsys.readouterr().out == "a\nb\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood(path):
    config_class = DistillConfig if path.stem.endswith("_kd") else TeacherConfig
    config = parse(config_class, "usage", {}, ["--config", str(path)])
    if isinstance(config, TeacherConfig):
        config.check()
    of_a_run = path.stem.startswith("make_generic")  # its data set is that of --weights
    assert config.dataset == (None if of_a_run else path.stem.split("_")[0])
    assert 5 <= len(path.read_text().splitlines()) <= 25


def test_every_option_is_described():
    for config_class in (RunConfig, TeacherConfig, DistillConfig):
        described = "".join(parent.__doc__ or "" for parent in config_class.__mro__)
        for name in config_class.__dataclass_fields__:
            assert f"\n        {name}: " in described, name
