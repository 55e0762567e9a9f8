"""python tests/torture/many.py REQUESTS ANSWERS MEMORY: many command lines one after the other in this process.

REQUESTS and ANSWERS are pipes; a line of the first is {"script", "argv", "cwd", "output": folder for what it writes}, a
line of the second its exit code, or "traceback". Starting a process for each costs far more than reading its options.
"""

import contextlib
import json
import os
import select
import sys
import traceback
from pathlib import Path

from tests.runs import Fork
from tests.torture.child import limit_memory
from tests.torture.report import Failure
from tests.torture.runs import PATIENCE, Result, processor_seconds

MOST = 100  # command lines before the next process: what one leaves behind shall not add up
BEGUN = 10  # seconds of computing after which a run that trains counts as taken


class Many:
    """The other end: asks a process, and starts another when that is gone."""

    def __init__(self, folder: Path, memory: int):
        self.folder, self.memory, self.process, self.left = folder, memory, None, 0
        folder.mkdir()

    def ask(self, script: str, argv: list, place: Path) -> Result | None:
        """What a script came to; None where it was still training after a while, and was ended.

        Raises:
            Failure: it hangs.
        """
        if self.left == 0:
            self._start()
        self.left -= 1
        request = {"script": script, "argv": list(map(str, argv)), "cwd": str(place / "cwd"), "output": str(place)}
        os.write(self.requests, (json.dumps(request) + "\n").encode())
        begin = processor_seconds(self.process.pid)
        for _ in range(10 * PATIENCE):
            if select.select([self.answers], [], [], 0.1)[0]:
                code = json.loads(os.read(self.answers, 100))
                return Result([1 if code == "traceback" else code], *self._words(place))
            if self.process.poll() is not None:
                self.left = 0
                return Result([self.process.returncode], *self._words(place))
            if processor_seconds(self.process.pid) - begin > BEGUN and "training and " in self._words(place)[0]:
                self._end()
                return None
        self._end()
        raise Failure("hung", f"{self._words(place)}")

    def _start(self) -> None:
        self._end()
        pipes = [self.folder / name for name in ("requests", "answers")]
        for pipe in pipes:
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe)
        self.requests, self.answers = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        self.process, self.left = Fork("tests/torture/many.py", *pipes, self.memory), MOST

    def _end(self) -> None:
        self.left = 0
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None
            os.close(self.requests)
            os.close(self.answers)

    @staticmethod
    def _words(place: Path) -> tuple[str, list[str]]:
        out, err = ((place / name).read_text(errors="replace") if (place / name).exists() else "" for name in WORDS)
        return out, [err]


WORDS = ("stdout", "stderr")


def answer(script: str, argv: list[str], cwd: str, output: str) -> int | str:
    from accelerate.state import AcceleratorState

    import distill
    import train_teacher
    from engine.distributed import run_script

    main = {"train_teacher.py": train_teacher.main, "distill.py": distill.main}[script]
    sys.argv = [script, *argv]
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.ExitStack() as files:
        out, err = (files.enter_context(open(Path(output, name), "w", errors="backslashreplace")) for name in WORDS)
        for number, file in ((1, out), (2, err)):  # what C code says there, too
            os.dup2(file.fileno(), number)
        try:
            with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_script(main)
        except SystemExit as end:
            return end.code or 0
        except BaseException:
            traceback.print_exc(file=err)
            return "traceback"
    return 0


if __name__ == "__main__":
    import engine.plots

    engine.plots.plot_run = lambda history, folder: []
    _, requests, answers, memory = sys.argv
    limit_memory(int(memory))
    with open(requests) as asked, open(answers, "w") as answered:
        for line in asked:
            print(json.dumps(answer(**json.loads(line))), file=answered, flush=True)
