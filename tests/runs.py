"""Starting the real scripts from tests."""

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from engine.distributed import run_script

ROOT = Path(__file__).parents[1]
TINY = ["--model", "resnet8", "--image_size", "8", "--batch_size", "128", "--epochs", "1"]
TINY_POOL = ["--pool.stem", "4", "--pool.head", "8", "--pool.candidates", "res3x2", "identity", "zero"]
TINY_POOL += ["--pool.widths", "4", "4", "4", "8", "8", "8", "--pool.strides", "1", "1", "1", "2", "2", "1"]
TINY_GTN = ["--method", "gtn", *TINY, *TINY_POOL]


def python(script: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """`python script arguments`, with stdout and stderr as text."""
    return _run([sys.executable, script, *map(str, arguments)], environment)


def here(script: str, *arguments) -> subprocess.CompletedProcess:
    """The same without a process of its own, for what ends before it trains: starting one takes seconds."""
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


def launch(script: str, *arguments) -> subprocess.CompletedProcess:
    """Through `accelerate launch` with the shipped configuration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--config_file", "accelerate_config.yaml"]
    return _run([*launcher, script, *map(str, arguments)], {})


def launch_two(script: str, *arguments, on_cpu: bool = True) -> subprocess.CompletedProcess:
    """Two processes; without `on_cpu` in the way that goes wrong on a machine without GPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port())]
    return _run([*launcher, script, *map(str, arguments)], {"ACCELERATE_USE_CPU": "true"} if on_cpu else {})


def start(script: str, *arguments) -> subprocess.Popen:
    """The script in the background."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT)} | os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
