"""The commands of the README and of docs/: every one is parsed by the real parsers, those for a CPU are run."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from PIL import Image

import compare
from distill import DistillConfig
from engine.command_line import parse
from evaluate import EvaluateConfig
from export import ExportConfig
from losses.registry import describe_methods
from search import SearchConfig
from shipping.options import FleetConfig
from tests.runs import forked, forked_processes, succeeded
from train_teacher import TeacherConfig

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "train_teacher.py": TeacherConfig,
    "distill.py": DistillConfig,
    "evaluate.py": EvaluateConfig,
    "export.py": ExportConfig,
    "search.py": SearchConfig,
    "fleet.py": FleetConfig,
}


def text() -> str:
    """The README, then the pages of docs/ in the order in which it names them."""
    readme = (ROOT / "README.md").read_text()
    pages = dict.fromkeys(re.findall(r"\(docs/(\w+\.md)", readme))
    assert set(pages) == {page.name for page in (ROOT / "docs").glob("*.md")}
    return "\n".join([readme, *((ROOT / "docs" / page).read_text() for page in pages)])


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def script_commands() -> list[str]:
    return [command for command in commands() if not command.startswith(("make ", "python -m ", ". "))]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    return variables, words[len(variables) :]


def test_readme_shows_the_commands_that_matter():
    shown = "\n".join(commands())
    for needed in (
        "make demo",
        "make test",
        "train_teacher.py",
        "distill.py",
        "--num_machines",
        "--max_restarts",
        "latest",
    ):
        assert needed in shown


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_target_exists(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", script_commands())
def test_command_is_understood_by_launcher_and_script(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, words = split(command)
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.config_file is None or Path(launched.config_file).is_file()
        script, arguments = launched.training_script, launched.training_script_args
    elif words[0] == "torchrun":
        launched = torch.distributed.run.get_args_parser().parse_args(words[1:])
        script, arguments = launched.training_script, launched.training_script_args
    else:
        assert words[0] == "python"
        script, arguments = words[1], words[2:]
    if script == "compare.py":
        options = compare.arguments(arguments)
        assert options.list or compare.chosen(options).runs
        return
    config = parse(CONFIGS[script], "", {}, arguments)
    named = {"evaluate.py": lambda: config.runs or [config.output], "export.py": lambda: config.run}
    named["search.py"] = lambda: [config.write_blocks or config.output_dir or config.teacher]
    places = named.get(script, lambda: [config.output_dir])()
    assert all(place.startswith("runs/") for place in places)


def test_commands_for_a_cpu_run(tmp_path):
    ran = 0
    for number in range(200):
        photo = tmp_path / f"photos/class{number % 2}/{number}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (number, 90, 200)).save(photo)
    for command in script_commands():
        needs = ("cifar100", "imagenet", "stl10", "hf:", "--push_to_hub", "--resume_from_checkpoint")
        if "compare.py" in command or any(each in command for each in needs):
            continue  # needs a network, a GPU, a stopped run; compare.py has tests of its own
        if "search.py" in command and re.search(r"\dms\b", command):
            continue  # measures latencies for long; tests/test_search.py does for less
        if "pte" in command.split() and find_spec("executorch") is None:
            continue  # make executorch-check; tests/test_pte.py
        if "fleet.py" in command:
            continue  # all of search.py, distill.py and export.py; tests/test_fleet.py does for less
        variables, words = split(command)
        words = [word.replace("runs/", f"{tmp_path}/").replace("folder:", f"folder:{tmp_path}/") for word in words]
        if "search.py" in words:
            words += ["--paths", "20", "--first_steps", "2"]
        elif not {"evaluate.py", "export.py"} & set(words):
            batch_size = "16" if "--train_fraction" in words else "128"
            words += ["--epochs", "1", "--stop_after", "1", "--batch_size", batch_size, "--image_size", "8"]
            words += ["--lr_warmup_epochs", "0"]
        assert variables in ({}, {"ACCELERATE_USE_CPU": "true"})
        processes = 1
        if words[0] == "accelerate":
            launched = launch_command_parser().parse_args(words[2:])
            processes = launched.num_processes or 1
            words = ["python", launched.training_script, *launched.training_script_args]
        succeeded(forked(*words[1:]) if processes == 1 else forked_processes(processes, *words[1:]))
        ran += 1
    assert ran >= 4


# tests/test_zoo.py runs `python -m models`.
@pytest.mark.parametrize(
    "command", [command for command in commands() if command.startswith(("python -m models.", "python -m recipes"))]
)
def test_modules_run(command):
    done = forked(*shlex.split(command)[1:])
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 3, done.stderr


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("python -m benchmarks.")])
def test_benchmarks_understand_their_options(command, monkeypatch):
    words = shlex.split(command)[2:]
    monkeypatch.setattr(sys, "argv", words)
    import_module(words[0]).arguments()


def test_the_table_of_methods_is_the_codes():
    inside = (ROOT / "docs/methods.md").read_text().split("<!-- methods -->\n")[1].split("<!-- end of methods -->")[0]
    assert inside.splitlines() == describe_methods(markdown=True)


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        succeeded(forked("-c", block))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
