"""python -m comparing PARENT: make the run that stdin tells (comparing/task.py) in a process that ends with its parent.

An executor's job starts it on the machine that the run got (comparing/elsewhere.py).
"""

import signal
import sys

from engine.forks import end_with


def main() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # for the job above, which has this process save itself
    end_with(int(sys.argv[1]), signal.SIGTERM)
    from comparing.making import make  # which takes seconds
    from comparing.task import read_task

    make(*read_task(sys.stdin.read()))


if __name__ == "__main__":
    main()
