"""Run by tests/test_distill_methods.py: distill.py again and again in one process, which saves starting Python.

python tests/methods_driver.py RUNS, RUNS being JSON: [[stop, arguments], ...]. With a number for `stop` the run gets
a SIGTERM in that iteration, and then goes on from its checkpoint.
"""

import json
import os
import signal
import sys

import distill
from engine.distributed import Interrupted
from engine.loop import Loop

STEP = Loop._step


def run(arguments: list[str], stop: int | None) -> None:
    def step(loop, batch, totals):
        if loop.progress.iteration == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        STEP(loop, batch, totals)

    Loop._step = step
    sys.argv = ["distill.py", *arguments]
    distill.main()


for stop, arguments in json.loads(sys.argv[1]):
    print(f"== {' '.join(arguments)}", flush=True)
    if stop is not None:
        try:
            run(arguments, stop)
            raise SystemExit(f"was not stopped in iteration {stop}")
        except Interrupted as interruption:
            print(interruption)
            arguments = [*arguments, "--resume_from_checkpoint", "latest"]
    run(arguments, None)
