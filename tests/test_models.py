"""Models by name, and files that hold a trained one."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from common import UserError
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from models.pool import NAS_STUDENTS


def test_parameter_names_are_those_of_published_checkpoints():
    resnet, wrn = create_model("resnet8x4", 10).state_dict(), create_model("wrn16_2", 10).state_dict()
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= set(
        resnet
    )
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.weight", "bn1.weight"} <= set(wrn)
    assert not [name for name in (*resnet, *wrn) if name.startswith(("stages", "blocks", "embed"))]


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnt20", "did you mean resnet20"), ("pool:x", "pool:SEED"), ("no.json", "no.json")],
)
def test_unknown_names_are_refused_with_a_hint(name, message):
    with pytest.raises(UserError, match=message):
        create_model(name, 10)


def info(**changes) -> ModelInfo:
    return ModelInfo(**({"name": "resnet8", "dataset": "digits", "num_classes": 10, "image_size": 16} | changes),
                     mean=[0.5] * 3, std=[0.2] * 3)  # fmt: skip


def saved(folder):
    model = create_model("resnet8", 10)
    model(torch.randn(8, 3, 16, 16))  # BatchNorm statistics that are not the initial ones
    save_pretrained(model, info(), folder)
    return model


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model, loaded = saved(tmp_path), load_pretrained(tmp_path)
    assert not loaded.training and loaded.info.image_size == 16 and loaded.info.mean == [0.5] * 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_pool_student_comes_back_from_its_spec(tmp_path):
    student = create_model("nas_s", 10)
    save_pretrained(student, info(name="anything", spec=NAS_STUDENTS["nas_s"]), tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_pretrained(tmp_path)(images), student.eval()(images))
    again = create_model(str(tmp_path / "model.json"), 10)  # the same architecture, fresh weights
    assert again.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize("damage", ["truncate", "flip", "no weights", "no description", "other classes", "not json"])
def test_damaged_files_are_refused(tmp_path, damage):
    saved(tmp_path)
    weights, description = tmp_path / "model.safetensors", tmp_path / "model.json"
    data = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no description":
        description.unlink()
    elif damage == "not json":
        description.write_text("{")
    else:
        description.write_text(description.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "channels", "divisors", "width"),
    [
        ("nas_s", (16, 64, 128, 256), (1, 1, 2, 4), 1280),
        ("nas_m", (16, 64, 256, 512), (1, 1, 4, 8), 1280),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_features_are_logits_maps_and_embedding(name, channels, divisors, width, size):
    logits, maps, embedding = create_model(name, 7).eval()(torch.randn(2, 3, size, size), features=True)
    assert isinstance(maps, list) and logits.shape == (2, 7) and embedding.shape == (2, width)
    assert [m.shape for m in maps] == [(2, c, size // d, size // d) for c, d in zip(channels, divisors, strict=True)]


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn16_2", "nas_s", "pool:3"])
def test_nothing_is_registered_twice(name):
    model = create_model(name, 10)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.parameters()))
    assert set(names) <= set(model.state_dict())
    assert not [name for name in model.state_dict() if name.split(".")[0] in ("embed", "stages", "blocks")]


@pytest.mark.parametrize(("name", "near"), [("resnet21", "resnet20"), ("wrn_16_2", "wrn16_2"), ("nas_x", "nas_")])
def test_the_nearest_name_is_suggested(name, near):
    with pytest.raises(UserError, match=f"--teacher: unknown name '{name}'; did you mean .*{near}"):
        create_model(name, 10, argument="--teacher")


def adapted(folder, data: bytes) -> None:
    """Put `data` in the place of the weights, with the checksum in the description made to fit."""
    (folder / "model.safetensors").write_bytes(data)
    document = json.loads((folder / "model.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "model.json").write_text(json.dumps(document))


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "truncated", "empty", "header"])
def test_weights_that_do_not_fit_are_refused_though_the_checksum_does(tmp_path, change):
    tensors = dict(saved(tmp_path).state_dict())
    if change == "missing":
        del tensors["conv1.weight"]
    elif change == "extra":
        tensors["planted"] = torch.zeros(1)
    elif change == "shape":
        tensors["fc.weight"] = torch.zeros(10, 3)
    data = safetensors.torch.save(tensors)
    data = {"truncated": data[:-100], "empty": b"", "header": b"\xff" * 8 + data[8:]}.get(change, data)
    adapted(tmp_path, data)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(tmp_path)


def test_a_description_may_name_the_classes_or_not(tmp_path):
    saved(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(document | {"class_names": list("0123456789")}))
    assert load_pretrained(tmp_path).info.class_names == list("0123456789")
    del document["class_names"]  # as runs were before
    (tmp_path / "model.json").write_text(json.dumps(document))
    assert load_pretrained(tmp_path).info.class_names is None


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": "ten"},
        {"planted": 1},
        {"spec": [1]},
        {"name": "resnt8"},
        {"class_names": ["cat", "dog"]},
        {"class_names": [*range(10)]},
        {"class_names": "0123456789"},
    ],
)
def test_descriptions_that_make_no_sense_are_refused(tmp_path, change):
    saved(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(document | change))
    with pytest.raises(UserError):
        load_pretrained(tmp_path)


def test_a_folder_that_is_not_there_holds_no_model(tmp_path):
    with pytest.raises(UserError, match="holds no trained model"):
        load_pretrained(tmp_path / "nowhere")
