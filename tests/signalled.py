"""python tests/signalled.py SIGNAL ITERATION[@RANK] SCRIPT ...: the script, which sends itself a signal before it.

What a launcher starts again is left alone.
"""

import os
import runpy
import sys

from engine.loop import Loop

_, signum, place, *sys.argv = sys.argv
iteration, _, rank = place.partition("@")
step = Loop.step


def signalled(loop, batch, totals) -> None:
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and loop.progress.iteration == int(iteration) and rank in ("", str(loop.rank)):
        os.kill(os.getpid(), int(signum))
    step(loop, batch, totals)


Loop.step = signalled
runpy.run_path(sys.argv[0], run_name="__main__")
