"""Every Triton kernel compiles to machine code for the GPUs we name, as its launcher calls it. Needs no GPU.

The launchers run on CPU tensors with the launch itself replaced: what would have been launched is compiled,
for sm_70 (V100), sm_80 (A100) and sm_90 (H100, H200), in float32, float16 and (not sm_70) bfloat16.
"""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.launches import compile_launch, recorded_launches, specialisation  # noqa: E402 - after importorskip
from kernels import gates_triton, kd_triton  # noqa: E402 - after importorskip

TARGETS = [(70, torch.float32), (70, torch.float16)]
TARGETS += [(arch, dtype) for arch in (80, 90) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
each_target = pytest.mark.parametrize(("arch", "dtype"), TARGETS, ids=lambda value: str(value).replace("torch.", ""))


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def launched():
    """The launches that happened, each (kernel, arguments by name)."""
    with recorded_launches() as launches:
        yield launches


def check(launched, arch: int) -> list:
    compiled = [compile_launch(launch, arch) for launch in launched]
    for kernel in compiled:
        assert kernel.asm["cubin"][:4] == b"\x7fELF" and f".target sm_{arch}" in kernel.asm["ptx"]
    return compiled


FORMS = {
    "forward": {"temperature": 4.0, "form": "forward", "label_smoothing": 0.0},
    "reverse": {"temperature": 3.0, "form": "reverse", "label_smoothing": 0.1},
    "decoupled": {"temperature": 4.0, "form": "decoupled", "label_smoothing": 0.1},
    "none": {"temperature": 1.0, "form": "none", "label_smoothing": 0.0},
}


@each_target
@pytest.mark.parametrize("classes", [100, 32000])
@pytest.mark.parametrize("form", FORMS)
def test_losses_compile(launched, form, classes, arch, dtype):
    students = torch.zeros(3, 8, classes, dtype=dtype)
    teacher = None if form == "none" else torch.zeros(8, classes, dtype=dtype)
    labels = torch.zeros(8, dtype=torch.int64)
    options = FORMS[form] | {"ignore_index": -100, "mean": True}
    rows = kd_triton.forward(students, teacher, labels, **options)[3]
    grad = torch.ones(3)
    grads = (grad, None if form == "none" else grad, grad if form == "decoupled" else None)
    kd_triton.backward(
        *grads, students, teacher, labels, rows, **options, for_students=True, for_teacher=form != "none"
    )
    assert len(launched) == 3
    check(launched, arch)


@pytest.mark.parametrize("classes", [1, 16, 5000])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("form", ["forward", "reverse"])
@pytest.mark.parametrize("batch", [1, 16])
def test_arguments_of_one_and_absent_ones_compile(launched, batch, form, with_labels, classes):
    """Triton makes a constant of an integer that is 1 and of None: batch, strides and ignore_index here."""
    students = torch.zeros(1, batch, classes, dtype=torch.float16)
    labels = torch.zeros(batch, dtype=torch.int64) if with_labels else None
    options = {"temperature": 2.0, "form": form, "label_smoothing": 0.0, "ignore_index": 1, "mean": with_labels}
    rows = kd_triton.forward(students, students[0], labels, **options)[3]
    grad_kl = torch.ones(1) if with_labels else torch.ones(1, batch)
    wanted = {"for_students": with_labels, "for_teacher": True}
    kd_triton.backward(None, grad_kl, None, students, students[0], labels, rows, **options, **wanted)
    check(launched, 90)


@each_target
@pytest.mark.parametrize("soft", [False, True])
def test_gates_compile(launched, soft, arch, dtype):
    outputs = [torch.zeros(4, 16, 8, 8, dtype=dtype), torch.zeros(4, 16, 8, 8, dtype=dtype), None]
    gates = torch.zeros(3) if soft else None
    y = gates_triton.mix(outputs if soft else outputs[:1], gates, outputs[0], relu=True)
    shares = [soft, soft, False]
    gates_triton.mix_backward(y, outputs, gates, y, for_gates=True, for_sum=True, shares=shares)
    gates_triton.mix_backward(y, outputs, gates, None, for_gates=True, for_sum=False, shares=shares)
    assert len(launched) == 3
    check(launched, arch)


def specialisations(launched) -> set[str]:
    return {repr((launch[0].__name__, *specialisation(launch))) for launch in launched}


@pytest.mark.parametrize(("count", "classes"), [(1, 100), (3, 100), (3, 1271), (3, 5000)])
@pytest.mark.parametrize("mean", [True, False])
def test_batches_of_all_sizes_take_the_same_code(launched, mean, count, classes):
    """Else the last batch of an epoch would stop the training to compile, and a row alone would have other bits."""
    compiled = []
    for batch in range(1, 201):
        launched.clear()
        students, teacher = torch.zeros(count, batch, classes), torch.zeros(batch, classes)
        labels, grad = torch.zeros(batch, dtype=torch.int64), torch.ones(count) if mean else torch.ones(count, batch)
        options = FORMS["forward"] | {"ignore_index": -100, "mean": mean}
        rows = kd_triton.forward(students, teacher, labels, **options)[3]
        kd_triton.backward(grad, grad, None, students, teacher, labels, rows, **options, **BOTH)
        compiled.append(specialisations(launched))
    assert set.union(*compiled) == compiled[0] and len(compiled[0]) == (3 if mean else 2)


@each_target
def test_means_of_more_than_a_block_compile_and_take_no_other_code(launched, arch, dtype):
    students, labels = torch.zeros(1, 20000, 4, dtype=dtype), torch.zeros(20000, dtype=torch.int64)
    kd_triton.forward(students, students[0], labels, **FORMS["decoupled"], ignore_index=-100, mean=True)
    assert [launch[0].__name__ for launch in launched] == ["forward_tile", "sum_rows", "mean_rows"]
    check(launched[1:], arch)
    many = specialisations(launched[2:])
    launched.clear()
    kd_triton.forward(students[:, :7], students[0, :7], labels[:7], **FORMS["decoupled"], ignore_index=-100, mean=True)
    assert specialisations(launched[1:]) == many


def test_batches_of_all_sizes_are_mixed_by_the_same_code(launched):
    compiled = []
    for batch in range(1, 201):
        launched.clear()
        outputs = [torch.zeros(batch, 16, 2, 2) for _ in range(2)]
        y = gates_triton.mix(outputs, torch.zeros(2), outputs[0], relu=True)
        gates_triton.mix_backward(y, outputs, None, y, for_gates=True, for_sum=True, shares=[False] * 2)
        compiled.append(specialisations(launched))
    assert set.union(*compiled) == compiled[0] and len(compiled[0]) == 2


@pytest.mark.parametrize("classes", [1000, 32000])
def test_logits_travel_many_at_a_time(launched, classes):
    """Sixteen bytes, and the four elements that a thread has in the backward pass. C = 1000 is no multiple of 16:
    without the hint of 8 every lane would load two bytes."""
    students, teacher = torch.zeros(3, 8, classes, dtype=torch.bfloat16), torch.zeros(8, classes, dtype=torch.bfloat16)
    labels = torch.zeros(8, dtype=torch.int64)
    options = FORMS["forward"] | {"ignore_index": -100, "mean": True}
    rows = kd_triton.forward(students, teacher, labels, **options)[3]
    kd_triton.backward(torch.ones(3), torch.ones(3), None, students, teacher, labels, rows, **options, **BOTH)
    forward, _, backward = (kernel.asm["ptx"] for kernel in check(launched, 90))
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", forward)) >= 2
    assert len(re.findall(r"ld\.global\S*\.v2\.b32", backward)) >= 2
    assert len(re.findall(r"st\.global\S*\.v2\.b32", backward)) >= 2


BOTH = {"for_students": True, "for_teacher": True}
