"""python -m tests.restarts --kills 10: SIGKILLs of random processes of a run that its launcher starts again.

The run is `accelerate launch --max_restarts KILLS` of two processes on the CPU, with --resume_from_checkpoint latest in
its command. A process dies while it starts, trains or saves; the launcher ends the other and starts both again. In the
end the weights must be those of a run left alone; exit code 1 if they are not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.runs import ROOT, TINY_GTN, free_port, read_json

RUN = [*TINY_GTN, "--train_fraction", "0.2", "--batch_size", "64", "--gate_every", "4"]
STARTING = 8  # seconds that a process takes until it trains, about


def main() -> int:
    """Kill, compare, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        assert start(whole, options).wait() == 0
        launcher, kills, start_time = start(killed, options), [], time.monotonic()
        for number in range(options.kills):
            if (kill := strike(launcher, killed, chance)) is None:
                print(f"the run was over after {number} kills: more --epochs leave time for all")
                break
            kills.append(kill)
            print(f"kill {number + 1}: {kill}", flush=True)
        code, seconds = launcher.wait(), time.monotonic() - start_time
        same = code == 0 and digest(whole) == digest(killed)
        print(f"{len(kills)} kills in {seconds:.0f} s, exit code {code}: {'identical' if same else 'OTHER WEIGHTS'}")
        return int(not same or len(kills) < options.kills)


def start(folder: Path, options) -> subprocess.Popen:
    """The run, through the launcher."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--multi_gpu", "--num_processes", "2"]
    words += ["--main_process_port", str(free_port()), "--max_restarts", str(options.kills), "train_teacher.py"]
    words += [*RUN, "--epochs", str(options.epochs), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = open(folder.with_suffix(".log"), "w")  # noqa: SIM115 - the process has it
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)


def strike(launcher: subprocess.Popen, folder: Path, chance: random.Random) -> str | None:
    """SIGKILL one of the launcher's processes at a random moment; None if the run is over before."""
    began = time.monotonic()
    epochs, starting = rows(folder), chance.random() < 0.3
    while launcher.poll() is None and not children(launcher.pid):
        time.sleep(0.05)
    if starting:
        time.sleep(chance.uniform(0, STARTING))
    else:
        while launcher.poll() is None and rows(folder) <= epochs:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
    alive = children(launcher.pid)
    if not alive:
        return None
    rank = chance.randrange(len(alive))
    os.kill(alive[rank], signal.SIGKILL)
    after = f"after {time.monotonic() - began:.1f} s and {rows(folder)} epochs"
    while launcher.poll() is None and set(alive) & set(children(launcher.pid)):
        time.sleep(0.05)
    return f"process {rank} {after}" + (" (while starting)" if starting else "")


def children(parent: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    try:
        return [int(each) for each in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def rows(folder: Path) -> int:
    """Epochs that are done."""
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def digest(folder: Path) -> str:
    return read_json(folder / "model.json")["sha256"]


if __name__ == "__main__":
    sys.exit(main())
