"""Writes that fail: a full disk, a broken one, one that has become read-only. One line, and the run can go on."""

import random
import subprocess
from functools import cache
from pathlib import Path

from common import derive_seed
from tests.torture.kills import RESUME, go_on
from tests.torture.report import Failure, Report
from tests.torture.runs import Bases, Result, Scenario, draw_scenario, weights

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")


def case(seed: int, number: int):
    """Case `number` of a seed, to be run with a report, a folder and the bases."""
    chance = random.Random(derive_seed(seed, "faults", number))
    return lambda report, place, bases: run(chance, draw_scenario(seed, number, bases), report, place, bases)


def run(random: random.Random, scenario: Scenario, report: Report, place: Path, bases: Bases) -> None:
    expected, operations, _ = scenario.reference(bases)
    disk = place / "disk"
    disk.mkdir()
    folder = disk / "run"
    mounted = random.random() < 0.3 and can_mount()
    if mounted:
        mount(disk, f"size={random.randint(8, 1500)}k")
    try:
        if mounted:
            check(scenario, folder, scenario.run(folder))
            report.counts["full disks"] += 1
            mount(disk, "remount,size=64m")
        else:
            for _ in range(random.randint(1, 2)):
                plan = {"folder": str(folder), "at": random.randint(1, operations), "errno": random.choice(ERRORS)}
                plan |= {"onwards": random.random() < 0.7, "rank": 0, "plots": random.random() < 0.25}
                more = RESUME if (folder / "config.yaml").is_file() else ()
                if (folder / "summary.json").is_file():
                    break
                check(scenario, folder, scenario.run(folder, *more, plan=plan))
                report.counts["faults"] += 1
        go_on(report, scenario, folder, RESUME)
        if weights(folder) != expected:
            raise Failure("lost", f"other weights than undisturbed: {scenario.shown(folder)}")
        report.counts["identical"] += 1
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def check(scenario: Scenario, folder: Path, result: Result) -> None:
    """A run ends well only if it is whole; with a message that names the file it cannot write."""
    if result.code == 0 and not (folder / "summary.json").is_file():
        raise Failure("lost", f"said to be done: {scenario.shown(folder)}")
    if result.code not in (0, 1, 2):
        raise Failure("untidy", f"{scenario.shown(folder)}\n{result}")
    if result.code and str(folder.parent) not in "".join(result.stderrs):
        raise Failure("untidy", f"names no file: {scenario.shown(folder)}\n{result}")


@cache
def can_mount() -> bool:
    """Whether this user may mount; containers often may not."""
    probe = Path("/tmp/torture-probe")
    probe.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", probe], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", probe], check=True)
    probe.rmdir()
    return done.returncode == 0


def mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
