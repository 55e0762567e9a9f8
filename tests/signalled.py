"""python tests/signalled.py SIGNAL ITERATION[@RANK] SCRIPT ...: the script, which sends itself a signal before it.

What a launcher starts again is left alone; the process that was killed comes last, when the others look for it already.
"""

import os
import runpy
import sys
import time

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
if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["RANK"] == rank:
    time.sleep(2)
runpy.run_path(sys.argv[0], run_name="__main__")
