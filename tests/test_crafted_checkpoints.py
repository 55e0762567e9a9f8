"""Checkpoints with a right checksum and wrong contents: one line, and nothing is changed."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from common import UserError
from engine.checkpoint import Progress, _digest, load_checkpoint, save_checkpoint
from tests.runs import TINY, here, succeeded

ROW = {"epoch": 1, "lr": 0.1, "images": 4, "images_per_second": 9.0, "seconds": 0.5, "losses": {"ce": 1.5}}
ROW |= {"accuracy": {"teacher": 50.0}, "top5": {"teacher": 90.0}, "gates": {"branch1": {"L2": {"zero": 0.5}}}}


def checkpoint(path, change) -> tuple[nn.Module, dict]:
    """A checkpoint with a right checksum whose tensors and state were changed by hand."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizers = {"weights": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)}
    network(torch.randn(4, 3)).sum().backward()
    optimizers["weights"].step()
    save_checkpoint(
        path,
        network,
        optimizers,
        {},
        Progress(2, 0, 5, history=[ROW, ROW | {"epoch": 2}]),
        {"lr": 0.1},
        {"the data set": "a"},
    )
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = json.loads(file.metadata()["state"])
    change(state, tensors)
    document = json.dumps(state)
    safetensors.torch.save_file(tensors, path, {"state": document, "sha256": _digest(tensors, document)})
    return network, optimizers


CRAFTED = {
    "no progress": lambda state, tensors: state.pop("progress"),
    "an unknown field": lambda state, tensors: state["progress"].update(colour=1),
    "a negative epoch": lambda state, tensors: state["progress"].update(epoch=-1),
    "an epoch in words": lambda state, tensors: state["progress"].update(epoch="two"),
    "a batch past all integers": lambda state, tensors: state["progress"].update(batch=2**70),
    "no history": lambda state, tensors: state["progress"].update(history=3),
    "a row too many": lambda state, tensors: state["progress"]["history"].append(ROW),
    "a row without losses": lambda state, tensors: state["progress"]["history"][0].pop("losses"),
    "an accuracy in words": lambda state, tensors: state["progress"]["history"][0].update(accuracy="high"),
    "gates that are no numbers": lambda state, tensors: state["progress"]["history"][1]["gates"].update(branch1=None),
    "a row of another branch": lambda state, tensors: state["progress"]["history"][1].update(gates={"branch2": {}}),
    "a loss that is no number": lambda state, tensors: state["progress"]["history"][1]["losses"].update(
        ce=float("nan")
    ),
    "a best in words": lambda state, tensors: state["progress"].update(best={"top1": "x", "epoch": 1}),
    "sums that are none": lambda state, tensors: state["progress"].update(partial={"sums": {"ce": [1]}}),
    "no best": lambda state, tensors: state["progress"].update(best=[]),
    "no groups": lambda state, tensors: state.update(param_groups={}),
    "groups of another optimiser": lambda state, tensors: state["param_groups"].update(gates=[]),
    "a group less": lambda state, tensors: state["param_groups"].update(weights=[]),
    "a state of another shape": lambda state, tensors: tensors.update(
        {"optimizer/weights/0/momentum_buffer": torch.zeros(7)}
    ),
    "a state of no parameter": lambda state, tensors: tensors.update(
        {"optimizer/weights/9/momentum_buffer": torch.zeros(2)}
    ),
    "a state without a number": lambda state, tensors: tensors.update({"optimizer/weights/x/y": torch.zeros(2)}),
    "no config": lambda state, tensors: state.pop("config"),
    "a config in words": lambda state, tensors: state.update(config="lr"),
    "a scaler that is not there": lambda state, tensors: state.update(others={"scaler": {}}),
    "no fingerprints": lambda state, tensors: state.pop("fingerprints"),
    "another data set": lambda state, tensors: state["fingerprints"].update({"the data set": "b"}),
    "a tensor less": lambda state, tensors: tensors.pop("objective/bias"),
    "a tensor of another shape": lambda state, tensors: tensors.update({"objective/bias": torch.zeros(9)}),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_checkpoint_is_one_line_and_changes_nothing(tmp_path, case):
    network, optimizers = checkpoint(tmp_path / "c.safetensors", CRAFTED[case])
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        load_checkpoint(tmp_path / "c.safetensors", network, optimizers, {}, {"lr": 0.1}, set(), {"the data set": "a"})
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))


def test_an_unchanged_one_loads(tmp_path):
    network, optimizers = checkpoint(tmp_path / "c.safetensors", lambda state, tensors: None)
    arguments = (tmp_path / "c.safetensors", network, optimizers, {}, {"lr": 0.1}, set(), {"the data set": "a"})
    assert load_checkpoint(*arguments)[0].iteration == 5


def test_a_batch_past_the_epochs_end_is_refused(tmp_path):
    """A file that fits this run in all but the place: nothing would be left to train on, and no loss to average."""
    run = tmp_path / "r"
    arguments = [*TINY, "--train_fraction", "0.1", "--output_dir", run, "--epochs", "2"]
    succeeded(here("train_teacher.py", *arguments))
    path = run / "checkpoints/last.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = json.loads(file.metadata()["state"])
    state["progress"] |= {"epoch": 1, "batch": 99, "history": state["progress"]["history"][:1]}
    document = json.dumps(state)
    safetensors.torch.save_file(tensors, path, {"state": document, "sha256": _digest(tensors, document)})
    (run / "summary.json").unlink()
    done = here("train_teacher.py", *arguments, "--resume_from_checkpoint", "latest")
    assert done.returncode == 2 and "is at batch 99 of" in done.stderr
