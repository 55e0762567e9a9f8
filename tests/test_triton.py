"""The Triton kernels meet their formulas, and train: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from tests.runs import TINY, TINY_GTN, forked, python, read_json, read_rows, succeeded

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
INTERPRETER = {} if GPU else {"TRITON_INTERPRET": "1"}  # read when triton is imported


def test_the_kernels_meet_their_formulas():
    done = forked("-m", "pytest", "tests/triton_grid.py", "-q", "-W", "ignore::RuntimeWarning", **INTERPRETER)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_both_scripts_train_alike_with_either_implementation(tmp_path):
    """All of train_teacher.py and distill.py, batch by batch the same losses but for rounding, on a GPU those of CUDA
    graphs too."""
    forms = {"triton": (), "reference": ()} | ({"graphs": ("--cuda_graph",)} if GPU else {})
    losses, start = {}, python if GPU else forked  # what is forked from has one thread
    for form, words in forms.items():
        teacher, student = tmp_path / f"teacher-{form}", tmp_path / f"student-{form}"
        kernels = "reference" if form == "reference" else "triton"
        fixed = ("--kernels", kernels, "--batch_size", "360", "--lr", "0.01", *words)
        succeeded(start("train_teacher.py", *TINY_GTN, *fixed, "--output_dir", teacher, **INTERPRETER))
        source = tmp_path / "teacher-triton"
        arguments = ("--teacher", source, "--student", "pool:1", *TINY[2:], *fixed, "--output_dir", student)
        done = succeeded(start("distill.py", *arguments, **INTERPRETER))
        assert f"kernels: {kernels}" in done.stdout
        assert read_json(student / "summary.json")["kernels"].startswith(kernels)
        losses[form] = [read_rows(run / "metrics.jsonl")[0]["losses"] for run in (teacher, student)]
    for form in losses:
        for found, plain in zip(losses[form], losses["reference"], strict=True):
            assert found == pytest.approx(plain, rel=1e-3), form
