"""Whether the tests notice wrong code: plants the faults of tests/faults.yaml, one at a time, and runs their tests.

python -m tests.mutate
python -m tests.mutate --jobs 4 --only losses/

A fault is planted in a temporary copy of the tree, never in this one, and its tests run in a fork of one process that
has the libraries imported. Without any fault they must pass. Exit status 1 where less than 95% of the faults are
caught, or a fault's line is no longer there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
WANTED = 0.95
PATIENCE = 600  # seconds after which a fault counts as noticed: something hangs
CAUGHT, SURVIVED, HUNG, BROKEN = "caught", "SURVIVED", "hung", "BROKEN"


class Fault(NamedTuple):
    """`old`, which stands once in `file`, is replaced by `new`; `tests` are what pytest is given."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def place(self) -> str:
        return f"{self.file}: {' '.join(self.new.split())[:90]}"


def read_faults(part: str) -> list[Fault]:
    """Those of one part of tests/faults.yaml: "faults", or "once_missed"."""
    groups = yaml.safe_load((ROOT / "tests" / "faults.yaml").read_text())[part]
    return [Fault(g["file"], each["old"], each["new"], tuple(g["tests"])) for g in groups for each in g["faults"]]


@dataclass
class Job:
    """A fork that runs tests in a copy of the tree."""

    fault: Fault | None
    tests: tuple[str, ...]
    copy: Path
    process: int
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose file, line or tests contain one of these")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    parser.add_argument("--once_missed", action="store_true", help="what no test noticed once, instead of the others")
    options = parser.parse_args()
    faults = read_faults("once_missed" if options.once_missed else "faults")
    faults = [fault for fault in faults if any(words in " ".join(map(str, fault)) for words in options.only)]
    preload()
    with tempfile.TemporaryDirectory() as folder:
        sound = copy_tree(Path(folder) / "sound")
        check(sound, faults)
        copies = [shutil.copytree(sound, Path(folder) / str(number)) for number in range(options.jobs)]
        outcomes = run_all(faults, sound, copies)
    sys.exit(report(faults, outcomes))


def preload() -> None:
    """Import what tests need from elsewhere; nothing of this tree, which differs from fork to fork."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import accelerate  # noqa: F401
    import docstring_parser  # noqa: F401
    import jsonargparse  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch._dynamo
    import torchvision  # noqa: F401

    torch.set_num_threads(1)  # no thread survives a fork


def copy_tree(target: Path) -> Path:
    """The files that git knows, as they are here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def check(sound: Path, faults: list[Fault]) -> None:
    """Run the tests of all faults without any. What is compiled here need not be again with each fault."""
    every = tuple(sorted({test for fault in faults for test in fault.tests}))
    job = start(None, every, sound)
    while (outcome := poll(job)) is None:
        time.sleep(0.02)
    if outcome != SURVIVED:
        print((sound / "output").read_text()[-6000:])
        sys.exit("the tests fail without a fault")


def run_all(faults: list[Fault], sound: Path, copies: list[Path]) -> dict[Fault, str]:
    """What became of every fault."""
    waiting, running, outcomes, free = list(faults), [], {}, list(copies)
    while waiting or running:
        while waiting and free:
            fault, copy = waiting.pop(0), free.pop()
            if plant(fault, sound, copy):
                running.append(start(fault, fault.tests, copy))
            else:
                outcomes[fault] = BROKEN
                free.append(copy)
        for job in list(running):
            if (ended := poll(job)) is None:
                continue
            outcomes[job.fault] = ended
            running.remove(job)
            shutil.copy2(sound / job.fault.file, job.copy / job.fault.file)
            free.append(job.copy)
            print(f"{len(outcomes):>4} of {len(faults)}  {outcomes[job.fault]:<8}  {job.fault.place()}", flush=True)
        time.sleep(0.02)
    return outcomes


def plant(fault: Fault, sound: Path, copy: Path) -> bool:
    """Put a fault into a copy of a sound tree; False where its line is not there once."""
    text = (sound / fault.file).read_text()
    if text.count(fault.old) != 1 or fault.old == fault.new:
        return False
    (copy / fault.file).write_text(text.replace(fault.old, fault.new))
    return True


def start(fault: Fault | None, tests: tuple[str, ...], copy: Path) -> Job:
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.setsid()
        become_pytest(tests, copy, compiled=fault is None)
    return Job(fault, tests, copy, process, time.monotonic() + PATIENCE)


def become_pytest(tests: tuple[str, ...], copy: Path, compiled: bool) -> None:
    """`compiled`: keep what Python compiles, which is never done of a file with a fault in it."""
    import pytest

    sys.dont_write_bytecode = not compiled
    if not compiled:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    file = os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    code = 70
    try:
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def poll(job: Job) -> str | None:
    """How a job ended; None while it runs. A signal that ends the tests is a fault that was noticed."""
    ended, status = os.waitpid(job.process, os.WNOHANG)
    if ended:
        code = os.waitstatus_to_exitcode(status)
        return {0: SURVIVED, 1: CAUGHT, 2: CAUGHT}.get(code, CAUGHT if code < 0 else BROKEN)  # 2: it cannot be imported
    if time.monotonic() < job.end or job.fault is None:
        return None
    os.killpg(job.process, 9)
    os.waitpid(job.process, 0)
    return HUNG


def report(faults: list[Fault], outcomes: dict[Fault, str]) -> int:
    """Print the survivors and the counts by part; the exit status."""
    lost = [fault for fault in faults if outcomes[fault] in (SURVIVED, BROKEN)]
    for fault in lost:
        print(f"\n{outcomes[fault]}  {fault.place()}\n  - {fault.old.strip()}\n  + {fault.new.strip()}")
        print(f"  {' '.join(fault.tests)}")
    parts = Counter(fault.file.split("/")[0] for fault in faults)
    gone = Counter(fault.file.split("/")[0] for fault in lost)
    print("\n" + "\n".join(f"{part:<18} {count - gone[part]:>3} of {count:>3} caught" for part, count in parts.items()))
    share = 1 - len(lost) / max(1, len(faults))
    print(f"{'all':<18} {len(faults) - len(lost):>3} of {len(faults):>3} caught ({100 * share:.1f}%)")
    return int(share < WANTED or BROKEN in outcomes.values())


if __name__ == "__main__":
    main()
