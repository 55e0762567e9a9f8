"""What goes wrong is one line, whatever is in a name, whatever libraries say, wherever a user's method fails."""

import errno
import io
import struct
import weakref
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from common import UserError
from engine.distributed import Interrupted, RunError, run_script
from losses.registry import find_methods
from objectives.own_methods import run_with
from tests.runs import TINY, forked, here
from tests.test_security import png, teacher

NAME = "a\nb\x1b[31m\u2028c"  # a newline, a terminal's escape sequence, Unicode's line separator


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError(f"--model {NAME}: unknown"), 2),
        (RunError(f"{NAME} became nan"), 1),
        (OSError(errno.ENOSPC, "No space left on device", f"/runs/{NAME}/x"), 1),
        (Interrupted(15, f"stopped; go on with --output_dir {NAME}"), 143),
    ],
    ids=["user", "run", "file", "signal"],
)
def test_a_name_does_not_split_the_line(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    said = capsys.readouterr().err
    assert end.value.code == code and len(said.splitlines()) == 1 and said.endswith("\n")
    assert r"a\nb\x1b[31m\u2028c" in said


@pytest.mark.parametrize(("rank", "local", "said"), [("0", "0", True), ("1", "1", False), ("2", "0", True)])
def test_a_mistake_is_told_once_on_each_machine(rank, local, said, monkeypatch, capsys):
    """A folder may be missing on the second of two machines alone."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)

    def main():
        raise UserError("--teacher runs/t: is not there")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err.count("runs/t: is not there\n") == said


def images(folder, last: bytes):
    for number in range(4):
        (folder / f"{'ab'[number % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{'ab'[number % 2]}/{number}.png")
    (folder / "b/4.png").write_bytes(last)
    return f"folder:{folder}"


def large() -> bytes:
    """Less than a bomb, so that Pillow only warns, and truncated, so that it is refused afterwards."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data[:60])


def test_pillow_says_nothing_beside_the_line(tmp_path):
    done = forked(
        "train_teacher.py", *TINY, "--dataset", images(tmp_path / "i", large()), "--output_dir", tmp_path / "r"
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot read the image" in done.stderr and "4.png" in done.stderr


def test_datasets_shows_no_bar_beside_the_line(tmp_path):
    """Where the output is no terminal; the table is made before a label is seen."""
    cells = [{"bytes": png(8), "path": None}] * 4
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": ["x"] * 4}), tmp_path / "x.parquet")
    words = [*TINY, "--dataset", f"parquet:{tmp_path}/x.parquet", "--pipeline", "workers"]
    done = forked("train_teacher.py", *words, "--cache_dir", tmp_path / "c", "--output_dir", tmp_path / "r")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has the label 'x'" in done.stderr


def test_the_hubs_client_says_nothing_beside_the_line():
    """It tries five times, and says so each time."""
    code = "import logging; from data.sources import datasets_library; datasets_library(); "
    code += "logging.getLogger('huggingface_hub.utils._http').warning('Retrying')"
    assert not forked("-c", code).stderr


OWN = """import sys
import torch
from losses.method import Method

class Broken(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.sum()

    @staticmethod
    def backward(context, gradient):
        {backward}

class Own(Method):
    terms = {{"own": 1.0}}

    def forward(self, student, teacher, batch):
        return {{"own": Broken.apply(student.logits)}}

    def after_step(self):
        {after}
"""


def own(tmp_path, backward: str = "return torch.ones(4, 3)", after: str = "pass") -> str:
    (tmp_path / "own.py").write_text(OWN.format(backward=backward, after=after))
    return f"{tmp_path}/own.py:Own"


@pytest.mark.parametrize("failing", ["1 / 0", "sys.exit(0)", "raise OSError('x')", "torch.ones(2) @ torch.ones(3)"])
def test_an_own_method_that_fails_in_the_backward_pass_is_named(tmp_path, failing):
    (method,) = find_methods(own(tmp_path, backward=failing))
    logits = torch.zeros(4, 3, requires_grad=True)
    broken = method.forward(None, type("Outputs", (), {"logits": logits}), None, None)["own"]
    with pytest.raises(UserError, match=r"--method .*own\.py:Own: fails, line 12: "), run_with([method]):
        broken.backward()


def test_what_is_not_theirs_is_not_called_theirs(tmp_path):
    (method,) = find_methods(own(tmp_path))
    with pytest.raises(ZeroDivisionError), run_with([method]):
        1 / 0  # noqa: B018
    with pytest.raises(SystemExit), run_with([method]):
        raise SystemExit(3)
    kd = find_methods("kd")
    with pytest.raises(AttributeError), run_with(kd):
        kd[0].forward(None, None, None, None)


def test_an_own_method_that_exits_after_a_step_does_not_pass_for_a_finished_run(tmp_path):
    arguments = ["--teacher", teacher(tmp_path / "t"), "--student", "resnet8", "--train_fraction", "0.1", *TINY[4:5]]
    method = own(tmp_path, "return torch.ones(32, 10)", "sys.exit(0)")
    done = here("distill.py", *arguments, 32, "--epochs", 1, "--method", method, "--output_dir", tmp_path / "r")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "own.py:Own: fails, line 21: SystemExit: 0" in done.stderr and not (tmp_path / "r/summary.json").exists()


def test_what_a_script_made_is_gone_before_its_processes_part(monkeypatch, capsys):
    """DistributedDataParallel among it: the last to hold the group, it may wait for ever."""
    made, gone = [], []

    class Model:
        pass

    def main():
        model = Model()
        made.append(weakref.ref(model))
        try:
            raise UserError("no")
        except UserError as error:
            kept = error  # holds this frame, which holds it
            raise kept from None

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: gone.append(made[0]() is None))
    with pytest.raises(SystemExit):
        run_script(main)
    assert gone == [True] and capsys.readouterr().err.endswith("error: no\n")
