"""Starting the real scripts from tests."""

import atexit
import contextlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from engine.distributed import run_script

ROOT = Path(__file__).parents[1]
TINY = ["--model", "resnet8", "--image_size", "8", "--batch_size", "128", "--epochs", "1"]
TINY_POOL = ["--pool.stem", "4", "--pool.head", "8", "--pool.candidates", "res3x2", "identity", "zero"]
TINY_POOL += ["--pool.widths", "4", "4", "4", "8", "8", "8", "--pool.strides", "1", "1", "1", "2", "2", "1"]
TINY_GTN = ["--method", "gtn", *TINY, *TINY_POOL]
PATIENCE = 300  # seconds until a run that does not end is given up


class Fork:
    """A script, or what else follows `python`, in a fork of this worker's server (tests/fork_server.py)."""

    def __init__(self, script: str, *arguments, **environment):
        self.args = [str(script), *map(str, arguments)]
        self.folder = tempfile.TemporaryDirectory()
        self.output = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.returncode: int | None = None
        stdout, stderr = map(str, self.output)
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.server = _server(env.get("TRITON_INTERPRET"))
        self.pid = self._ask(argv=self.args, env=env, stdout=stdout, stderr=stderr)

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        end = time.monotonic() + seconds
        while self.returncode is None:
            left = end - time.monotonic()
            self.returncode = self._ask(wait=self.pid, seconds=max(0, min(left, 1)))  # the server sees its end in time
            if left <= 0:
                break
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """What it wrote, after its end."""
        if self.wait() is None:
            self.kill()
            self.wait()
            raise subprocess.TimeoutExpired(self.args, PATIENCE, *(path.read_bytes() for path in self.output))
        stdout, stderr = (path.read_text(errors="replace") for path in self.output)
        return stdout, stderr

    def completed(self) -> subprocess.CompletedProcess:
        stdout, stderr = self.communicate()
        return subprocess.CompletedProcess(self.args, self.returncode, stdout, stderr)

    def _ask(self, **request) -> int | None:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def forked(script: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """What `python script arguments` does, forked."""
    return Fork(script, *arguments, **environment).completed()


def forked_processes(count: int, script: str, *arguments, on_cpu: bool = True) -> subprocess.CompletedProcess:
    """What `accelerate launch --multi_gpu --num_processes count` does, forked, with the environment that it sets.

    Without `on_cpu` in the way that goes wrong on a machine without GPUs.
    """
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    shared |= {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    ranks = [Fork(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)]
    end = time.monotonic() + PATIENCE
    while any(rank.wait(0.02) is None for rank in ranks) and time.monotonic() < end:
        if any(rank.returncode for rank in ranks):  # the others may wait for it
            end = min(end, time.monotonic() + 5)
    for rank in ranks:
        rank.kill()
    outputs = [rank.communicate() for rank in ranks]
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(ranks[0].args, code, *map("".join, zip(*outputs, strict=True)))


def forked_two(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    return forked_processes(2, script, *arguments, **options)


def forked_signalled(signum: int, iteration: int, script: str, *arguments) -> subprocess.CompletedProcess:
    """`forked`, getting a signal before an iteration."""
    return forked("tests/signalled.py", int(signum), iteration, script, *arguments)


def here(script: str, *arguments) -> subprocess.CompletedProcess:
    """`forked` without a process of its own, for what ends before it trains."""
    main = importlib.import_module(script.removesuffix(".py")).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    threads = torch.get_num_threads()
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def python(script: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """`python script arguments` itself, where the interpreter's start or its environment matters."""
    return command([sys.executable, script, *arguments], **environment)


def launch(script: str, *arguments) -> subprocess.CompletedProcess:
    """Through `accelerate launch` itself with the shipped configuration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--config_file", "accelerate_config.yaml"]
    return command([*launcher, script, *arguments])


def launch_two(script: str, *arguments) -> subprocess.CompletedProcess:
    """Through `accelerate launch` itself, two processes on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", free_port()]
    return command([*launcher, script, *arguments], ACCELERATE_USE_CPU="true")


def command(words: list, **environment) -> subprocess.CompletedProcess:
    """Any command, run in the repository's root, with stdout and stderr as text."""
    environment = {"PYTHONPATH": str(ROOT)} | os.environ | environment
    words = list(map(str, words))
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def trained_alone(folder: Path) -> Path:
    """`folder`, a run of distill.py: resnet8 without a teacher on 8x8 digits, one epoch."""
    words = ["--method", "none", "--student", "resnet8", "--dataset", "digits", "--output_dir", folder, *TINY[2:]]
    succeeded(forked("distill.py", *words))
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


@cache
def _server(triton_interpret: str | None) -> subprocess.Popen:
    """The worker's own, which ends with it; another one where Triton, when it is imported, shall interpret."""
    words = [sys.executable, "-m", "tests.fork_server"]
    # Looking for GPUs as CUDA does it would leave forks without any.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if triton_interpret is not None:
        environment["TRITON_INTERPRET"] = triton_interpret
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # which ends it; the last to register is called first
    return server
