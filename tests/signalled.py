"""python tests/signalled.py SIGNAL ITERATION SCRIPT ...: the script, sending itself a signal before an iteration."""

import os
import runpy
import sys

from engine.loop import Loop

_, signum, iteration, *sys.argv = sys.argv
step = Loop.step


def signalled(loop, batch, totals) -> None:
    if loop.progress.iteration == int(iteration):
        os.kill(os.getpid(), int(signum))
    step(loop, batch, totals)


Loop.step = signalled
runpy.run_path(sys.argv[0], run_name="__main__")
