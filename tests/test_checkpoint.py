"""Checkpoints and run folders: complete, whole, and careful with what is there."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common import UserError
from engine.checkpoint import Progress, copy_checkpoint, load_checkpoint, save_checkpoint
from engine.config import RunConfig
from engine.run_folder import RUN_KEYS, RunFolder
from engine.schedule import learning_rate
from tests.runs import forked
from tests.test_security import Payload

RUNS_CONFIG = "".join(f"{key}: 1\n" for key in sorted(RUN_KEYS))
CONFIG = {"lr": 0.1, "pool": {"widths": [1, 2]}, "output_dir": "a"}


def trained(steps: int = 3):
    """A network whose second layer never got a gradient, with its two optimisers."""
    torch.manual_seed(steps)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizers = {
        "weights": torch.optim.SGD([*network[0].parameters(), *network[1].parameters()], lr=0.1, momentum=0.9),
        "gates": torch.optim.Adam(network[3].parameters(), lr=0.01, betas=(0.0, 0.999)),
    }
    for _ in range(steps):
        network[3](network[2](network[0](torch.randn(5, 3)))).pow(2).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return network, optimizers


def save(path, steps: int = 3):
    network, optimizers = trained(steps)
    numbers = {"lr": 0.1, "images": 8, "images_per_second": 4.0, "seconds": 2.0, "accuracy": {}}
    history = [{"epoch": epoch, "losses": {"ce": 1 / 3}, **numbers} for epoch in (1, 2)]
    progress = Progress(2, 5, 40, {"top1": 50.0, "epoch": 1}, history, 1.5)
    save_checkpoint(path, network, optimizers, {}, progress, CONFIG)
    return network, optimizers, progress


def load(path, network, optimizers, **config):
    return load_checkpoint(path, network, optimizers, {}, CONFIG | config, {"output_dir"})


def step_again(network, optimizers):
    source = torch.Generator().manual_seed(9)
    network[3](network[2](network[0](torch.randn(5, 3, generator=source)))).pow(2).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_everything_comes_back_and_training_goes_on_alike(tmp_path):
    network, optimizers, progress = save(tmp_path / "c.safetensors")
    other, others = trained(steps=1)
    assert load(tmp_path / "c.safetensors", other, others, output_dir="b") == (progress, None)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert (
        optimizers["weights"].state_dict()["state"].keys() == others["weights"].state_dict()["state"].keys() == {0, 1}
    )
    for a, b in zip(step_again(network, optimizers), step_again(other, others), strict=True):
        assert torch.equal(a, b)


def test_shared_parameters_are_saved_once(tmp_path):
    shared = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "c", nn.ModuleList([shared, shared]), {}, {}, Progress(), {})
    assert load_file(tmp_path / "c").keys() == {"objective/0.weight", "objective/0.bias"}
    one = nn.Linear(2, 2)
    load_checkpoint(tmp_path / "c", nn.ModuleList([one, one]), {}, {}, {}, set())
    assert torch.equal(one.weight, shared.weight)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "text", "pickle", "foreign"])
def test_bad_checkpoints_are_refused_and_change_nothing(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save(path)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 16]) + data[-2:])
    elif damage == "text":
        path.write_text("{}")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    else:
        import safetensors.torch

        safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    network, optimizers = trained(1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        load(path, network, optimizers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not (tmp_path / "executed").exists()


def test_a_different_configuration_is_refused_by_field(tmp_path):
    save(tmp_path / "c")
    with pytest.raises(UserError, match=r"--lr is 0.2, but the checkpoint was made with 0.1"):
        load(tmp_path / "c", *trained(1), lr=0.2)
    with pytest.raises(UserError, match="--pool"):
        load(tmp_path / "c", *trained(1), pool={"widths": [1, 3]})


def test_other_networks_are_refused(tmp_path):
    save(tmp_path / "c")
    with pytest.raises(UserError, match="networks"):
        load_checkpoint(tmp_path / "c", nn.Linear(1, 1), {}, {}, CONFIG, set())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.test_checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    save(Path(sys.argv[1]), steps=5)
except OSError:
    sys.exit(9)
"""


def test_a_failing_write_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path)
    before = path.read_bytes()
    done = forked("-c", FULL_DISK, path)
    assert done.returncode == 9, done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]


def test_a_copy_keeps_its_content_when_the_source_is_replaced(tmp_path):
    save(tmp_path / "last")
    before = (tmp_path / "last").read_bytes()
    copy_checkpoint(tmp_path / "last", tmp_path / "best")
    save(tmp_path / "last", steps=5)
    assert (tmp_path / "best").read_bytes() == before != (tmp_path / "last").read_bytes()
    copy_checkpoint(tmp_path / "last", tmp_path / "best")
    assert (tmp_path / "best").read_bytes() == (tmp_path / "last").read_bytes()


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_learning_rates_are_those_of_torchs_schedulers(schedule):
    config = RunConfig(lr=0.05, epochs=240, lr_schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = {
        "multistep": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [150, 180, 210], 0.1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }[schedule]()
    for epoch in range(240):
        assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["thesis.tex"], {}, "no run's"),
        (["thesis.tex"], {"overwrite": True}, "no run's"),
        (["config.yaml", "summary.json"], {}, "finished run"),
        (["config.yaml", "summary.json"], {"resume": "latest"}, "finished run"),
        (["config.yaml"], {}, "unfinished run"),
    ],
)
def test_folders_that_hold_something_are_refused(tmp_path, files, options, message):
    for name in files:
        (tmp_path / name).write_text(RUNS_CONFIG)
    with pytest.raises(UserError, match=message):
        RunFolder(tmp_path, **options)
    assert all((tmp_path / name).read_text() == RUNS_CONFIG for name in files)


def test_overwriting_replaces_a_runs_files_and_nothing_else(tmp_path):
    for name in ("config.yaml", "summary.json", "notes.txt"):
        (tmp_path / name).write_text(RUNS_CONFIG)
    (tmp_path / "plots").mkdir()
    RunFolder(tmp_path, overwrite=True).begin({"lr": 1})
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "notes.txt"]


def test_a_folder_in_use_is_refused_and_free_afterwards(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(UserError, match="another run"):
        RunFolder(tmp_path / "run").lock()
    first._lock.close()
    RunFolder(tmp_path / "run").lock()
