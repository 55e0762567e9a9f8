"""SIGKILL and SIGTERM at random moments: the run has to go on from there to the weights of one left alone."""

import random
import shutil
import signal
import time
from pathlib import Path

from common import derive_seed
from tests.torture.report import Failure, Report
from tests.torture.runs import Bases, Result, Scenario, begin, contents, draw_scenario, finish, weights

RESUME = ("--resume_from_checkpoint", "latest")


def case(seed: int, number: int):
    """Case `number` of a seed, to be run with a report, a folder and the bases."""
    chance = random.Random(derive_seed(seed, "kills", number))
    return lambda report, place, bases: run(chance, draw_scenario(seed, number, bases), report, place, bases)


def run(random: random.Random, scenario: Scenario, report: Report, place: Path, bases: Bases) -> None:
    folder = place / "run"
    expected, _, _ = scenario.reference(bases)
    more: tuple = ()
    if random.random() < 0.2:  # a finished run is to be replaced
        shutil.copytree(bases.teacher, folder)
        more = ("--overwrite",)
    for _ in range(random.randint(1, 4)):
        saved = (folder / "checkpoints/last.safetensors").is_file()
        result = strike(random, report, scenario, folder, more, bases)
        if saved and not more and not (folder / "checkpoints/last.safetensors").is_file():
            raise Failure("lost", f"the checkpoint is gone: {scenario.shown(folder, *more)}")
        if result.code == 0:
            break
        if random.random() < 0.3 and (folder / "config.yaml").is_file():
            refused_untouched(scenario, folder)
        if more != ("--overwrite",) or random.random() < 0.5:
            more = RESUME
    go_on(report, scenario, folder, more)
    if weights(folder) != expected:
        raise Failure("lost", f"other weights than undisturbed: {scenario.shown(folder, *more)}")
    report.counts["identical"] += 1
    bases.check()


def strike(random: random.Random, report: Report, scenario: Scenario, folder: Path, more, bases: Bases) -> Result:
    """A run that gets a signal: before an operation on a file, before an iteration, or by the clock."""
    _, operations, seconds = scenario.reference(bases)
    signum = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    rank = random.randrange(scenario.processes)
    plan: dict = {"rank": rank, "plots": random.random() < 0.25}
    moment, real = random.random(), random.random() < 0.1
    if moment < 0.5:
        plan |= {"rank": 0, "folder": str(folder), "at": random.randint(1, operations), "signal": signum}
    elif moment < 0.7:
        plan |= {"iteration": random.randint(0, 8), "signal": signum}
    ranks = begin(scenario.script, scenario.command(folder, *more), scenario.processes, plan, real)
    if moment >= 0.7:
        time.sleep(random.uniform(0, 1.1 * seconds) + (random.uniform(0, 5) if real else 0))
        for each in ranks if random.random() < 0.5 else [ranks[rank]]:
            each.send_signal(signum)
    result = finish(ranks)
    result.check_words(scenario.script)
    report.counts["kills"] += -signal.SIGKILL in result.codes
    report.counts["terms"] += bool({143, -signal.SIGTERM} & {*result.codes})
    finished = (folder / "summary.json").is_file()
    if result.code == 2 and not finished and not (more == RESUME and left_by_another(folder, scenario)):
        raise Failure("locked out", f"{scenario.shown(folder, *more)}\n{result.stderrs}")
    return result


def refused_untouched(scenario: Scenario, folder: Path) -> None:
    """The plain command, where a run is: refused, and nothing changes."""
    before = contents(folder)
    result = scenario.run(folder)
    if result.code != 2:
        raise Failure("lost", f"not refused: {scenario.shown(folder)}\n{result}")
    if contents(folder) != before:
        raise Failure("lost", f"refused, but changed the run: {scenario.shown(folder)}\n{result}")


def go_on(report: Report, scenario: Scenario, folder: Path, more) -> None:
    """The run to its end, as a user would go on."""
    if (folder / "summary.json").is_file() and not left_by_another(folder, scenario):
        return  # the blow came after its end
    result = scenario.run(folder, *more)
    if result.code == 2 and more == RESUME and left_by_another(folder, scenario):
        more = ("--overwrite",)
        result = scenario.run(folder, *more)
    if result.code != 0:
        raise Failure("locked out", f"{scenario.shown(folder, *more)}\n{result.stderrs}")
    report.counts["resumes"] += 1


def left_by_another(folder: Path, scenario: Scenario) -> bool:
    """Whether the folder's config.yaml is still that of the run that was to be replaced."""
    config = folder / "config.yaml"
    return config.is_file() and f"output_dir: {folder}\n" not in config.read_text()
