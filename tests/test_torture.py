"""The tool that disturbs runs (python -m tests.torture): it strikes where it says, repeats itself, tells failure."""

import json
import random
import re
import shlex
import signal
from pathlib import Path

import pytest
from hypothesis import strategies as st

from distill import DistillConfig
from engine.command_line import parse
from tests.runs import ROOT, forked
from tests.torture import runs as scenarios
from tests.torture.__main__ import read_options
from tests.torture.report import Failure, Report
from tests.torture.runs import CHILD, Bases, Result, draw_scenario
from tests.torture.values import drawn, mutated, typed
from train_teacher import TeacherConfig

WRITES = """
import os, sys
from pathlib import Path

for name in "abc":
    with open(Path(sys.argv[1], name), "wb") as file:  # operations 1, 3, 5
        file.write(b"12345678")
        file.flush()
        os.fsync(file)  # operations 2, 4, 6
"""


def struck(folder: Path, **plan) -> tuple[int, dict[str, int]]:
    """The exit code of a process with a plan, and the sizes of what it wrote."""
    (folder / "script.py").write_text(WRITES)
    (folder / "out").mkdir()
    plan |= {"folder": str(folder / "out"), "count": str(folder / "count")}
    done = forked(CHILD, json.dumps(plan), folder / "script.py", folder / "out")
    return done.returncode, {path.name: path.stat().st_size for path in (folder / "out").iterdir()}


@pytest.mark.parametrize(
    ("plan", "code", "left"),
    [
        ({}, 0, {"a": 8, "b": 8, "c": 8}),
        ({"at": 3, "signal": signal.SIGKILL}, -9, {"a": 8}),
        ({"at": 4, "signal": signal.SIGKILL}, -9, {"a": 8, "b": 4}),  # in the middle of a write
        ({"at": 5, "signal": signal.SIGTERM}, -15, {"a": 8, "b": 8}),
        ({"at": 3, "errno": "EIO"}, 1, {"a": 8}),
        ({"at": 3, "signal": signal.SIGKILL, "rank": 1}, 0, {"a": 8, "b": 8, "c": 8}),
    ],
)
def test_a_process_is_struck_at_the_operation_of_the_plan(tmp_path, plan, code, left):
    assert struck(tmp_path, **plan) == (code, left)
    assert plan or (tmp_path / "count").read_text() == "6"


def test_a_seed_draws_the_same_again():
    values = st.tuples(typed(int), typed(list[float]), typed(str, ["a"]))
    assert drawn(values, 3, 40) == drawn(values, 3, 40) != drawn(values, 4, 40)
    document = {"a": [1, {"b": "x"}], "c": None}
    changed = [mutated(document, random.Random(seed)) for seed in range(30)]
    assert document == {"a": [1, {"b": "x"}], "c": None} and all(each != document for each in changed)


def test_every_run_that_is_disturbed_is_understood(tmp_path):
    bases = Bases(tmp_path)
    bases.teacher = tmp_path  # which would have to be trained
    found = {str(scenario.arguments): scenario for scenario in (draw_scenario(0, n, bases) for n in range(0, 2000, 4))}
    assert len(found) == len(scenarios.TEACHERS) + len(scenarios.STUDENTS)
    for scenario in found.values():
        config = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}[scenario.script]
        parse(config, "", {}, list(map(str, scenario.arguments)))


@pytest.mark.parametrize(
    ("codes", "stderrs", "kind"),
    [
        ([1], ["train_teacher.py: stopped: x\n"], None),
        ([-9, 1], ["", "train_teacher.py: stopped: x\n"], None),
        ([2], ["Traceback (most recent call last):\n"], "tracebacks"),
        ([1], ["train_teacher.py: stopped: x\nUserWarning\n"], "untidy"),
        ([1], [""], "untidy"),
        ([-11], [""], "tracebacks"),
    ],
)
def test_an_end_without_its_line_is_a_failure(codes, stderrs, kind):
    result = Result(codes, "", stderrs)
    if kind is None:
        result.check_words("train_teacher.py")
    else:
        with pytest.raises(Failure) as failure:
            result.check_words("train_teacher.py")
        assert failure.value.kind == kind


def test_a_failure_is_counted_kept_and_said_with_its_command(tmp_path, capsys):
    def fails(report, place, bases):
        (place / "evidence").touch()
        raise Failure("lost", "gone")

    report = Report(7, tmp_path)
    report.case("kills", 3, fails, None)
    report.case("faults", 4, lambda report, place, bases: None, None)
    assert report.bad == 1 and (tmp_path / "kills-3/evidence").exists() and not (tmp_path / "faults-4").exists()
    assert "python -m tests.torture --only kills --seed 7 --case 3" in capsys.readouterr().out


def test_the_pages_commands_are_understood():
    text = (ROOT / "docs/reliability.md").read_text()
    commands = re.findall(r"python -m tests\.torture([^\n`]*)", text)
    assert commands and all(read_options(shlex.split(command)) for command in commands)
