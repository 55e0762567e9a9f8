"""Parts of a network that stay as they came, in either script, through a stop and in two processes."""

import pytest
import torch
from safetensors.torch import load_file

from common import UserError
from models import ModelInfo, create_model, save_pretrained
from models.freezing import freeze
from models.own import trust
from models.weights import Loaded
from objectives.registry import TEACHERS
from tests.runs import TINY, TINY_GTN, forked, forked_signalled, forked_two, here, read_json, succeeded
from tests.test_foreign import OWN, STAGES
from tests.test_loop import loop_of
from train_teacher import TeacherConfig

GIVEN = Loaded("weights of a file")
PARTS = ["conv1", "bn1", "layer1"]


def source(folder, name: str = "resnet8", classes: int = 10, size: int = 8):
    """A run folder whose network has BatchNorm statistics that no fresh one has."""
    torch.manual_seed(3)
    network = create_model(name, classes, image_size=size).train()
    for _ in range(2):
        network(2 * torch.randn(8, 3, size, size) + 1)
    save_pretrained(network.eval(), ModelInfo(name, "digits", classes, size, [0.5] * 3, [0.25] * 3), folder)
    return folder


def moved(before, after, *parts: str) -> tuple[set[str], set[str]]:
    """(what changed of `parts`, what else did not)."""
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    same = {name for name in one if torch.equal(one[name], two[name])}
    inside = {name for name in one if f"{name}.".startswith(tuple(f"{part}." for part in parts))}
    assert inside
    return inside - same, same - inside


def test_frozen_parts_have_no_gradient_no_optimiser_and_are_in_eval_mode(tmp_path):
    network = create_model("resnet8", 10)
    freeze(network, [*PARTS, "fc.bias"], GIVEN, "--model")
    objective = TEACHERS["vanilla"].build(network, TeacherConfig(), 8)
    loop = loop_of(objective, tmp_path)
    objective.train()
    fixed = {name for name, _ in network.named_parameters() if name.startswith((*PARTS, "fc.bias"))}
    held = {id(each) for group in loop.optimizers["weights"].param_groups for each in group["params"]}
    sum(objective(loop.train.one(0), 0).values()).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None, id(parameter) in held) == (name in fixed, name not in fixed), name
    modes = {name: module.training for name, module in network.named_modules() if not list(module.children())}
    assert {name for name, training in modes.items() if not training} == {n for n in modes if n.startswith((*PARTS,))}
    network.requires_grad_(False).requires_grad_(True)  # as branches alone, then all train
    assert not network.conv1.weight.requires_grad and network.layer2[0].conv1.weight.requires_grad


def test_a_network_of_ones_own_keeps_them_with_branches_and_through_a_stop(tmp_path):
    """Its weights are a .pth file; one part is a parameter, another is inside a submodule."""
    (tmp_path / "own.py").write_text(OWN)
    trust([own := f"{tmp_path}/own.py:build"])
    start = source(tmp_path / "start", own)
    tensors = load_file(start / "model.safetensors")
    torch.save({name.removeprefix("net."): tensor for name, tensor in tensors.items()}, tmp_path / "mine.pth")
    command = ["train_teacher.py", *TINY_GTN, "--epochs", "2", "--model", own, "--teacher_stages", *STAGES]
    command += ["--freeze_teacher_epochs", "1", "--train_fraction", "0.5", "--model_ema_decay", "0.9"]
    command += ["--weights", tmp_path / "mine.pth", "--freeze", "stem", "tokens.prefix", "one.mlp", "--output_dir"]
    succeeded(forked(*command, tmp_path / "whole"))
    assert forked_signalled(15, 8, *command, tmp_path / "parts").returncode == 143
    succeeded(forked(*command, tmp_path / "parts", "--resume_from_checkpoint", "latest"))
    changed, same = moved(start, tmp_path / "whole", "net.stem", "net.tokens.prefix", "net.one.mlp")
    assert (changed, same) == (set(), {"net.spare.weight", "net.spare.bias"})  # which take no part
    assert read_json(tmp_path / "whole/model.json")["sha256"] == read_json(tmp_path / "parts/model.json")["sha256"]


def test_a_student_keeps_them_through_a_warm_up_in_two_processes(tmp_path):
    start = source(tmp_path / "start")
    learn = ["--teacher", start, "--method", "ab", "--warmup_epochs", "1", "--student", *TINY[1:]]
    learn += ["--weights", start, "--freeze", *PARTS, "--output_dir", tmp_path / "s"]
    done = succeeded(forked_two("distill.py", *learn))
    assert "frozen: conv1, bn1, layer1 (5,136 of 78,042 parameters)" in done.stdout
    assert moved(start, tmp_path / "s", *PARTS) == (set(), set())


def test_parts_of_a_network_of_timm_are_named_as_there():
    pytest.importorskip("timm")
    network = create_model("timm:test_vit", 5, image_size=32)
    said = freeze(network, ["patch_embed", "pos_embed", "blocks.0"], GIVEN, "--model timm:test_vit")
    kept = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert kept == {n for n, _ in network.named_parameters() if n[4:].startswith(("patch_embed.", "pos_", "blocks.0."))}
    assert said.startswith("frozen: patch_embed, pos_embed, blocks.0 (") and len(kept) > 10
    with pytest.raises(UserError, match=r"--freeze stem: is no part of x, which has .*blocks, .*, cls_token"):
        freeze(network, ["stem"], GIVEN, "x")


@pytest.mark.parametrize(
    ("names", "initial", "said"),
    [
        (["bn"], GIVEN, "--freeze bn: is no part of --model x, which has conv1, bn1, layer1, layer2, layer3, fc, and"),
        (PARTS, None, "--freeze conv1 bn1 layer1: would keep random weights: the network starts fresh; give --weights"),
        (["fc"], Loaded("x", "5 classes instead of 9"), "--freeze fc: would keep random weights: the classifier"),
        ([*PARTS, "layer2", "layer3", "fc"], GIVEN, "layer3 fc: leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(names, initial, said):
    with pytest.raises(UserError) as error:
        freeze(create_model("resnet8", 5), names, initial, "--model x")
    assert said in str(error.value)


def test_both_scripts_ask_for_weights(tmp_path):
    for words in (
        ["train_teacher.py", "--model", "resnet8"],
        ["distill.py", "--student", "resnet8", "--method", "none"],
    ):
        done = here(*words, "--freeze", "conv1", "--output_dir", tmp_path / "run")
        assert done.returncode == 2 and "--freeze conv1: would keep random weights" in done.stderr
