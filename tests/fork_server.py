"""Runs scripts in forks of one process that has imported all they need: starting Python anew takes seconds each.

python -m tests.fork_server answers JSON lines on stdin with JSON lines on stdout:
    {"argv": what follows `python`, "env": {...}, "stdout": path, "stderr": path}  -> process id
    {"wait": process id, "seconds": how long at the most}                  -> exit status, null while it runs

Until it forks it has one thread, and has computed nothing: threads do not survive a fork.
"""

import atexit
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


def serve() -> None:
    """Answer until stdin ends, then kill what still runs."""
    import sklearn.datasets  # noqa: F401
    import torch._dynamo

    import distill  # noqa: F401
    import engine.plots  # noqa: F401
    import evaluate  # noqa: F401
    import export  # noqa: F401
    import train_teacher  # noqa: F401

    torch.set_num_threads(1)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
            if answer is not None:
                running.discard(request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def wait(process: int, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if it has not ended after that time."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


def become(argv: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    """Run a script, a module (-m) or code (-c) as `python` would, and end the process."""
    for number, path in enumerate((os.devnull, stdout, stderr)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    code = 0
    try:
        sys.argv = argv if argv[0] not in ("-m", "-c") else argv[1:]
        if argv[0] == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            exec(argv[1], {"__name__": "__main__"})
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as the interpreter's end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
