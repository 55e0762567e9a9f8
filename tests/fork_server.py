"""Runs scripts in forks of one process that has imported all they need: starting Python anew takes seconds each.

python -m tests.fork_server answers JSON lines on stdin with JSON lines on stdout:
    {"argv": what follows `python`, "env": {...}, "stdout": path, "stderr": path}  -> process id
    {"wait": process id, "seconds": how long at the most}                  -> exit status, null while it runs

Until it forks it has one thread, and has computed nothing: threads do not survive a fork.
"""

import json
import os
import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]


def serve() -> None:
    """Answer until stdin ends, then kill what still runs."""
    import distill  # noqa: F401
    import evaluate  # noqa: F401
    import export  # noqa: F401
    import train_teacher  # noqa: F401
    from engine.forks import Fork, be_forked_from

    be_forked_from()
    running: dict[int, Fork] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(running[request["wait"]], request["seconds"])
        else:
            output = request["stdout"], request["stderr"]
            fork = Fork(partial(become, request["argv"]), output, request["env"])
            answer, running[fork.pid] = fork.pid, fork
        print(json.dumps(answer), flush=True)
    for fork in running.values():
        fork.send_signal(signal.SIGKILL)


def wait(fork, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if it has not ended after that time."""
    end = time.monotonic() + seconds
    while (code := fork.poll()) is None and time.monotonic() < end:
        time.sleep(0.005)
    return code


def become(argv: list[str]) -> None:
    """Run a script, a module (-m) or code (-c) as `python` would."""
    os.chdir(ROOT)
    sys.argv = argv if argv[0] not in ("-m", "-c") else argv[1:]
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        exec(argv[1], {"__name__": "__main__"})
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
