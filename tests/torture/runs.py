"""The runs that are disturbed: each script, method and number of processes, as small as they can be."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

from common import derive_seed
from losses.registry import METHODS
from tests.runs import ROOT, TINY_POOL, Fork, free_port
from tests.torture.report import Failure

CHILD = "tests/torture/child.py"
PATIENCE = 300  # seconds of idleness, or of computing, until a run counts as hung
SHARED = 4  # cases of the same run: it has to be measured once undisturbed
RAW = re.compile(r"Parser key|functools|<class |<function | object at 0x|\[Errno ")  # words of Python or of a library
FAREWELL = 30  # seconds of idleness for the others to end after a process has failed
SIZE = ["--image_size", "8", "--train_fraction", "0.1", "--batch_size", "48"]  # 3 batches an epoch
SHORT = [*SIZE, "--epochs", "2"]
TEACHERS = {
    "vanilla": ["--smoothing", "0.1"],
    "vanilla anchors": ["--anchors", "2", "--val_fraction", "0.2"],
    "mse": [],
    "sftn": ["--student", "resnet8"],
    "gtn": TINY_POOL,
    "gtn holdout": [*TINY_POOL, "--gate_holdout", "0.3", "--save_supernet"],
    "gtn students": [*TINY_POOL, "--pool_students", "pool:1", "pool:2", "--gate_steps", "add"],
}
STUDENTS = {name: [] for name in METHODS} | {
    "at+kd": [],
    "kd cached": ["--cache_teacher", "memory"],
    "kd rarely": ["--checkpointing_epochs", "2", "--with_tracking"],
    "kdcl_general": ["--val_fraction", "0.2"],
}


@dataclass(frozen=True)
class Result:
    """What a run came to: each process' exit code, and its words."""

    codes: list[int]
    stdout: str
    stderrs: list[str]

    @property
    def code(self) -> int:
        """0 if all processes ended well, else the first other code."""
        return next((code for code in self.codes if code != 0), 0)

    def check_words(self, script: str) -> None:
        """Raise Failure for a traceback, and for an end in words that are not the script's one line."""
        if any(code not in (0, 1, 2, 130, 143, -6, -9, -15) for code in self.codes):
            raise Failure("tracebacks", f"exit codes {self.codes}\n{self.stderrs}")
        for code, words in zip(self.codes, self.stderrs, strict=True):
            if code == -6 and "memory allocation of" in words:  # safetensors ends the process, unasked
                continue
            if code == -6 or "Traceback (most recent call last)" in words:
                raise Failure("tracebacks", words[-3000:])
            lines = words.strip().splitlines()
            if code > 0 and any(not line.startswith(f"{Path(script).name}: ") or RAW.search(line) for line in lines):
                raise Failure("untidy", f"exit code {code}\n{words[-3000:]}")
        if self.code in (1, 2) and not any(words.strip() for words in self.stderrs):
            raise Failure("untidy", f"exit codes {self.codes} without a word")


class Real:
    """A process as a user starts it, with the interpreter's start; to be used like `Fork`."""

    def __init__(self, *arguments, **environment):
        self.output = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115 - read after its end
        words, env = [sys.executable, *map(str, arguments)], {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = dict(zip(("stdout", "stderr"), self.output, strict=True))
        self.process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env | environment, **pipes)
        self.pid = self.process.pid
        self.send_signal, self.kill = self.process.send_signal, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self) -> list[str]:
        self.process.wait()
        for file in self.output:
            file.seek(0)
        return [file.read() for file in self.output]


def begin(script: str, arguments: list, processes: int = 1, plan: dict | None = None, real: bool = False) -> list:
    """Start a run; of several processes as a launcher does."""
    ranks = [{}]
    if processes > 1:
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8:strict"}
    words = [CHILD, json.dumps(plan or {}), str(ROOT / script), *map(str, arguments)]
    return [(Real if real else Fork)(*words, **environment, **rank) for rank in ranks]


def finish(ranks: list) -> Result:
    """Wait for a run's end. Raises Failure if it does not come.

    Where one process has ended before all had come together, the others wait for it in PyTorch's rendezvous; they get
    the SIGTERM that a launcher would have sent long before.
    """
    patience, idle, before, ended = PATIENCE, 0.0, time.monotonic(), False
    while None in [rank.wait(0.02) for rank in ranks]:  # of each, to hear of the one that has ended
        now = time.monotonic()
        idle += 0 if any(is_at_work(rank.pid) for rank in ranks) else now - before
        before = now
        if any(rank.returncode for rank in ranks):
            patience = FAREWELL
        if idle > patience and not ended and not any(map(has_written, ranks)):
            ended, idle = True, 0.0
            for rank in ranks:
                if rank.returncode is None:
                    rank.send_signal(signal.SIGTERM)
        if idle > patience or max(processor_seconds(rank.pid) for rank in ranks) > PATIENCE:
            for rank in ranks:
                rank.kill()
            raise Failure("hung", f"still running; what it wrote: {[rank.communicate() for rank in ranks]}")
    outputs = [rank.communicate() for rank in ranks]
    return Result([rank.returncode for rank in ranks], outputs[0][0], [words for _, words in outputs])


def has_written(rank: Fork | Real) -> bool:
    """Whether a process has said anything yet, which the first does when training begins."""
    return any((os.stat(each) if isinstance(each, Path) else os.fstat(each.fileno())).st_size for each in rank.output)


def is_at_work(process: int) -> bool:
    """Whether a thread of it computes, or would if the machine were not busy with something else: it does not hang."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return any((task / "stat").read_text().rpartition(")")[2].split()[0] == "R" for task in tasks)
    except OSError:
        return False


def processor_seconds(process: int) -> float:
    try:
        numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Bases:
    """Finished runs that others start from, and what undisturbed runs came to; made when first asked for."""

    folder: Path
    finished: dict[Path, dict[str, bytes]] = field(default_factory=dict)
    measured: dict[str, tuple[str, int, float]] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> Path:
        return self._made("teacher", ["--model", "resnet8", *SHORT, "--anchors", "2"])

    @cached_property
    def generic(self) -> Path:
        return self._made("generic", ["--method", "gtn", "--model", "resnet8", *SHORT, *TINY_POOL])

    def _made(self, name: str, arguments: list) -> Path:
        folder = self.folder / name
        result = finish(begin("train_teacher.py", [*arguments, "--output_dir", folder]))
        assert result.code == 0, result
        self.finished[folder] = contents(folder)
        return folder

    def check(self) -> None:
        """Raise Failure if a run that others only read has changed."""
        for folder, before in self.finished.items():
            if contents(folder) != before:
                raise Failure("lost", f"{folder}, which runs only read, has changed")


@dataclass
class Scenario:
    """A command without its folder, and in how many processes it runs."""

    script: str
    arguments: list
    processes: int

    def shown(self, folder: Path, *more) -> str:
        words = ["python", self.script, *map(str, self.command(folder, *more))]
        return shlex.join(words) + f" ({self.processes} process(es))"

    def command(self, folder: Path, *more) -> list:
        return [*self.arguments, "--output_dir", folder, *more]

    def run(self, folder: Path, *more, plan: dict | None = None, real: bool = False) -> Result:
        result = finish(begin(self.script, self.command(folder, *more), self.processes, plan, real))
        result.check_words(self.script)
        return result

    def reference(self, bases: Bases) -> tuple[str, int, float]:
        """(digest of the weights of the undisturbed run, its operations on files, seconds), measured once."""
        key = self.shown(Path())
        if key not in bases.measured:
            folder = bases.folder / f"reference{len(bases.measured)}"
            count, start = folder.with_suffix(".count"), time.monotonic()
            result = self.run(folder, plan={"folder": str(folder), "count": str(count), "rank": 0, "plots": True})
            if result.code != 0:
                raise Failure("untidy", f"undisturbed: {self.shown(folder)}\n{result}")
            bases.measured[key] = weights(folder), int(count.read_text()), time.monotonic() - start
        return bases.measured[key]


def draw_scenario(seed: int, number: int, bases: Bases) -> Scenario:
    """A teacher's run or a student's, a fifth of them in two processes; cases that follow each other share one."""
    random = Random(derive_seed(seed, "scenario", number // SHARED))
    processes = 2 if random.random() < 0.2 else 1
    if random.random() < 0.4:
        name = random.choice(list(TEACHERS))
        arguments = ["--method", name.split()[0], "--model", "resnet8", *SHORT, *TEACHERS[name]]
        return Scenario("train_teacher.py", arguments, processes)
    name = random.choice(list(STUDENTS))
    method = METHODS[name.split()[0].partition("+")[0]]
    arguments = ["--method", name.split()[0], "--student", "resnet8", *SHORT, "--lr", "0.01", *STUDENTS[name]]
    if method.needs_teacher:
        arguments += ["--teacher", bases.teacher]
    if method.warmup_epochs:
        arguments += ["--warmup_epochs", "1"]
    return Scenario("distill.py", arguments, processes)


def weights(run: Path) -> str:
    """The digest of a finished run's model."""
    path = run / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no model"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
