"""ExecuTorch files: what they compute, and that a wrong one is not shipped; without ExecuTorch, one line."""

import json
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file

from common import UserError
from exporters.deployed import Deployed
from exporters.pte import MAX_BATCH, load_pte, write_pte
from tests.runs import here, succeeded, trained_alone
from tests.test_export import OfTwo, network

WHERE = "make executorch-check"


def executorch():
    pytest.importorskip("executorch", reason=WHERE)


def test_without_executorch_it_is_one_line_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.delitem(sys.modules, "executorch.runtime", raising=False)
    monkeypatch.delitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", raising=False)
    done = here("export.py", "runs/nowhere", "--formats", "onnx", "pte")
    wanted = "--formats pte: needs ExecuTorch; pip install --no-deps -r requirements-executorch.txt"
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].endswith(wanted), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# Of shufflenetv2 units take a batch apart into two, of shufflenetv1 parts are not XNNPACK's.
@pytest.mark.parametrize(("name", "preprocessing"), [("resnet8", True), ("shufflenetv2", False)])
def test_a_file_computes_the_network_for_any_batch_size(name, preprocessing, tmp_path):
    executorch()
    from executorch.runtime import Runtime

    deployed, metadata = Deployed(network(name, 32), preprocessing), {"name": name, "class_names": ["Käfer", '"']}
    write_pte(deployed, tmp_path / "model.pte", metadata)
    function = load_pte(tmp_path / "model.pte", 1)
    for count in (1, 2, 3, MAX_BATCH, MAX_BATCH + 1):
        images = deployed.example(count)
        torch.testing.assert_close(function(images), deployed(images).detach(), rtol=1e-4, atol=1e-5)
    program = Runtime.get().load_program(tmp_path / "model.pte")
    assert json.loads(program.load_method("metadata").execute([])[0]) == metadata
    (delegate,) = set(Runtime.get().backend_registry.registered_backend_names) & {"XnnpackBackend"}
    assert delegate.encode() in (tmp_path / "model.pte").read_bytes()


def test_a_network_of_ones_own_that_takes_one_number_of_images_is_one_line(tmp_path):
    executorch()
    with pytest.raises(UserError, match=r"^--formats pte: the network cannot be written \(UserError: Constraints viol"):
        write_pte(Deployed(OfTwo(), False), tmp_path / "model.pte", {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_alone(tmp_path_factory.mktemp("runs") / "student")


def test_a_run_becomes_a_proven_file_and_one_with_a_wrong_bias_is_not_shipped(run, tmp_path, monkeypatch):
    executorch()
    target = tmp_path / "shipped"
    words = ["export.py", run, "--formats", "pte", "--output_dir", target]
    done = succeeded(here(*words))
    assert "model.pte" in done.stdout and "cpuinfo" not in done.stderr, done.stderr
    found, top1 = (
        json.loads((target / "export.json").read_text()),
        json.loads((run / "summary.json").read_text())["top1"],
    )
    each = found["files"]["model.pte"]
    assert each["images"] == 360 and each["top1"] == each["network_top1"] == pytest.approx(top1)
    assert each["max_relative_error"] <= 1e-4 and each["disagreements"] == 0 and each["max_batch"] == MAX_BATCH
    assert each["bytes"] == (target / "model.pte").stat().st_size and each["latency_ms"]["32"]["p50"] > 0
    assert "`model.pte` takes up to 32 images at a time." in (target / "README.md").read_text()

    def with_a_wrong_bias(deployed, path, metadata):
        write_pte(deployed, path, metadata)
        content, bias = path.read_bytes(), load_file(run / "model.safetensors")["fc.bias"]
        values = bias.tolist()
        stored = struct.pack(f"<{len(values)}f", *values)
        assert content.count(stored) == 1
        values[2] += 0.01
        path.write_bytes(content.replace(stored, struct.pack(f"<{len(values)}f", *values)))

    monkeypatch.setattr("export.write_pte", with_a_wrong_bias)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    done = here(*words, "--overwrite")
    assert done.returncode == 1 and "model.pte is not shipped: its outputs differ" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(tmp_path.iterdir()) == [target]
