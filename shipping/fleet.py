"""What a fleet is made by: search.py, distill.py and export.py, each for what is still to be done."""

import math
import os
import shlex
import signal
import sys
from functools import cached_property
from pathlib import Path

import distill
import export
import search
from common import UserError, check_writable, read_json
from comparing.executors import create_executor
from comparing.order import execute
from comparing.places import Places
from comparing.plan import assignments
from comparing.planned import PlannedRun
from engine.command_line import changed_options, parse
from engine.config import NOT_COMPUTED
from engine.distributed import Interrupted, RunError
from engine.run_folder import plain
from models.pool import Pool
from reports.subject import load_subject
from searching.budget import parse_budgets
from shipping.folder import SEARCH, STUDENTS, begin, check_folder
from shipping.options import FleetConfig

GOES_ON = "interrupted; all is saved, and the same command goes on (--overwrite begins anew)"
ELSEWHERE = {"executor", "executor_options"}  # another one makes the same students
MAINS = {"search.py": search.main, "distill.py": distill.main, "export.py": export.main}


class Fleet:
    """A fleet that is being made.

    Attributes:
        config: its options.
        folder: of all that is made.
        teacher: the run folder of the teacher, `info` what is known of that.
        budgets: by name.
        failed: why a student could not be made or shipped, by its name; the others are.

    Raises:
        UserError: options that one of the scripts would refuse, a teacher that is none, a folder that is in use or
            holds something else.
    """

    def __init__(self, config: FleetConfig):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("--num_processes: fleet.py is one process; launch distill.py --students on several")
        self.config, self.folder, self.teacher = config, Path(config.output_dir), config.teacher[0]
        subject = load_subject(self.teacher, "--teacher")
        self.info, self.held_out = subject.info, subject.options.val_fraction > 0
        if config.image_size not in (None, side := self.info.image_size):
            raise UserError(f"--image_size {config.image_size}: the teacher was trained on images of {side}")
        check_folder(self.folder, subject.folder)
        check_writable("--output_dir", self.folder / SEARCH)
        parse(search.SearchConfig, "", {}, self.search_command[1:])  # before what takes long
        parse(export.ExportConfig, "", {}, self.export_command("STUDENT")[1:])
        parse(distill.DistillConfig, "", {}, self._distill_command(["STUDENT.json"])[1:])
        self.budgets = {budget.name: budget for budget in parse_budgets(config.budgets)}
        options = {name: value for name, value in config.as_dict().items() if name not in NOT_COMPUTED | ELSEWHERE}
        self.failed: dict[str, str] = {}
        self._lock = begin(self.folder, options | {"teacher's sha256": self.info.sha256}, config.overwrite)

    @property
    def search_command(self) -> list[str]:
        """What follows `python`."""
        places = {"teacher": self.teacher, "output_dir": str(self.folder / SEARCH), "overwrite": None}
        return self.config.words("search.py", search.SearchConfig, **places, pool=self._pool())

    def _pool(self) -> dict | None:
        """That of --pool, unless it is the teacher's own."""
        own, given = self.info.pool, self.config.pool
        side = self.info.image_size
        same = own and given and Pool(**own).for_images(side) == given.for_images(side)
        return None if same or given is None else self.config.as_dict()["pool"]

    def distill_command(self, names: list[str]) -> list[str]:
        """What follows `python`, for some of the students."""
        return self._distill_command([str(self.spec(name)) for name in names])

    def _distill_command(self, specs: list[str]) -> list[str]:
        own = {"students": specs, "output_dir": str(self.folder / STUDENTS), "overwrite": None, "pool": None}
        return self.config.words("distill.py", distill.DistillConfig, **own)

    def export_command(self, name: str) -> list[str]:
        """What follows `python`."""
        folder, own = str(self.folder / STUDENTS / name), {"output_dir": None, "overwrite": None, "teacher": None}
        return self.config.words("export.py", export.ExportConfig, folder, **own)

    def spec(self, student: str) -> Path:
        """The file that says what a student is made of."""
        budget = next(budget for budget, name in self.students.items() if name == student)
        return self.folder / SEARCH / "students" / f"{budget}.json"

    @cached_property
    def searched(self) -> dict:
        """What search.py has found."""
        found = read_json(path := self.folder / SEARCH / search.RESULT)
        if not isinstance(students := found.get("students"), dict) or self.budgets.keys() - students.keys():
            raise UserError(f"{path}: does not hold these budgets; --overwrite begins anew")
        return found

    @cached_property
    def students(self) -> dict[str, str]:
        """The student of each budget, by the name of its folder: one for those whose best member is the same."""
        first: dict[tuple, str] = {}
        entries = self.searched["students"]
        return {name: first.setdefault(tuple(entries[name]["choice"]), plain(f"{name}.json")) for name in self.budgets}

    def search(self) -> None:
        """Choose a member for each budget, unless that is done."""
        if not (self.folder / SEARCH / search.RESULT).is_file():
            run(self.search_command)

    @property
    def shipped(self) -> list[str]:
        """The students that have not failed."""
        return [name for name in dict.fromkeys(self.students.values()) if name not in self.failed]

    def distil(self) -> None:
        """Train the students that are not done: in one pass of the teacher, or each by itself elsewhere."""
        left = [name for name in self.shipped if not self._is_done(name)]
        try:
            if left and self.config.executor != "local":
                self._distil_elsewhere(left)
            elif left:
                begun = any((self.folder / STUDENTS / name).exists() for name in left)
                run(self.distill_command(left) + (["--resume_from_checkpoint", "latest"] if begun else []))
        except RunError as error:
            print(f"stopped: {error}", flush=True)
            self.failed |= {name: "was not distilled" for name in left if not self._is_done(name)}

    def _is_done(self, name: str) -> bool:
        return (self.folder / STUDENTS / name / "summary.json").is_file()

    def _distil_elsewhere(self, names: list[str]) -> None:
        """Hand the students to a cluster. Raises RunError where one fails, Interrupted by Ctrl-C."""
        places, options = Places(self.folder / STUDENTS, None), self.config.executor_options
        runs = [self.planned(name) for name in names]
        for each in runs:
            print(f"\n$ python {shlex.join(each.command(places.runs))}  ({self.config.executor})", flush=True)
        executor = create_executor(self.config.executor, 1, assignments("--executor_options", options), places)
        outcome = execute(runs, places, executor, math.inf, tell)
        if outcome.interrupted:
            raise Interrupted(signal.SIGINT, GOES_ON)
        if outcome.failed:
            raise RunError(f"{len(outcome.failed)} of {len(runs)} students failed; the same command tries them again")

    def planned(self, name: str) -> PlannedRun:
        """A student distilled by itself: to the same weights as with the others, on the same kind of machine."""
        given = changed_options(self.config, distill.DistillConfig)
        options = {each: value for each, value in given.items() if each not in ("output_dir", "overwrite", "pool")}
        options |= {"teacher": [self.teacher], "student": str(self.spec(name)), "seed": self.config.seed}
        return PlannedRun(name, "distill.py", options, source="teacher", seed=self.config.seed, place=name)

    def export(self) -> None:
        """Write and prove the files of the students that have none."""
        for name in self.shipped:
            if not (self.folder / STUDENTS / name / "export/export.json").is_file():
                try:
                    run(self.export_command(name))
                except RunError as error:
                    print(f"stopped: {error}", flush=True)
                    self.failed[name] = str(error)

    def check(self, over: list[str]) -> None:
        """Raise RunError for students that failed, and for what is `over` its budget, in words."""
        place, said = self.folder / STUDENTS, [f"{name}: {why}" for name, why in self.failed.items()]
        if said:
            said.append(
                f"python distill.py --output_dir {place}/NAME --overwrite and python export.py {place}/NAME take other "
                "options, and then the same command goes on"
            )
        if over:
            said.append(f"not within the budget: {'; '.join(over)}; the same command measures again")
        if said:
            raise RunError("; ".join(said))


def tell(run: PlannedRun, reason: str | None) -> None:
    """Say that a student has ended."""
    print(f"{run.name}: {reason or 'distilled'}", flush=True)


def run(words: list[str]) -> None:
    """What `python words` does, here. Raises what the script's main does."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    before, sys.argv = sys.argv, words
    try:
        MAINS[words[0]]()
    except Interrupted as interruption:
        raise Interrupted(interruption.signum, GOES_ON) from None
    finally:
        sys.argv = before
