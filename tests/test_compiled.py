"""Compiled regions compute what they did, and no path of a supernet compiles them again."""

import pytest
import torch
import torch._inductor.config

from common import UserError
from data.batch import Batch
from engine.objective import weighted_sum
from models import create_model
from models.compiled import compile_regions, regions
from models.network import BeforeReLU
from models.pool import Pool
from objectives.registry import TEACHERS
from tests.runs import TINY, forked, here, read_rows, succeeded
from train_teacher import TeacherConfig

POOL = Pool(stem=4, widths=[4, 4, 8, 8], strides=[1, 1, 2, 1], head=8, candidates=["res3x2", "res3x4", "identity"])
IMAGES, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)


def gtn():
    torch.manual_seed(0)
    return TEACHERS["gtn"].objective(create_model("resnet8", 10), TeacherConfig(method="gtn", pool=POOL), 8)


def step(objective, iteration: int) -> dict:
    phase = objective.phase(iteration)
    terms = objective(Batch(IMAGES, LABELS), iteration)
    weighted_sum(objective, terms).backward(inputs=phase.grad_inputs() if phase else None)
    if phase:
        phase.before_update(lambda gradient: gradient)
        phase.after_update()
    return {name: term.item() for name, term in terms.items()}


def test_a_path_never_compiles_again():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, compiled = gtn(), gtn()
    names = list(compiled.state_dict())
    compile_regions(compiled, backend=count)
    assert list(compiled.state_dict()) == names
    compiled.gates.full = plain.gates.full = True  # a gate step meets every candidate
    for iteration in range(40):
        assert step(compiled, iteration) == pytest.approx(step(plain, iteration), rel=1e-5)
    seen = len(graphs)
    compiled.gates.full = False
    for iteration in range(40, 100):
        step(compiled, iteration)
    assert seen > 8 and len(graphs) == seen


def test_blocks_of_one_kind_and_shape_are_compiled_once():
    graphs = []
    compile_regions(
        model := create_model("resnet32", 10), backend=lambda graph, inputs: graphs.append(1) or graph.forward
    )
    model(IMAGES)
    # The stem; of the first stage all five blocks alike; of the second and third the first block and the others.
    assert len(graphs) == 6


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn16_1", "vgg8", "mobilenetv2", "shufflenetv1", "densenet40_12", "resnet18"]
)
def test_all_convolutions_lie_in_regions(name):
    model = create_model(name, 10, image_size=32)
    found = [part for part in regions(model) if not isinstance(part, BeforeReLU)]
    inside = [layer for part in found for layer in part.modules() if isinstance(layer, torch.nn.Conv2d)]
    every = {layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)}
    assert all(layer.in_channels == 3 for layer in every - set(inside))  # a stem may be a layer by itself
    assert len(found) > 3


@pytest.mark.parametrize("features", [False, "preact"])
def test_recomputed_layers_are_compiled_within_their_checkpoints(features):
    gradients = []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = create_model("densenet100_12", 10)
        if backend:
            compile_regions(model, backend=backend)
        logits = model(IMAGES, features=features)[0] if features else model(IMAGES)
        logits.square().mean().backward()
        gradients.append([each.grad for each in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_timms_networks_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="--compile: timm:resnet18"):
        compile_regions(create_model("timm:resnet18", 10, image_size=32), backend="eager")


def test_a_compiled_run_learns_alike(tmp_path):
    losses = []
    for flags in ([], ["--compile"]):
        run = tmp_path / str(len(flags))
        succeeded(forked("train_teacher.py", *TINY, *flags, "--output_dir", run))
        losses.append(read_rows(run / "metrics.jsonl")[0]["losses"]["ce"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    with torch._inductor.config.patch({"cpp.cxx": "no-such-compiler"}):
        refused = here("train_teacher.py", *TINY, "--compile", "--output_dir", tmp_path / "no")
    assert refused.returncode == 2 and "--compile: needs a C++ compiler" in refused.stderr
    assert not (tmp_path / "no").exists()
