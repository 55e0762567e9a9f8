"""Frozen networks in fewer kernels: on a GPU by cuDNN's fused convolutions, elsewhere by the same sums."""

import copy

import pytest
import torch
from torch import nn

from models import ModelInfo, create_model, save_pretrained
from models.fused import FusedStage, fuse
from models.network import Network
from models.pool import Pool
from tests.runs import TINY, here, read_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NETWORKS = ["resnet8", "resnet8x4", "resnet50", "wrn16_2", "vgg8", "mobilenetv2", "shufflenetv2", "pool:1"]
POOL = Pool(stem=4, widths=[4, 4, 8, 8], strides=[1, 2, 2, 1], head=8, candidates=["res3x2", "res5x2", "identity"])


def trained(name: str) -> nn.Module:
    """A network in eval mode, with statistics, scales and shifts that leave a mark."""
    torch.manual_seed(0)
    network = create_model(name, 10, POOL, image_size=32)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for each, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.3, 0.3), (norm.running_mean, -0.3, 0.3)):
                nn.init.uniform_(each, low, high)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return network.eval().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)


def outputs(network: nn.Module, images: torch.Tensor, features: bool | str = True) -> list[torch.Tensor]:
    with torch.no_grad():
        logits, maps, embedding = network(images, features=features)
    return [logits, *maps, embedding]


def images(dtype=torch.float32) -> torch.Tensor:
    batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return batch.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_computes_what_it_did(name):
    network, batch = trained(name), images()
    exact, names = outputs(network.double(), batch.double()), list(network.state_dict())
    fuse(network, (DEVICE,))
    assert list(network.state_dict()) == names
    if not GPU:  # cuDNN has no such convolution in float64
        assert distance(outputs(network, batch.double()), exact) < 1e-10
    found = outputs(network.float(), batch)
    assert distance(found, exact) < (1e-2 if GPU else 1e-5)  # a GPU multiplies in TF32


@pytest.mark.parametrize("name", ["resnet8x4", "wrn16_2", "vgg8", "mobilenetv2"])
def test_half_precision_loses_no_more_than_unfused(name):
    network, batch = trained(name), images()
    exact = outputs(network.double(), batch.double())
    network.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = outputs(network, batch)
        fuse(network, (DEVICE,))
        found = outputs(network, batch)
    assert [each.dtype for each in found] == [each.dtype for each in plain]
    assert distance(found, exact) < 1.5 * distance(plain, exact)


@pytest.mark.parametrize(("name", "left"), [("resnet8x4", 0), ("resnet50", 0), ("vgg8", 0), ("wrn16_2", 7)])
def test_batchnorms_are_gone(name, left, monkeypatch):
    """Of a WRN the first of each block is left, and the last of all."""
    network, calls, plain = trained(name), [], torch.nn.functional.batch_norm

    def counted(*given, **more):
        calls.append(1)
        return plain(*given, **more)

    fuse(network, (DEVICE,))
    monkeypatch.setattr(torch.nn.functional, "batch_norm", counted)
    outputs(network, images())
    assert len(calls) == left


def test_gradients_and_pre_activations_are_the_networks_own():
    network, batch = trained("resnet8"), images().requires_grad_()

    def computed():
        return *outputs(network, batch, "preact"), *torch.autograd.grad(network(batch).sum(), batch)

    before = computed()
    fuse(network, (DEVICE,))
    assert all(map(torch.equal, computed(), before))


def test_weights_that_are_loaded_later_are_used():
    network, other, batch = trained("resnet8"), trained("resnet8"), images()
    nn.init.normal_(other.bn1.running_mean)
    fuse(network, (DEVICE,))
    outputs(network, batch)
    for loaded in (copy.deepcopy(network), network):
        loaded.load_state_dict(other.state_dict())
        exact = outputs(copy.deepcopy(other).double(), batch.double())
        assert distance(outputs(loaded, batch), exact) < (1e-2 if GPU else 1e-5)


def test_fusing_twice_is_fusing_once():
    network = trained("resnet8")
    fuse(network)
    stages = network.stages
    fuse(network)
    assert network.stages == stages and all(isinstance(stage, FusedStage) for stage in stages)


def test_distilling_asks_fused_teachers(tmp_path, monkeypatch):
    """The losses of a run are those of one whose teacher is as it was."""
    teacher, losses, asked = tmp_path / "teacher", [], []
    info = ModelInfo("resnet8", "digits", 10, 8, [0.5] * 3, [0.2] * 3)
    save_pretrained(trained("resnet8").cpu(), info, teacher)

    def on_this_device(network):
        fuse(network, (DEVICE,))
        asked.append(network)

    for patched in (on_this_device, lambda network: None):
        monkeypatch.setattr("distill.fuse", patched)
        run = tmp_path / str(len(losses))
        words = ("--teacher", teacher, "--student", "resnet8", "--output_dir", run, "--cache_teacher", "no")
        assert here("distill.py", *words, *TINY[2:]).returncode == 0
        losses.append(read_rows(run / "metrics.jsonl")[0]["losses"])
    stages = next(part for part in asked[0].modules() if isinstance(part, Network)).stages
    assert len(asked) == 1 and all(stage.layers for stage in stages)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if GPU else 1e-3)  # in TF32
