"""What a cluster's job does: it has a process of its own make a run, on a machine that sees the same files.

Jobs wait here, so this imports nothing large; `python -m comparing` does.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Task:
    """A run to be made.

    Attributes:
        run: what comparing/__main__.py reads.
        log: what the run prints is appended to it.
        folder: relative paths are of this one.
    """

    run: str
    log: str
    folder: str

    def __call__(self) -> int:
        """The run's exit status; interrupted, it first waits until the run has saved itself."""
        words = [sys.executable, "-m", "comparing", str(os.getpid())]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.log, "ab") as log:
            output = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
            process = subprocess.Popen(words, cwd=self.folder, env=environment, **output)
        try:
            with process.stdin as told:
                told.write(self.run.encode())
            while process.poll() is None:  # Ray's interruption does not wake a system call
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
        return process.returncode

    def checkpoint(self):
        """What submitit queues when the job's time is over: the same, which goes on from the run's checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
