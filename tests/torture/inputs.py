"""Options with values drawn from their types, and files made by hand: one line, or a run; never a traceback."""

import random
from dataclasses import fields
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from common import derive_seed
from data.hub import HUB
from distill import DistillConfig
from engine.command_line import _field_types
from losses.registry import METHODS
from models import list_models
from tests.runs import TINY_POOL
from tests.torture import files
from tests.torture.many import BEGUN, Many
from tests.torture.report import Failure, Report
from tests.torture.runs import SIZE, Bases, Result, begin, contents, finish, processor_seconds
from tests.torture.values import drawn, typed
from train_teacher import TeacherConfig

BATCH = 50  # cases that hypothesis draws at once
MEMORY = 4 * 2**30  # bytes that a run may take
CONFIGS = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}
KNOWN = {
    "model": [*list_models()[:12], "pool:3", "wrn10_1", "nas_m"],
    "student": ["resnet8", "resnet14", "pool:3", "nas_m", "wrn10_1", "vgg8", "shufflenet_v1"],
    "dataset": ["digits", *HUB],
    "schedule": ["1/2", "2/3"],
    "report_to": ["tensorboard", "wandb", "all", "tensorboard,wandb"],
    "resume_from_checkpoint": ["latest"],
}
# What a machine with other work shall not be asked for: a thousand processes, minutes of compiling.
SPARED = {"data_workers": [["-1"], ["0"], ["1"], ["1025"], ["x"]], "compile": [["2"], ["false"], ["maybe"]]}


def case(seed: int, number: int):
    """Case `number` of a seed, to be run with a report, a folder and the bases."""
    chance = random.Random(derive_seed(seed, "inputs", number))
    if chance.random() < 0.5:
        drawn_options = cases(seed, number // BATCH)[number % BATCH]
        return lambda report, place, bases: try_options(report, place, bases, number, *drawn_options)
    return lambda report, place, bases: try_file(report, place, bases, number, chance)


@cache
def cases(seed: int, batch: int) -> list[tuple[str, str, list[tuple[str, list[str]]]]]:
    """(script, method, options with their values) of a batch."""

    def options_of(script: str) -> st.SearchStrategy:
        config = CONFIGS[script]
        kinds = [(name, hint) for name, hint in _field_types(config) if name not in ("method", "pool")]

        def some(method: str) -> st.SearchStrategy:
            """Options that the method reads, and now and then any."""
            unread = {name for part in optional(config) for name in part} - {
                each.name for part in config(method=method).chosen() for each in fields(part)
            }
            read = [kind for kind in kinds if kind[0].partition(".")[0] not in unread]
            one = st.sampled_from(read + read + read + kinds)
            one = one.flatmap(lambda kind: st.tuples(st.just(kind[0]), values(*kind)))
            return st.tuples(st.just(script), st.just(method), st.lists(one, min_size=1, max_size=3))

        return st.sampled_from(list(config.rows())).flatmap(some)

    return drawn(st.sampled_from(list(CONFIGS)).flatmap(options_of), derive_seed(seed, "options", batch), BATCH)


def optional(config: type) -> list[set[str]]:
    """The options of methods, which not all of them read."""
    return [{each.name for each in fields(part)} for parts in config.rows().values() for part in parts]


def values(name: str, hint: object) -> st.SearchStrategy[list[str]]:
    return st.sampled_from(SPARED[name]) if name in SPARED else typed(hint, KNOWN.get(name, ()))


def try_options(
    report: Report, place: Path, bases: Bases, number: int, script: str, method: str, options: list
) -> None:
    argv = ["--method", method, *base(script, method, bases)]
    for name, words in options:
        argv += [f"--{name}", *words]
    attempt(report, place, bases, number, script, argv)


def base(script: str, method: str, bases: Bases) -> list:
    """The options with which a method trains for a moment."""
    if script == "train_teacher.py":
        more = {"gtn": TINY_POOL, "sftn": ["--student", "resnet8"]}.get(method, [])
        return ["--model", "resnet8", *SIZE, "--epochs", "1", *more]
    taught = ["--teacher", bases.teacher] if METHODS[method].needs_teacher else []
    return [*taught, "--student", "resnet8", *SIZE, "--epochs", "1"]


def try_file(report: Report, place: Path, bases: Bases, number: int, chance: random.Random) -> None:
    name = chance.choice(list(files.MADE))
    script, argv = files.MADE[name](chance, place, bases)
    (place / "made").write_text(f"{name}: {script} {argv}\n")
    attempt(report, place, bases, number, script, argv)


def attempt(report: Report, place: Path, bases: Bases, number: int, script: str, argv: list) -> None:
    """Run a script with what was drawn, in a folder of its own; raises Failure unless it ends as it should.

    Of ten cases nine share a process with others, where starting one would cost more than all else.
    """
    if "--output_dir" not in argv:
        argv = ["--output_dir", place / "run", *argv]
    before = {folder: contents(folder) for folder in place.iterdir() if folder.is_dir() and not folder.is_symlink()}
    (place / "cwd").mkdir()
    try:
        result = (many(bases.folder).ask if number % 10 else watched)(script, argv, place)
        if result is not None:
            result.check_words(script)
    except Failure as failure:
        raise Failure(failure.kind, f"{script} {list(map(str, argv))}\n{failure.what}") from None
    if result is not None and result.code == 2:
        for folder, files_before in before.items():
            if contents(folder) != files_before:
                raise Failure("lost", f"refused, but {folder} has changed: {script} {list(map(str, argv))}")
    report.counts["inputs"] += 1
    report.counts["taken" if result is None or result.code == 0 else "refused" if result.code == 2 else "failed"] += 1
    if report.counts["inputs"] % 20 == 0:
        bases.check()


@cache
def many(folder: Path) -> Many:
    return Many(folder / "many", MEMORY)


def watched(script: str, argv: list, place: Path) -> Result | None:
    """What the script came to; None where it was still training after a while, and was ended."""
    ranks = begin(script, argv, plan={"memory": MEMORY, "cwd": str(place / "cwd"), "plots": len(argv) % 4 == 0})
    while ranks[0].wait(0.1) is None:
        if processor_seconds(ranks[0].pid) > BEGUN and "training and " in ranks[0].output[0].read_text():
            ranks[0].kill()
            ranks[0].wait(10)
            return None
        if processor_seconds(ranks[0].pid) > 2 * BEGUN:
            break
    return finish(ranks)
