"""Networks of timm, of torchvision and of the user's own: their maps, what rebuilds them, and training with them."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from common import UserError
from data.batch import Batch
from distill import DistillConfig
from engine.objective import weighted_sum
from losses.registry import find_methods
from models import ModelInfo, create_model, load_pretrained, load_weights, rebuilt_by, save_pretrained
from models.foreign import Foreign
from models.network import block_shapes, run_blocks
from models.own import trust
from models.pool import Pool
from objectives.distillation import Distillation, build_methods
from objectives.registry import TEACHERS
from tests.runs import TINY_POOL, forked, forked_signalled, forked_two, here, read_json, read_rows, succeeded
from train_teacher import TeacherConfig

OWN = '''
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("executed").touch()


class Tokens(nn.Module):
    """Patches of 4x4 with two tokens in front, which stay in front."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(8, width, 4, 4)
        self.prefix = nn.Parameter(torch.randn(2, width))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(x), -1, -1), tokens], 1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x):
        return x + self.mlp(self.norm(x)), "and more"


class Mine(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.tokens, self.one, self.two = Tokens(12), Block(12), Block(12)
        self.spare, self.head = nn.Linear(3, 3), nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.tokens(self.stem(x))
        return self.head(self.two(self.one(x)[0])[0].mean(1))


def build(num_classes):
    return Mine(num_classes)


def broken(num_classes):
    raise KeyError("no such thing")


def last(num_classes, image_size):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, num_classes)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3))) * 2

    return Last()
'''
STAGES = ["stem", "tokens", "one"]
POOL = Pool(
    stem=4, head=8, widths=[4, 4, 4, 8, 8, 8], strides=[1, 1, 1, 2, 2, 1], candidates=["res3x2", "identity", "zero"]
)
SHORT = ["--train_fraction", "0.2", "--batch_size", "48", "--epochs", "1", "--image_size", "32", "--output_dir"]
NAMES = ["timm:test_vit", "timm:test_convnext", "own"]
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return file


def made(name: str, own: Path, size: int = 32) -> Foreign:
    """One of NAMES, with random weights."""
    torch.manual_seed(0)
    if name == "own":
        return create_model(f"{own}:build", 5, image_size=size, stages=STAGES)
    pytest.importorskip("timm")
    return create_model(name, 5, image_size=size)


def test_a_vision_transformers_maps_are_its_tokens_on_their_grid_without_the_first():
    timm = pytest.importorskip("timm")
    model, images = create_model("timm:test_vit", 5, image_size=64).eval(), torch.randn(2, 3, 64, 64)
    net = timm.create_model("test_vit", num_classes=5, img_size=64).eval()
    net.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        x, expected = net.norm_pre(net._pos_embed(net.patch_embed(images))), []
        for block in net.blocks:
            x = block(x)
            expected.append(x[:, net.num_prefix_tokens :].reshape(2, 4, 4, 64).permute(0, 3, 1, 2))
        embedding = net.forward_head(net.norm(x), pre_logits=True)
        expected = [expected[place] for place in (1, 2, 4, 5)]  # of six: behind 1.5, 3, 4.5 and 6
        logits, maps, preact, found = model(images, features="both")
        behind, last = run_blocks(model, images)
    torch.testing.assert_close([*maps[1:], *preact[1:]], 2 * expected)
    torch.testing.assert_close(behind, expected[:3])
    torch.testing.assert_close([logits, last, found], [net.head(embedding)] * 2 + [embedding])
    assert maps[0] is images and net.num_prefix_tokens == 1


def test_maps_of_named_submodules(own):
    """A map after a ReLU, whose input is its pre-activation; tokens with two in front; a tuple's first element."""
    model, images = made("own", own).eval(), torch.randn(2, 3, 32, 32)
    net = model.net
    with torch.no_grad():
        before = net.stem[:2](images)
        tokens = net.tokens(before.relu())
        one = net.one(tokens)[0]
        grids = [x[:, 2:].transpose(1, 2).reshape(2, 12, 8, 8) for x in (tokens, one)]
        embedding = net.two(one)[0].mean(1)
        logits, maps, preact, found = model(images, features="both")
        assert torch.equal(model(images, features="preact")[1][1], before)
        assert [torch.equal(*pair) for pair in zip(run_blocks(model, images)[0], maps[1:], strict=True)] == [True] * 3
    torch.testing.assert_close([*maps, *preact], [images, before.relu(), *grids, images, before, *grids])
    torch.testing.assert_close([logits, found], [net.head(embedding), embedding])
    assert model.stage_shapes() == {"stem": (8, 32, 32), "tokens": (12, 8, 8), "one": (12, 8, 8)}
    assert block_shapes(model, 32) == [(8, 32), (12, 8), (12, 8)] and len(model.fc.weight) == 5


def test_any_network_of_torchvision_with_maps_where_channels_stand_last():
    model, images = (
        create_model("torchvision:resnet18", 5, image_size=64, stages=["layer1", "layer4"]).eval(),
        torch.randn(1, 3, 64, 64),
    )
    assert model.published == "resnet18" and model.stage_shapes() == {"layer1": (64, 16, 16), "layer4": (512, 2, 2)}
    _, maps, preact, _ = model(images, features="both")
    assert torch.equal(preact[2].relu(), maps[2]) and preact[2].min() < 0
    with torch.device("meta"):
        swin = create_model("torchvision:swin_t", 5, image_size=224, stages=["features.1"])
    assert swin(torch.zeros(1, 3, 224, 224, device="meta"), features=True)[1][1].shape == (1, 96, 56, 56)


def test_mistakes_are_one_line(own):
    for name, stages, message in [
        ("build", ["stem", "tokenz"], "there is no submodule 'tokenz' for a stage; did you mean tokens"),
        ("build", ["stem", "stem"], "its stages stem stem name one twice"),
        ("build", ["one", "stem"], "its stages run in another order: stem one"),
        ("build", ["spare"], "stage 'spare' takes no part in its forward pass"),
        ("build", ["head"], "stage 'head' gives a tensor [2, 5]: neither maps"),
        ("last", [], "its logits come out of no linear layer of its own"),
        ("broken", [], "fails, line 49: KeyError: 'no such thing'"),
        ("nothing", [], "defines no function nothing"),
    ]:
        with pytest.raises(UserError) as error:
            create_model(f"{own}:{name}", 5, argument="--model", stages=stages)
        assert str(error.value).startswith(f"--model {own}:{name}: ") and message in str(error.value)
    with pytest.raises(UserError, match="its output in place"):
        net = create_model(f"{own}:build", 5).net
        net.stem[2] = Adds()
        Foreign("own", net, 32, stages=["stem.1"])
    with pytest.raises(UserError, match="--student resnet8: has stages of its own"):
        create_model("resnet8", 5, argument="--student", stages=["layer1"])


def test_a_network_that_is_trained_has_the_images_classes(own, tmp_path):
    (tmp_path / "ten.py").write_text(OWN + "\n\ndef three():\n    return Mine(3)\n")
    name, run = f"{tmp_path}/ten.py:three", ["--image_size", "32", "--output_dir", tmp_path / "no"]
    for words in (["train_teacher.py", "--model", name], ["distill.py", "--method", "none", "--student", name]):
        done = here(*words, *run)
        assert done.returncode == 2 and f"{name}: gives 3 logits for 10 classes; have its" in done.stderr


class Adds(nn.Module):
    def forward(self, x):
        return x.add_(1)


def test_what_comes_before_a_relu_that_is_not_a_module_is_not_known():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(UserError, match="before the last ReLU of its stage '1' is not known"):
        Foreign("mine", net, 8, stages=["1"])(torch.randn(2, 3, 8, 8), features="preact")


def test_code_named_in_a_run_folder_runs_only_where_the_user_says_so(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    name, images = f"{tmp_path}/own.py:build", torch.randn(2, 3, 32, 32)
    model = create_model(name, 10, stages=STAGES).eval()
    info = ModelInfo(name, "digits", 10, 32, [0.5] * 3, [0.2] * 3, **rebuilt_by(model))
    save_pretrained(model, info, tmp_path / "run")
    (tmp_path / "executed").unlink()
    again = tmp_path / "again.py"  # not imported yet
    shutil.copy(tmp_path / "own.py", again)
    info.name = f"{again}:build"
    save_pretrained(model, info, tmp_path / "run")
    with pytest.raises(UserError, match=f"is made by code in '{again}'; if it is yours, set TRUSTED_CODE={again}"):
        load_pretrained(tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    monkeypatch.setenv("TRUSTED_CODE", f"/nowhere:{again}")
    loaded = load_pretrained(tmp_path / "run")
    assert (tmp_path / "executed").exists() and loaded.named_stages == tuple(STAGES)
    assert torch.equal(loaded(images), model(images))
    monkeypatch.delenv("TRUSTED_CODE")
    trust([f"{again}:other"])  # as scripts do with what is named on the command line
    assert load_pretrained(tmp_path / "run", ["one"]).named_stages == ("one",)


def test_a_network_of_the_hub_is_rebuilt_without_it(tmp_path, monkeypatch):
    """timm's own format in the hub's own cache, and no network: what is not there cannot be had."""
    timm = pytest.importorskip("timm")
    import huggingface_hub.constants as constants

    commit = tmp_path / "hub/models--me--net/snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    net = timm.create_model("test_vit", num_classes=7, img_size=32, depth=4)
    config = {"architecture": "test_vit", "num_classes": 7, "model_args": {"img_size": 32, "depth": 4}}
    (commit / "config.json").write_text(
        json.dumps(config | {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3]}})
    )
    safetensors.torch.save_file(net.state_dict(), commit / "model.safetensors")
    model, images = create_model("hf-hub:me/net", 7, image_size=32).eval(), torch.randn(2, 3, 32, 32)
    assert load_weights(model, "pretrained").fresh_classifier == ""
    assert torch.equal(model(images), net.eval()(images)) and len(model.net.blocks) == 4
    info = ModelInfo("hf-hub:me/net", "digits", 7, 32, [0.5] * 3, [0.2] * 3, **rebuilt_by(model))
    save_pretrained(model, info, tmp_path / "run")
    tuned = ["--model", "hf-hub:me/net", "--pretrained", *SHORT, tmp_path / "tuned"]
    assert "classifier fresh: 10 classes instead of 7" in succeeded(here("train_teacher.py", *tuned)).stdout
    shutil.rmtree(tmp_path / "hub")
    assert load_pretrained(tmp_path / "tuned").info.mean == [0.1, 0.2, 0.3]  # as the weights know their images
    assert torch.equal(load_pretrained(tmp_path / "run")(images), model(images))
    with pytest.raises(UserError, match="--model hf-hub:me/net: no network of timm can be had from the hub"):
        create_model("hf-hub:me/net", 7, argument="--model")
    for architecture in (
        None,
        {"name": "test_vit", "arguments": {"checkpoint_path": "x.pth"}},
        {"name": "local-dir:x", "arguments": {}},
    ):
        described = read_json(tmp_path / "run/model.json") | {"architecture": architecture}
        (tmp_path / "run/model.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match=r"model.json: cannot be of the architecture"):
            load_pretrained(tmp_path / "run")


@each_name
def test_every_kind_of_method_takes_a_step_with_them(name, own):
    """As teachers with branches, as teachers and as students; each trained part gets a gradient."""
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    batch = Batch(images, labels, torch.arange(6), torch.zeros(6, dtype=torch.long))
    for method in ("gtn", "sftn"):
        config = TeacherConfig(method=method, pool=POOL, student="resnet8")
        objective = TEACHERS[method].build(made(name, own), config, 32)
        weighted_sum(objective, objective(batch, 0)).backward()
        used = {n for n, p in objective.teacher.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert len(used) > 0.8 * len(list(objective.teacher.parameters())), (method, used)
    for method in ("kd", "sckd", "at", "vid", "reviewkd", "crd"):
        for student, teacher in (
            (create_model("resnet8", 5), made(name, own)),
            (made(name, own), create_model("resnet8", 5)),
        ):
            options = DistillConfig(method=method, batch_size=6)
            built = build_methods(find_methods(method), student, [teacher], 32, 5, labels, options)
            objective = Distillation(student, [teacher], *built, options=options).train()
            loss = weighted_sum(objective, objective(batch, 0))
            loss.backward()
            assert loss.isfinite() and student.fc.weight.grad.abs().sum() > 0


def test_methods_on_maps_ask_for_stages(own):
    student, teacher = create_model(f"{own}:build", 5), create_model("resnet8", 5)
    for pair, role in (((student, teacher), "student"), ((teacher, student), "teacher")):
        with pytest.raises(UserError, match=rf"--{role} mine: has no known feature maps; name .* --{role}_stages"):
            build_methods(find_methods("at"), pair[0], [pair[1]], 32, 5, None, DistillConfig(), ("mine", "mine"))
    with pytest.raises(UserError, match=r"own.py:build: has no known stages; name submodules with --teacher_stages"):
        block_shapes(student, 32)


def test_a_vision_transformer_with_branches_and_its_student_in_two_processes(own, tmp_path):
    """The student has parameters that take no part."""
    pytest.importorskip("timm")
    teach = ["--method", "gtn", "--model", "timm:test_vit", *TINY_POOL, *SHORT, tmp_path / "t"]
    done = succeeded(forked_two("train_teacher.py", *teach))
    assert "stages of timm:test_vit: blocks.1 64x2x2, blocks.2 64x2x2, blocks.4 64x2x2" in done.stdout
    learn = ["--method", "at", "--teacher", tmp_path / "t", "--student", f"{own}:build", "--student_stages", *STAGES]
    learn += [*SHORT, tmp_path / "s"]
    succeeded(forked_two("distill.py", *learn))
    assert set(read_rows(tmp_path / "s/metrics.jsonl")[-1]["losses"]) == {"ce", "at"}


def test_a_network_of_ones_own_with_branches_is_stopped_and_goes_on_and_teaches_another(own, tmp_path):
    teach = ["--method", "gtn", "--model", f"{own}:build", "--teacher_stages", *STAGES, *TINY_POOL, *SHORT]
    succeeded(forked("train_teacher.py", *teach, tmp_path / "whole"))
    assert forked_signalled(15, 3, "train_teacher.py", *teach, tmp_path / "parts").returncode == 143
    succeeded(forked("train_teacher.py", *teach, tmp_path / "parts", "--resume_from_checkpoint", "latest"))
    whole, parts = (read_json(tmp_path / run / "model.json") for run in ("whole", "parts"))
    assert whole["sha256"] == parts["sha256"] and whole["stages"] == STAGES
    learn = ["--method", "reviewkd", "--student", f"{own}:build", "--student_stages", *STAGES, *SHORT, tmp_path / "s"]
    succeeded(forked("distill.py", "--teacher", tmp_path / "whole", *learn))  # the file is named: it may be executed
    assert read_json(tmp_path / "s/model.json")["stages"] == STAGES


def test_a_convnext_for_one_student_is_stopped_and_goes_on_and_teaches_it_in_two_processes(tmp_path):
    pytest.importorskip("timm")
    teach = ["--method", "sftn", "--model", "timm:test_convnext", "--student", "resnet8", *SHORT]
    succeeded(forked("train_teacher.py", *teach, tmp_path / "whole"))
    assert forked_signalled(15, 3, "train_teacher.py", *teach, tmp_path / "parts").returncode == 143
    succeeded(forked("train_teacher.py", *teach, tmp_path / "parts", "--resume_from_checkpoint", "latest"))
    whole, parts = (read_json(tmp_path / run / "model.json") for run in ("whole", "parts"))
    assert whole["sha256"] == parts["sha256"]
    learn = ["--method", "crd", "--teacher", tmp_path / "whole", "--student", "resnet8", *SHORT]
    succeeded(forked_two("distill.py", *learn, tmp_path / "s"))
    losses = read_rows(tmp_path / "s/metrics.jsonl")[-1]["losses"]
    assert set(losses) == {"ce", "crd"} and losses["crd"] > 0
