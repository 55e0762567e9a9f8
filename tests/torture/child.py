"""python tests/torture/child.py PLAN SCRIPT ...: the script, in which something happens at a moment of the plan.

PLAN is JSON. Moments are operations on files (to open for writing, sync, rename, link, remove, make a folder) below
`folder`, counted from 1, or iterations of the training loop:

    folder, count     write to the file `count` how many operations there were
    folder, at        before operation `at`: `signal`, or OSError of `errno`, there only or `onwards`
    iteration         `signal` before this iteration
    rank              the only process to which it happens; default: each
    plots             draw the plots at the end, half of the time of such a small run; default: leave them out
    memory            bytes that it may take on top of what it starts with
    cwd               where it runs
"""

import errno
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

PATHS_OF = {  # of an audit event: which of its arguments are paths, and which is the folder that a path is relative to
    "open": ([0], None),
    "os.mkdir": ([0], 2),
    "os.rename": ([0, 1], None),
    "os.link": ([0, 1], None),
    "os.remove": ([0], 1),
    "os.rmdir": ([0], 1),
    "os.truncate": ([0], None),
}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moments:
    """Counts the operations of this process on the files below a folder, and strikes."""

    def __init__(self, plan: dict):
        self.plan, self.folder, self.done, self.own = plan, os.path.realpath(plan["folder"]), 0, os.getpid()
        self.sync = os.fsync
        sys.addaudithook(self.hear)
        os.fsync = self.fsync

    def hear(self, event: str, arguments: tuple) -> None:
        if event not in PATHS_OF or (event == "open" and not (arguments[2] or 0) & TO_WRITE):
            return
        numbers, base = PATHS_OF[event]
        paths = [arguments[number] for number in numbers]
        if any(isinstance(path, (str, bytes, os.PathLike)) and self._is_below(path, arguments, base) for path in paths):
            self.operation(os.fsdecode(paths[0]))

    def fsync(self, file) -> None:
        file = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{file}")
        if path.startswith(self.folder + "/"):
            self.operation(path, file)
        self.sync(file)

    def _is_below(self, path, arguments: tuple, base: int | None) -> bool:
        path = os.fsdecode(path)
        if base is not None and isinstance(arguments[base], int) and arguments[base] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[base]}"), path)
        return os.path.abspath(path).startswith(self.folder)

    def operation(self, path: str, file: int | None = None) -> None:
        if os.getpid() != self.own:
            return
        self.done += 1
        at = self.plan.get("at", 0)
        if self.done == at and "signal" in self.plan:
            if file is not None:  # as if it had come while the file was being written
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(self.own, self.plan["signal"])
        if "errno" in self.plan and (self.done == at or (self.plan.get("onwards") and self.done > at)):
            number = getattr(errno, self.plan["errno"])
            raise OSError(number, os.strerror(number), path)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes on top of what it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (taken + more,) * 2)


def strike_before(iteration: int, signum: int) -> None:
    from engine.loop import Loop

    step = Loop.step

    def struck(loop, batch, totals) -> None:
        if loop.progress.iteration == iteration:
            os.kill(os.getpid(), signum)
        step(loop, batch, totals)

    Loop.step = struck


def main() -> None:
    plan = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    script = os.path.abspath(sys.argv[0])
    moments = None
    if "memory" in plan:
        limit_memory(plan["memory"])
    if plan.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0)):
        if "folder" in plan:
            moments = Moments(plan)
        if "iteration" in plan:
            strike_before(plan["iteration"], plan["signal"])
    if not plan.get("plots"):
        import engine.plots

        engine.plots.plot_run = lambda history, folder: []
    if "cwd" in plan:
        os.chdir(plan["cwd"])
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if moments and "count" in plan:
            Path(plan["count"]).write_text(str(moments.done))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()
