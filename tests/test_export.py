"""Exported files: what they compute, what is refused, and that a wrong one is never shipped."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from onnx import numpy_helper
from PIL import Image

from common import UserError
from data.datasets import load_images
from data.pipeline import Pipeline
from data.splits import ImageSet, Split
from engine.run_folder import cpu_name
from export import calibration
from exporters import onnx as exporters_onnx
from exporters.deployed import Deployed
from exporters.onnx import load_onnx, write_onnx
from exporters.proof import Proof, prove
from exporters.pt2 import write_pt2
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from models.pool import Pool
from reports.subject import ImageOptions
from tests.hub import Hub
from tests.runs import forked, free_port, here, succeeded, trained_alone

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
NARROW = Pool(stem=4, widths=[4, 4, 4, 8, 8, 8], strides=[1, 1, 1, 2, 2, 1], head=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_alone(tmp_path_factory.mktemp("runs") / "student")


def network(name: str, size: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, 5, NARROW, "--model", size)
    for module in model.modules():  # statistics and weights that matter, unlike the initial ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    model.info = ModelInfo(name, "digits", 5, size, MEAN, STD)
    return model.eval()


@pytest.mark.parametrize(("name", "preprocessing"), [("resnet8", True), ("pool:3", False), ("shufflenetv1", False)])
def test_an_onnx_file_computes_the_network_for_any_batch_size(name, preprocessing, tmp_path):
    model, size = network(name, 32), 32
    write_onnx(Deployed(model, preprocessing), tmp_path / "model.onnx", {"mean": MEAN, "name": name})
    function = load_onnx(tmp_path / "model.onnx", 1)
    pixels = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = (pixels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = model(images.float()).detach()
    for count in (1, 5):
        if preprocessing:
            found, reference = function(pixels[:count]), expected[:count].softmax(1)
        else:
            found, reference = function(images[:count].float()), expected[:count]
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    kept = onnx.load(tmp_path / "model.onnx")
    assert {each.key: each.value for each in kept.metadata_props} == {"mean": json.dumps(MEAN), "name": name}
    assert kept.opset_import[0].version >= 18


class OfTwo(torch.nn.Module):
    """Makes the number of images a constant."""

    def __init__(self):
        super().__init__()
        self.token, self.fc = torch.nn.Parameter(torch.randn(1, 4)), torch.nn.Linear(4 + 3 * 64, 5)
        self.info = ModelInfo("mine", "digits", 5, 8, MEAN, STD)

    def forward(self, x):
        return self.fc(torch.cat([self.token.expand(len(x), -1), x.flatten(1)], 1))


def test_a_network_of_ones_own_whose_files_would_take_one_number_of_images_is_one_line(tmp_path):
    deployed = Deployed(OfTwo(), False)
    write_onnx(deployed, tmp_path / "model.onnx", {})
    function = load_onnx(tmp_path / "model.onnx", 1)
    torch.testing.assert_close(function(deployed.example()), deployed(deployed.example()).detach())
    with pytest.raises(UserError, match=r"^model.onnx: fails on 3 images; .* x.shape\[0\] stays free where len"):
        function(deployed.example(3))
    with pytest.raises(UserError, match=r"^--formats pt2: the network cannot be written \(UserError: Constraints viol"):
        write_pt2(deployed, tmp_path / "model.pt2", {})


def test_what_a_file_is_fed_are_the_bytes_of_the_images():
    deployed = Deployed(network("resnet8"), True)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    images = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(deployed.given(images), pixels)


@pytest.mark.parametrize(("images", "wanted"), [(1437, 120), (30, 512)])
def test_calibration_images_are_spread_over_a_sorted_split(images, wanted):
    labels = torch.arange(images) * 10 // images
    pixels = labels.byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    split = Split(pixels, labels)
    data = ImageSet("sorted", 10, 16, split, split, MEAN, STD, flip=False)
    deployed = Deployed(network("resnet8"), True)
    found = list(calibration(deployed, Pipeline(data, ImageOptions(), torch.device("cpu")), split, wanted))
    assert sum(map(len, found)) == min(images, wanted) and max(map(len, found)) <= 50
    classes = torch.cat(found)[:, 0, 0, 0].bincount(minlength=10)
    assert classes.max() - classes.min() <= 1


def test_a_proof_counts_errors_disagreements_and_ties():
    expected = torch.tensor([[4.0, 1.0, 0.0], [2.0, 1.99999, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0]])
    found = torch.tensor([[4.0, 1.2, 0.0], [1.99999, 2.0, 0.0], [0.0, 3.0, 1.0], [0.0, 5.0, 1.0]])
    proof = Proof()
    for part in (slice(0, 1), slice(1, 4)):
        proof.update(found[part], expected[part], torch.tensor([0, 1, 2, 0])[part])
    assert proof.results() == {
        "top1": 50.0,  # the first, and the second by the tie
        "network_top1": 50.0,  # the first and the third
        "images": 4,
        "max_relative_error": pytest.approx(2 / 3),
        "disagreements": 1,
        "ties": 1,
    }
    assert proof.drop == 0 and "1 of 4 images" in proof.failure(None) and proof.failure(0.0) is None
    proof = Proof()
    proof.update(torch.full((2, 3), torch.nan), expected[:2], torch.tensor([0, 1]))
    assert proof.max_relative_error == torch.inf and proof.failure(None)
    proof = Proof()
    proof.update(expected[[1, 2]], expected[:2], torch.tensor([0, 0]))
    assert proof.drop == 50 and "50.00 points" in proof.failure(49.0) and proof.failure(50.0) is None


def test_a_wrong_bias_fails_the_proof(tmp_path):
    deployed = Deployed(network("resnet8"), False)
    write_onnx(deployed, tmp_path / "model.onnx", {})
    wrong = onnx.load(tmp_path / "model.onnx")
    bias = next(each for each in wrong.graph.initializer if list(each.dims) == [5])
    values = numpy_helper.to_array(bias).copy()
    values[2] += 0.01
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    files = {name: load_onnx(tmp_path / name, 1) for name in ("model.onnx", "wrong.onnx")}
    proofs = prove(files, deployed, [(deployed.example(8), torch.zeros(8, dtype=torch.int64))])
    assert proofs["model.onnx"].failure(None) is None and proofs["wrong.onnx"].failure(None)


def test_a_run_becomes_proven_files(run, tmp_path):
    target = tmp_path / "shipped"
    words = ["export.py", run, "--formats", "onnx", "pt2", "--quantize", "int8", "--with_preprocessing"]
    words += ["--calibration_images", "100", "--max_drop", "100", "--license", "mit", "--output_dir", target]
    done = succeeded(forked(*words))
    assert "model.int8.onnx" in done.stdout
    names = {"model.onnx", "model.int8.onnx", "model.pt2"}
    model = {"model.safetensors", "model.json"}
    assert {each.name for each in target.iterdir()} == names | model | {"export.json", "README.md"}
    assert load_pretrained(target).info == load_pretrained(run).info
    found = json.loads((target / "export.json").read_text())
    top1 = json.loads((run / "summary.json").read_text())["top1"]
    for name in names:
        each = found["files"][name]
        assert each["images"] == 360 and each["bytes"] == (target / name).stat().st_size
        assert each["network_top1"] == pytest.approx(top1) and each["latency_ms"]["1"]["p50"] > 0
        if name != "model.int8.onnx":
            assert each["top1"] == pytest.approx(top1) and each["max_relative_error"] < 1e-4
    assert found["files"]["model.int8.onnx"]["max_relative_error"] > 1e-3  # it is quantised
    weights = [each.data_type for each in onnx.load(target / "model.int8.onnx").graph.initializer]
    assert onnx.TensorProto.INT8 in weights
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == pytest.approx(top1 / 100, abs=1e-4)
    recipe = card.text.split("```yaml\n")[1].split("```")[0]
    assert "output_dir" not in recipe and str(tmp_path.parent) not in card.text
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert "\npython distill.py --config recipe.yaml --output_dir RUN\n" in card.text
    succeeded(forked("distill.py", "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "again"))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()

    # Without our code: bytes in, probabilities out.
    session = onnxruntime.InferenceSession(target / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    (probabilities,) = session.run(None, {"images": images})
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    expected = Deployed(load_pretrained(run), True)(torch.from_numpy(images)).detach()
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    program = torch.export.load(target / "model.pt2").module()
    torch.testing.assert_close(program(torch.from_numpy(images)), expected)


def test_classes_are_named_in_the_files_as_the_folders_of_the_images_are(tmp_path, monkeypatch):
    names = ["wolf", "ant", "Käfer", "``` |\n# bee"]
    for label, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (60 * label + i, 9, 90)).save(tmp_path / "images" / name / f"{i}.png")
    data, folder = f"folder:{tmp_path}/images", tmp_path / "run"
    words = ["--method", "none", "--student", "resnet8", "--dataset", data, "--output_dir", folder]
    succeeded(forked("distill.py", *words, "--batch_size", "16", "--epochs", "1"))
    int8 = ["--quantize", "int8", "--max_drop", "100"]
    monkeypatch.setattr("export.machine", lambda: {"device": "NVIDIA H100"})
    succeeded(here("export.py", folder, *int8))
    for file in ("model.onnx", "model.int8.onnx"):
        metadata = onnx.load(folder / "export" / file).metadata_props
        kept = json.loads(next(each.value for each in metadata if each.key == "class_names"))
        assert kept == sorted(names) == load_images(data).class_names
    card = (folder / "export/README.md").read_text()
    fenced = card.split("```json\n")[1].splitlines()
    assert json.loads(fenced[0]) == kept and fenced[1] == "```"
    assert f"median on {cpu_name()}" in card and "H100" not in card  # whose GPU computes none of the files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, used by this process."""
    with Hub("hf_secret") as stand_in:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)  # HF_ENDPOINT is read at the import
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its server is another one
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no login"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield stand_in


def contents(folder) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_what_is_proven_is_pushed(run, hub, tmp_path):
    target = tmp_path / "shipped"
    words = ["export.py", run, "--output_dir", target, "--push_to_hub", "pool7"]
    int8 = ["--quantize", "int8", "--calibration_images", "50", "--max_drop", "100"]
    done = succeeded(here(*words, *int8, "--hub_private"))
    assert f"pushed: {hub.url}/me/pool7" in done.stdout and "hf_secret" not in done.stdout + done.stderr
    found = hub.repositories["me/pool7"]
    assert found["private"] and found["files"] == contents(target)
    assert found["files"].keys() > {"model.onnx", "model.int8.onnx", "model.safetensors", "model.json", "README.md"}

    found["files"]["notes.md"] = b"the owner's"
    succeeded(here(*words, "--overwrite"))  # without an int8 file
    assert "model.int8.onnx" not in contents(target)
    assert found["files"] == contents(target) | {"notes.md": b"the owner's"} and found["private"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("proof", "model.onnx is not shipped"),
        ("token", "no token; set HF_TOKEN"),
        ("other token", "answered 401 (Invalid username or password.); may this token"),
        ("commit", "answered 403 (refused for ***); may this token"),
        ("network", "cannot be used"),
        ("public", "exists and is public"),
    ],
)
def test_what_is_not_proven_or_not_allowed_is_not_pushed(broken, message, run, hub, tmp_path, monkeypatch):
    hub.repositories["me/pool7"] = {"private": broken != "public", "files": {}}
    if broken == "proof":
        monkeypatch.setattr("export.load_onnx", lambda *_: lambda images: torch.eye(10)[[3]].expand(len(images), 10))
    elif broken == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif broken == "other token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif broken == "commit":
        hub.status = 403
    elif broken == "network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    target = tmp_path / "shipped"
    done = here("export.py", run, "--output_dir", target, "--push_to_hub", "me/pool7", "--hub_private")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and message in last and "hf_" not in last, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert hub.repositories["me/pool7"]["files"] == {}
    assert not hub.requests if broken in ("proof", "token", "network") else hub.requests
    assert target.exists() == (broken not in ("proof", "token"))


def test_what_is_not_proven_is_not_shipped(run, tmp_path, monkeypatch):
    target = tmp_path / "shipped"
    target.mkdir()
    (target / "export.json").write_text("{}")

    def wrong(path, threads, load=load_onnx):
        return lambda images: load(path, threads)(images) + torch.eye(10)[3]

    monkeypatch.setattr("export.load_onnx", wrong)
    words = [run, "--formats", "onnx", "--output_dir", target]
    done = here("export.py", *words, "--overwrite")
    assert done.returncode == 1 and "model.onnx is not shipped" in done.stderr
    assert [each.name for each in target.iterdir()] == ["export.json"] and (target / "export.json").read_text() == "{}"
    assert list(tmp_path.iterdir()) == [target]
    assert exporters_onnx.load_onnx is load_onnx


def test_with_preprocessing_it_is_the_logits_that_are_proven(run, tmp_path, monkeypatch):
    """The probability of the third class is 0, in the file and in the network, whatever the file makes of its logit."""
    model, folder = load_pretrained(run), tmp_path / "run"
    with torch.no_grad():
        model.fc.bias[2] = -1e4
    save_pretrained(model, model.info, folder)

    def wrong(deployed, path, metadata):
        write_onnx(deployed, path, metadata)
        written = onnx.load(path)
        bias = next(each for each in written.graph.initializer if list(each.dims) == [10])
        bias.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(99) * (np.arange(10) == 2), bias.name)
        )
        onnx.save(written, path)

    succeeded(here("export.py", folder, "--with_preprocessing"))
    monkeypatch.setattr("export.write_onnx", wrong)
    done = here("export.py", folder, "--with_preprocessing", "--overwrite")
    assert done.returncode == 1 and "model.onnx is not shipped: its outputs differ" in done.stderr
    assert {each.name for each in folder.iterdir()} == {"model.json", "model.safetensors", "export"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "RUN: name one run folder"),
        (("RUN", "RUN"), "RUN: name one run folder, not 2"),
        (("/nowhere",), "/nowhere: "),
        (("RUN", "--formats", "pt2", "--quantize", "int8"), "--quantize int8: needs onnx"),
        (("RUN", "--formats", "onnx", "onnx"), "--formats onnx onnx: "),
        (("RUN", "--formats", "tflite"), "--formats"),
        (("RUN", "--calibration_images", "0"), "--calibration_images 0: "),
        (("RUN", "--max_drop", "-1"), "--max_drop -1.0: "),
        (("RUN", "--hub_private"), "--hub_private: goes with --push_to_hub"),
        (("RUN", "--push_to_hub", "a/b/c"), "--push_to_hub a/b/c: "),
        (("RUN", "--output_dir", "RUN"), "holds files that are no export's"),
        (("RUN", "--output_dir", "RUN/model.json"), "is a file"),
        (("RUN", "--output_dir", "SHIPPED"), "--overwrite replaces it"),
        (("RUN", "--output_dir", "SHIPPED", "--overwrite"), "holds notes.txt, which is no export's"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path):
    model = create_model("resnet8", 10, image_size=8)
    save_pretrained(model, ModelInfo("resnet8", "digits", 10, 8, MEAN, STD), tmp_path / "run")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/export.json").write_text("{}")
    (tmp_path / "shipped/notes.txt").touch()
    words = [word.replace("RUN", str(tmp_path / "run")).replace("SHIPPED", str(tmp_path / "shipped")) for word in words]
    done = here("export.py", *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (tmp_path / "shipped/notes.txt").is_file()
