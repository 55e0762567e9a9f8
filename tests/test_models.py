"""The zoo: parameter counts, the block contract, and files that hold a model."""

import json
import os
import pickle

import pytest
import torch

from common import UserError
from models import ModelInfo, create_model, list_models, load_pretrained, save_pretrained
from models.network import block_shapes, run_blocks

# Parameters at 100 classes: the field's published counts; nas_* follow from the GTN supplement's tables.
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x2": 315_764,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn16_1": 180_916,
    "wrn16_2": 703_284,
    "wrn28_2": 1_479_220,
    "wrn28_4": 5_872_180,
    "wrn40_1": 569_780,
    "wrn40_2": 2_255_156,
}
NAS = ["nas_s", "nas_m", "nas_l"]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_count(name, count):
    assert sum(parameter.numel() for parameter in create_model(name, 100).parameters()) == count


def test_any_wrn_can_be_named():
    assert sum(p.numel() for p in create_model("wrn16_4", 100).parameters()) == 2_772_020


def test_the_list_holds_what_is_tested():
    assert set(list_models()) == set(COUNTS) | set(NAS)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn16_2", "pool:3", "nas_s"])
def test_features_and_blocks_follow_the_contract(name, size):
    model, images = create_model(name, 7).eval(), torch.randn(2, 3, size, size)
    logits, maps, embedding = model(images, features=True)
    assert torch.equal(model(images), logits) and logits.shape == (2, 7)
    assert torch.equal(model.fc(embedding), logits)
    features, last = run_blocks(model, images)
    assert len(model.blocks) == len(features) + 1 == 4
    assert torch.allclose(last, logits, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(features, maps, strict=False))
    assert block_shapes(model, size) == [(f.shape[1], f.shape[2]) for f in features]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet8x4", [(32, 32), (64, 32), (128, 16), (256, 8)]),
        ("wrn16_2", [(16, 32), (32, 32), (64, 16), (128, 8)]),
    ],
)
def test_stage_maps_have_the_published_shapes(name, shapes):
    _, maps, embedding = create_model(name, 10)(torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1), features=True)
    assert [(m.shape[1], m.shape[2]) for m in maps] == shapes
    assert embedding.shape == (2, shapes[-1][0])


def test_parameter_names_are_those_of_published_checkpoints():
    resnet, wrn = create_model("resnet8x4", 10).state_dict(), create_model("wrn16_2", 10).state_dict()
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= set(
        resnet
    )
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.weight", "bn1.weight"} <= set(wrn)
    assert not [name for name in (*resnet, *wrn) if name.startswith(("stages", "blocks", "embed"))]


@pytest.mark.parametrize(
    ("name", "said"),
    [("resnt20", "did you mean resnet20"), ("wrn17_2", "6n"), ("pool:x", "pool:SEED"), ("no.json", "no.json")],
)
def test_unknown_names_are_refused_with_a_hint(name, said):
    with pytest.raises(UserError, match=said):
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
    from models.pool import NAS_STUDENTS

    save_pretrained(student, info(name="anything", spec=NAS_STUDENTS["nas_s"]), tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_pretrained(tmp_path)(images), student.eval()(images))
    again = create_model(str(tmp_path / "model.json"), 10)  # the same architecture, fresh weights
    assert again.state_dict().keys() == student.state_dict().keys()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_runs_nothing_and_is_refused(tmp_path):
    saved(tmp_path)
    data = pickle.dumps(Payload(tmp_path / "executed"))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model"):
        load_pretrained(tmp_path)
    import hashlib

    document = json.loads((tmp_path / "model.json").read_text())  # even if the checksum was adapted
    (tmp_path / "model.json").write_text(json.dumps(document | {"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(data)
    assert (tmp_path / "executed").exists()  # the payload does run where pickle is used


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
