"""Work in forks of one process that has imported all that it needs: starting Python anew takes seconds each time.

Until it forks, that process must have one thread and have computed nothing with several (threads do not survive a
fork), and must not have looked for GPUs as CUDA does it (a fork could use none): `be_forked_from` sees to both.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from common import UserError

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl.h


def be_forked_from() -> None:
    """Make this process one to be forked from: it computes with one thread, and has what every run imports."""
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo
    import torch.distributed.tensor

    import engine.plots  # noqa: F401

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    torch.set_num_threads(1)


class Fork:
    """A fork of this process that does `work` and ends as a Python process of its own would.

    Args:
        work: what it does. SystemExit's code, or 1 for another exception, is its exit status.
        output: stdout and stderr, files that are appended to; None: this process's own.
        environment: all of its environment variables; None: this process's.
        cores: the cores that it may use; None: all of this process's.
        dies_with: the signal that it gets when this process ends before it, however that ends.
    """

    def __init__(
        self,
        work: Callable[[], None],
        output: tuple[Path | str, Path | str] | None = None,
        environment: Mapping[str, str] | None = None,
        cores: set[int] | None = None,
        dies_with: int | None = None,
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            _disown()
            if dies_with is not None:
                end_with(parent, dies_with)
            if output:
                _redirect(output)
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            if cores:
                os.sched_setaffinity(0, cores)
            code = _exit_code(work)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def wait(self) -> int:
        """The exit status, negative for a signal, once it has ended."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def result_of(function: Callable[[], object]) -> object:
    """What `function` returns, computed in a fork; it is to be something that JSON can say.

    Raises:
        UserError: as the function does.
        ChildProcessError: it fails otherwise; its traceback has been printed.
    """
    with tempfile.NamedTemporaryFile() as file:

        def work() -> None:
            try:
                answer = {"result": function()}
            except UserError as error:
                answer = {"error": str(error)}
            Path(file.name).write_text(json.dumps(answer))

        if code := Fork(work, dies_with=signal.SIGKILL).wait():
            raise ChildProcessError(f"a fork ended with exit status {code}")
        answer = json.loads(Path(file.name).read_text())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]


def _disown() -> None:
    """Leave to the parent what it wants done at its own end: its temporary folders are not a fork's to remove."""
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False


def _redirect(output: tuple[Path | str, Path | str]) -> None:
    for number, path in enumerate((os.devnull, *output)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def _exit_code(work: Callable[[], None]) -> int:
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as the interpreter's end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def end_with(parent: int, signum: int) -> None:
    """Have this process get a signal when its parent ends, however that ends; on Linux alone."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signum)
    if os.getppid() != parent:  # it ended before it was asked
        os.kill(os.getpid(), signal.SIGKILL)
