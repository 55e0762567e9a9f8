"""python tests/launched.py accelerate|torchrun ...: the launcher itself, whose processes are forks of it.

Everything else is the launcher's own: its command line, rendezvous, environment, signals, restarts.
"""

import os
import runpy
import signal
import sys

import accelerate.commands.launch
import torch.distributed.run
from torch.distributed.launcher.api import elastic_launch


def script(path: str, *arguments: str) -> None:
    """A script in one of the launcher's processes."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's own, which a new interpreter would not have
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


class Forking(elastic_launch):
    """The launcher's last step: its agent, told what to start."""

    def __init__(self, config, entrypoint):
        config.start_method = "fork"
        super().__init__(config, script)

    def __call__(self, *words):
        return super().__call__(*words[words.index("-u") + 1 :])


if __name__ == "__main__":
    # Two machines that share a host would each count all of its cores, and a sum's last bits follow their number.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.distributed.run.elastic_launch = Forking
    launchers = {"accelerate": accelerate.commands.launch.main, "torchrun": torch.distributed.run.main}
    launcher = launchers[sys.argv[1]]
    sys.argv = sys.argv[1:]
    launcher()
