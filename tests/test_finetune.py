"""Int8 files that were trained to be ones: their roundings, their scales, and who teaches them."""

import copy
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from data.batch import Batch
from data.datasets import load_images
from exporters import quantized
from exporters.deployed import Deployed
from exporters.finetune import FinetuneOptions, finetune, finetune_options
from exporters.int8 import write_trained_int8
from exporters.onnx import load_onnx
from exporters.quantized import Activation, Quantized, Weight
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from tests.runs import TINY, forked, here, succeeded
from tests.test_export import network


def test_an_activation_is_rounded_to_steps_of_its_range_and_its_gradient_passes_inside():
    rounding, x = Activation().train(), torch.tensor([-1.0, 0.3, 0.7, 2.0], requires_grad=True)
    rounding.calibrating = True
    assert torch.equal(rounding(x), x) and torch.equal(rounding(torch.tensor([0.5])), torch.tensor([0.5]))
    rounding.calibrating = False
    assert (rounding.low, rounding.high) == (-1, 2)
    given = torch.tensor([-5.0, -1.0, 0.3, 0.71, 2.0, 3.0], requires_grad=True)
    found = rounding.eval()(given)
    step = 3 / 255
    expected = [step * (min(max(round(value / step) + 85, 0), 255) - 85) for value in given.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    assert given.grad.tolist() == [0, 1, 1, 1, 1, 0]
    rounding.train()(torch.tensor([0.0, 4.0]))
    assert (rounding.low.item(), rounding.high.item()) == pytest.approx((-0.99, 2.02))


def test_a_weight_is_rounded_in_steps_of_its_channel():
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 0]).view(
        3, 1, 1, 1
    )
    weight.requires_grad_()
    found = Weight()(weight)
    found.sum().backward()
    for row, wanted in zip(found.tolist(), weight.tolist(), strict=True):
        values, given = np.array(row), np.array(wanted)
        step = np.abs(given).max() / 127
        np.testing.assert_allclose(values, step * np.rint(given / max(step, 1e-9)), atol=1e-6)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_steps_are_those_of_adam_on_the_loss_of_kd():
    """The learning rate is halfway down its cosine in the second of two steps."""
    torch.manual_seed(0)
    network, teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    plain = copy.deepcopy(network)
    batches = [Batch(torch.randn(8, 3, 2, 2), torch.arange(8) % 5) for _ in range(2)]
    finetune(network, teacher, batches, 2, FinetuneOptions(temperature=3.0, alpha=0.7), 0.1)
    adam = torch.optim.Adam(plain.parameters())
    for batch, lr in zip(batches, (0.1, 0.05), strict=True):
        logits, taught = plain(batch.images), (teacher(batch.images) / 3).softmax(1)
        kl = (taught * (taught.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        adam.zero_grad()
        (0.3 * nn.functional.cross_entropy(logits, batch.labels) + 0.7 * 9 * kl).backward()
        adam.param_groups[0]["lr"] = lr
        adam.step()
    torch.testing.assert_close(network.state_dict(), plain.state_dict())
    assert not network.training


@pytest.fixture(scope="module")
def pool_member() -> tuple[torch.nn.Module, Quantized]:
    model = network("pool:3", 16)
    return model, Quantized(model)


def test_without_roundings_it_is_the_network(pool_member, monkeypatch):
    model, rounded = pool_member
    monkeypatch.setattr(Weight, "forward", lambda self, weight: weight)
    for each in rounded.modules():
        if isinstance(each, Activation):
            monkeypatch.setattr(each, "calibrating", True)
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(images), model(images), rtol=1e-4, atol=1e-5)
    kinds = [node.target for node in rounded.graph.graph.nodes]
    assert quantized.aten.batch_norm.default not in kinds


def test_the_file_has_the_scales_and_the_outputs_of_the_network_with_roundings(pool_member, tmp_path):
    """All of it in integers: every layer's inputs and weights, biases in steps of the product of their scales."""
    _, rounded = pool_member
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rounded.calibrate([images])
    deployed = Deployed(rounded, False)
    write_trained_int8(deployed, tmp_path / "int8.onnx", {})
    graph = onnx.load(tmp_path / "int8.onnx").graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    values |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    made_by = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) > 5
    for node in layers:
        activation, weight, bias = (made_by[name] for name in node.input)
        assert {each.op_type for each in (activation, weight, bias)} == {"DequantizeLinear"}
        assert values[weight.input[0]].dtype == np.int8 and values[bias.input[0]].dtype == np.int32
        product = values[activation.input[1]] * values[weight.input[1]]
        np.testing.assert_allclose(values[bias.input[1]], product, rtol=1e-6)
    scales = {float(values[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}
    own = [float(each.high - each.low) / 255 for each in rounded.modules() if isinstance(each, Activation)]
    assert sorted(scales) == pytest.approx(sorted(set(own)), rel=1e-6)
    expected = rounded(images).detach()
    error = (load_onnx(tmp_path / "int8.onnx", 1)(images) - expected).abs()
    assert error.mean() < 0.005 * expected.abs().max() and error.max() < 0.05 * expected.abs().max()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and a student of it."""
    folder = tmp_path_factory.mktemp("finetune")
    common = ["--image_size", "8", "--batch_size", "64", "--epochs", "4"]
    words = ["--temperature", "3", "--output_dir", folder / "s"]
    succeeded(forked("train_teacher.py", *TINY[:2], *common, "--output_dir", folder / "t"))
    succeeded(forked("distill.py", "--teacher", folder / "t", "--student", "resnet8", *common, *words))
    return folder


def test_the_loss_is_that_of_the_students_run_and_no_teachers(runs):
    """A teacher's config.yaml has an alpha and a temperature, too: those of its branches."""
    found = finetune_options(runs / "s")
    assert (found.teacher, found.alpha, found.temperature) == ([str(runs / "t")], 0.9, 3.0)
    assert "alpha: 3.0" in (runs / "t/config.yaml").read_text()
    assert finetune_options(runs / "t") == FinetuneOptions(batch_size=64)


def test_an_int8_file_that_loses_too_much_is_distilled_once_more(runs, tmp_path):
    """The student computes what it did, but channels 256 times as wide as the others leave these few steps."""
    folder, target = tmp_path / "wide", tmp_path / "shipped"
    shutil.copytree(runs / "s", folder)
    model = load_pretrained(folder)
    with torch.no_grad():
        for block in (model.layer1[0], model.layer2[0], model.layer3[0]):
            block.bn1.weight[0] *= 256
            block.bn1.bias[0] *= 256
            block.conv2.weight[:, 0] /= 256
    save_pretrained(model, model.info, folder)
    words = ["export.py", folder, "--quantize", "int8", "--calibration_images", "100", "--with_preprocessing"]
    words += ["--output_dir", target, "--max_drop", "10"]
    done = here(*words, "--finetune_epochs", "0")
    assert done.returncode == 1 and "--finetune_epochs 3 may mend it" in done.stderr and not target.exists()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(f"teacher:\n- {runs / 't'}", "teacher: []"))
    done = here(*words)
    assert (
        done.returncode == 1
        and not target.exists()
        and done.stderr.strip().endswith(
            f"--finetune_epochs 3: the run {folder} had no teacher; name one with --teacher; nothing was written"
        )
    )
    (folder / "config.yaml").write_text(config)
    succeeded(here(*words, "--finetune_lr", "0.002"))
    found = json.loads((target / "export.json").read_text())["files"]["model.int8.onnx"]
    told = found["finetuned"]
    assert found["network_top1"] - told["top1_before"] > 10 >= found["network_top1"] - found["top1"]
    assert told["teachers"] == [load_pretrained(runs / "t").info.sha256] and told["epochs"] == 3
    assert found["top1"] == pytest.approx(told["rounded_top1"], abs=1.4) and told["unlike_rounded"] <= 10
    data, function = load_images("digits", 8), load_onnx(target / "model.int8.onnx", 1)
    right = (function(data.test.images).argmax(1) == data.test.labels).double().mean()
    assert found["top1"] == pytest.approx(100 * right.item())
    assert "3 more epochs of KD" in (target / "README.md").read_text()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("gone", "holds no trained model (model.json and model.safetensors); name the teacher's run folder with"),
        ("replaced", "is another one than the run's; name one with --teacher"),
        ("none", "had no teacher; name one with --teacher"),
        ("classes", "has 3 classes, the images 10, and names are not known on both sides"),
        ("no int8", "--finetune_epochs 1: goes with --quantize int8"),
        ("no epochs", "goes with --finetune_epochs of --quantize int8"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(broken, message, runs, tmp_path):
    shutil.copytree(runs / "s", tmp_path / "s")
    other = ModelInfo("resnet8", "digits", 3 if broken == "classes" else 10, 8, [0.5] * 3, [0.25] * 3)
    save_pretrained(create_model("resnet8", other.num_classes, image_size=8), other, tmp_path / "other")
    config = (tmp_path / "s/config.yaml").read_text()
    words = ["--quantize", "int8", "--finetune_epochs", "1"]
    if broken == "gone":
        config = config.replace(str(runs / "t"), str(tmp_path / "gone"))
    elif broken == "replaced":
        config = config.replace(str(runs / "t"), str(tmp_path / "other"))
        summary = (tmp_path / "s/summary.json").read_text()
        (tmp_path / "s/summary.json").write_text(summary.replace(str(runs / "t"), str(tmp_path / "other")))
    elif broken == "none":
        config = config.replace(f"teacher:\n- {runs / 't'}", "teacher: []")
    elif broken == "classes":
        words += ["--teacher", str(tmp_path / "other")]
    else:
        words = ["--finetune_epochs", "1"] if broken == "no int8" else [*words[:3], "0", "--teacher", "x"]
    (tmp_path / "s/config.yaml").write_text(config)
    done = here("export.py", tmp_path / "s", *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "s/export").exists()
