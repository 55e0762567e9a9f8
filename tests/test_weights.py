"""Initial weights: torchvision's own networks as oracle, files of every kind, and networks of timm."""

import sys

import pytest
import safetensors.torch
import torch
from torchvision.models import get_model

from common import UserError
from models import ModelInfo, create_model, load_pretrained, load_weights, save_pretrained
from models.network import block_shapes, run_blocks

TORCHVISION = {"resnet18": "resnet18", "resnet50": "resnet50", "mobilenet_v2": "mobilenet_v2",
               "efficientnet_b0": "efficientnet_b0", "shufflenet_v2": "shufflenet_v2_x1_0"}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Downloads fail at once, whatever the machine is connected to, and nothing cached is found."""
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_state_dicts_load_and_compute_the_same(name, tmp_path):
    torch.manual_seed(0)
    source, images = get_model(TORCHVISION[name], weights=None, num_classes=5), torch.randn(2, 3, 96, 96)
    source(images)  # BatchNorm statistics that are not the initial ones
    torch.save(source.state_dict(), tmp_path / "source.pth")
    model = create_model(name, 5, image_size=96)
    loaded = load_weights(model, str(tmp_path / "source.pth"))
    assert str(loaded) == f"weights of {tmp_path / 'source.pth'}"
    assert torch.allclose(model.eval()(images), source.eval()(images), atol=1e-5)


def test_published_weights_come_from_torchs_cache(tmp_path):
    source = get_model("resnet18", weights=None)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(source.state_dict(), cache / "resnet18-f37072fd.pth")  # where torchvision would download it to
    model = create_model("resnet18", 10, image_size=96)
    fresh = model.fc.weight.clone()
    loaded = load_weights(model, "pretrained", "--pretrained")
    assert str(loaded) == "torchvision IMAGENET1K_V1 weights, classifier fresh: 10 classes instead of 1000"
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(model.fc.weight, fresh)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "vgg8", "mobilenetv2", "nas_s"])
def test_without_published_weights_the_user_is_told_where_there_are_some(name):
    with pytest.raises(UserError, match="--pretrained: there are no published weights of this network; resnet18 to"):
        load_weights(create_model(name, 10), "pretrained", "--pretrained")


def test_a_failed_download_is_one_line():
    with pytest.raises(UserError, match="--pretrained: the weights of resnet18 cannot be downloaded") as error:
        load_weights(create_model("resnet18", 10, image_size=96), "pretrained", "--pretrained")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "model", "state_dict", "module."])
def test_files_of_every_kind_load(kind, tmp_path):
    torch.manual_seed(0)
    source, model = create_model("resnet8", 10), create_model("resnet8", 10)
    state, path = source.state_dict(), tmp_path / "weights.pth"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state, path)
    elif kind == "module.":  # what DataParallel makes of names
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state if kind == "pth" else {"epoch": 240, kind: state, "best": 0.7}, path)
    load_weights(model, str(path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenetv2", "shufflenetv1"])
def test_another_number_of_classes_keeps_the_fresh_classifier(name, tmp_path):
    source, model = create_model(name, 100), create_model(name, 10)
    save_pretrained(source, ModelInfo(name, "cifar100", 100, 32, [0.5] * 3, [0.2] * 3), tmp_path)
    fresh = model.fc.weight.clone()
    loaded = load_weights(model, str(tmp_path / "model.safetensors"))
    assert str(loaded).endswith(", classifier fresh: 10 classes instead of 100")
    assert torch.equal(model.fc.weight, fresh)
    body = [key for key in source.state_dict() if not key.startswith(("fc", "classifier", "linear"))]
    assert body and all(torch.equal(source.state_dict()[key], model.state_dict()[key]) for key in body)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"not tensors", "is damaged"),
        ({}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"conv1.weight": torch.zeros(16, 3, 5, 5)}, "'conv1.weight' is 16x3x5x5 there, but 16x3x3x3 in this network"),
        ({"bn1.weight": None}, "'bn1.weight' is missing there"),
        ({"extra.weight": torch.zeros(3)}, "'extra.weight' belongs to no layer of this network"),
    ],
)
def test_what_does_not_fit_is_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        state = create_model("resnet8", 10).state_dict() if content and "epoch" not in content else {}
        torch.save({key: value for key, value in (state | content).items() if value is not None}, path)
    model = create_model("resnet8", 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=f"--weights {path}: {message}"):
        load_weights(model, str(path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_other_kinds_of_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a .safetensors, .pth, .pt or .pth.tar file"):
        load_weights(create_model("resnet8", 10), str(tmp_path / "weights.bin"))


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"--student timm:resnet18: needs timm; pip install -r requirements-timm.txt"):
        create_model("timm:resnet18", 10, argument="--student")


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 64), ("mobilenetv3_small_050", 64), ("convnext_atto", 64)])
def test_networks_of_timm_follow_the_contract(name, size, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = create_model(f"timm:{name}", 5, image_size=size).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits, maps, embedding = model(images, features=True)
        outputs, last = run_blocks(model, images)
        own = timm.create_model(name, num_classes=5).eval()
        own.load_state_dict(model.net.state_dict())
        assert torch.allclose(own(images), logits, atol=1e-5) and torch.allclose(model(images), logits, atol=1e-5)
    assert torch.allclose(model.fc(embedding), logits, atol=1e-5)
    assert len(model.blocks) == 4 and torch.allclose(last, logits, rtol=1e-4, atol=1e-5)
    assert [each.shape for each in outputs] == [each.shape for each in maps[-4:-1]]
    assert len(block_shapes(model, size)) == 3
    save_pretrained(model, ModelInfo(f"timm:{name}", "digits", 5, size, [0.5] * 3, [0.2] * 3), tmp_path)
    assert torch.equal(load_pretrained(tmp_path)(images), model(images))


def test_networks_of_timm_that_cannot_be_cut_say_so():
    pytest.importorskip("timm")
    model = create_model("timm:vit_tiny_patch16_224", 5, image_size=64)
    assert block_shapes(model, 64) == [(192, 4)] * 3  # for branches maps are enough
    with pytest.raises(UserError, match="timm:vit_tiny_patch16_224: cannot be cut into 4 blocks"):
        model.blocks  # noqa: B018


def test_timm_errors_are_one_line():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"unknown name 'timm:resnt18'; did you mean timm:resnet18"):
        create_model("timm:resnt18", 10)
    with pytest.raises(UserError, match="unknown name 'timm:local-dir:network'"):  # timm would read it
        create_model("timm:local-dir:network", 10)
    with pytest.raises(UserError, match=r"--pretrained: .*timm:resnet18 cannot be downloaded") as error:
        load_weights(create_model("timm:resnet18", 10), "pretrained", "--pretrained")
    assert "\n" not in str(error.value)
