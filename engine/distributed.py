"""The processes of a run: one accelerator each, checked; and the way every script ends."""

import ctypes
import errno
import gc
import io
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from common import UserError, derive_seed
from engine import rendezvous


class RunError(RuntimeError):
    """A run that cannot go on, through no mistake in its command: one line, exit code 1."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop by a signal, and has saved itself."""

    def __init__(self, signum: int, advice: str):
        super().__init__(advice)
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main and turn what it raises into one line and an exit code.

    0 done, 1 a run that failed, 2 a mistake of the user's, 130 Ctrl-C, 143 SIGTERM. A traceback is for bugs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    message, code = _outcome(main)
    # The processes of a machine meet a user's mistake alike; one of them says it. What only another meets, it says too.
    if code == 1 or (code and 0 in (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))):
        print(f"{os.path.basename(sys.argv[0])}: {one_line(message)}", file=sys.stderr, flush=True)
    if code != 1:  # what fails in one process alone must not wait for the others
        _give_group_back()
    if code:
        sys.exit(code)


def _outcome(main: Callable[[], None]) -> tuple[str, int]:
    """What there is to say of a script's end, and its exit code. When this returns, what `main` made is gone."""
    try:
        main()
    except UserError as error:
        return f"error: {error}", 2
    except RunError as error:
        return f"stopped: {error}", 1
    except OSError as error:
        return f"stopped: {describe(error)}", 1
    except (RuntimeError, MemoryError) as error:  # a collective operation fails where a process has gone
        if not (reason := out_of_memory(error) or lost_processes() or lost_connection(error)):
            raise
        return f"stopped: {reason}", 1
    except Interrupted as interruption:
        return str(interruption), 128 + interruption.signum
    except KeyboardInterrupt:
        return "interrupted while not training; what was saved is whole", 130
    return "", 0


@dataclass(frozen=True)
class Process:
    """One of a run's processes."""

    rank: int
    machine: int
    pid: int

    def is_alive(self) -> bool:
        """Whether it runs, as far as this machine can tell."""
        if self.machine != _machine():
            return True
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"


def _machine() -> int:
    return derive_seed(platform.node())


_processes: list[Process] = []  # of the run, known to each


def lost_processes() -> str | None:
    """Which of the run's processes are gone, in words; None if all are there.

    A process that ends takes its connections down before it is gone from the system: it gets a moment.
    """
    for _ in range(20):
        gone = [each for each in _processes if not each.is_alive()]
        if gone or not _processes:
            break
        time.sleep(0.1)
    if not gone:
        return None
    names = ", ".join(f"{each.rank} (pid {each.pid})" for each in gone)
    return (
        f"process {names} of {len(_processes)} has ended; the last checkpoint is whole. Start the same command again "
        "with --resume_from_checkpoint latest"
    )


def lost_connection(error: Exception) -> str | None:
    """What to say where a collective operation failed and no process is seen to be gone.

    It may be on another machine, be stopped, or be ending still, with its connections down already; or it never came.
    """
    words = one_line(error)
    broken = re.search(r"connection (closed|reset|refused)|timed out|NCCL|broken pipe", words, re.IGNORECASE)
    if not _processes and (isinstance(error, dist.DistError) or (broken and dist.is_initialized())):
        return (
            f"the run's processes have not come together ({words}); start all of them within --process_timeout, with "
            "the same MASTER_ADDR and MASTER_PORT"
        )
    if not broken or len(_processes) < 2:
        return None
    elsewhere = any(each.machine != _machine() for each in _processes)
    where, again = (" on another machine", " on all machines") if elsewhere else ("", "")
    patience = ", within --process_timeout" if broken[0].lower() == "timed out" else ""
    return (
        f"a process{where} has ended or cannot be reached ({broken[0]}{patience}); the last checkpoint is whole. "
        f"Start the same command again{again} with --resume_from_checkpoint latest"
    )


def out_of_memory(error: Exception) -> str | None:
    """What to do where an error says that there is not enough memory; None if it says something else."""
    words = one_line(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in words:
        return None
    wanted = re.search(r"tried to allocate (\d+ bytes|[\d.]+ [KMGT]i?B)", words, re.IGNORECASE)
    return (
        f"out of memory{f' ({wanted[1]} more were wanted)' if wanted else ''}; a smaller --batch_size, --image_size or "
        "network, or --gradient_accumulation_steps, takes less"
    )


def describe(error: OSError) -> str:
    """What happened, to which file, and what can be done."""
    advice = {
        errno.ENOSPC: "make room and go on with --resume_from_checkpoint latest; the last checkpoint is whole",
        errno.EDQUOT: "make room and go on with --resume_from_checkpoint latest; the last checkpoint is whole",
        errno.EROFS: "the file system takes no writes; choose another --output_dir",
        errno.EACCES: "choose a place that may be written to",
        errno.EIO: "the device failed; the last checkpoint that was written is whole",
    }
    where = f" ({error.filename})" if error.filename else ""
    following = f": {advice[error.errno]}" if error.errno in advice else ""
    return f"{error.strerror or error}{where}{following}"


def one_line(message: object) -> str:
    """A message, or an error's, with what would break its line, a name with a newline in it, spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))


def _give_group_back() -> None:
    """End the process group: left to the interpreter's end, its threads may abort a process that is done.

    What holds on to it goes first. DistributedDataParallel does; were it the last to let go, it would wait for the
    group's threads with Python's lock in its hands, and they for the lock (torch 2.11, gloo).
    """
    if dist.is_initialized():
        gc.collect()  # of exceptions and the frames that they passed through
        dist.destroy_process_group()


def start_accelerator(
    mixed_precision: str | None, report_to: str | None, logging_dir: str, timeout: float | None = None
) -> Accelerator:
    """The run's Accelerator, after checking that the processes know of each other and have a device each.

    `timeout` is how many seconds a process waits for the others in a collective operation; None: PyTorch's default.

    Raises:
        UserError: more processes than GPUs, several processes each of which believes to be alone, an unknown
            tracker, or a precision that the device lacks.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    gpus = 0 if on_cpu else torch.cuda.device_count()
    if gpus and local > gpus:
        raise UserError(f"--num_processes: {local} processes on this machine, but it has {gpus} GPU(s)")
    if not gpus:
        # Launchers set one thread a process; on a CPU a process should use its share of the cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    # Buffers are averaged once an epoch by the loop instead of being broadcast before every forward pass.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    group = InitProcessGroupKwargs(init_method=rendezvous.init_method() if world > 1 else None)
    if timeout:
        group.timeout = timedelta(seconds=timeout)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=report_to.split(",") if report_to else None,
            project_config=ProjectConfiguration(logging_dir, os.path.join(logging_dir, "tensorboard")),
            kwargs_handlers=[ddp, group],
        )
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: needs a GPU; on a CPU use bf16 or no")
    if accelerator.num_processes != world:
        raise UserError(
            f"{world} processes were launched that do not know of each other (each sees {accelerator.num_processes}). "
            "On CPUs launch with: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "
            f"{world} SCRIPT ..."
        )
    if world > 1:
        own = torch.tensor([[accelerator.process_index, _machine(), os.getpid()]], device=accelerator.device)
        _processes[:] = [Process(*row) for row in accelerator.gather(own).tolist()]
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what is freed, for the next step of the same sizes, where steps run on a CPU.

    It would return every block of 32 MB or more to the system at once, and the system has to clear each of
    its pages when it is taken again: a tenth and more of a step. On another device, and where the C library is
    not glibc, nothing is changed.
    """
    if device.type != "cpu":
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(mmap_max, 0)
        set_option(trim_threshold, 2**31 - 1)
        set_option(top_pad, 2**26)


class StopSignals:
    """Within it Ctrl-C and SIGTERM are noted instead of obeyed, so that the step under way can finish."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopSignals":
        self.received = 0
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.received = number
