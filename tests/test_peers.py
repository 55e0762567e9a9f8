"""DML and KDCL: their formulas, that no peer is more than another, and copies of a batch."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data.augment import Augmentation, Normalise
from data.batch import Batch
from data.datasets import load_images
from data.loader import DeviceLoader
from engine.objective import weighted_sum
from losses.peers import (
    best_combination,
    best_peer,
    error_products,
    least_error_shares,
    least_logits,
    mutual,
    shared_logits,
)
from losses.registry import METHODS
from models import create_model
from objectives.peers import Peers
from tests.runs import TINY, forked, forked_two, here, read_json, read_rows, succeeded

F64 = torch.float64
NAMES = [name for name, method in METHODS.items() if method.peers]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(1).mean()


def test_mutual_learning_is_the_mean_over_the_others():
    logits, labels = random(3, 6, 4).requires_grad_(), torch.arange(6) % 4
    ce, found = mutual(logits, labels)
    total = 0
    for k in range(3):
        q = logits[k].softmax(1)
        expected = sum(kl(logits[j].detach().softmax(1), q) for j in range(3) if j != k) / 2
        assert found[k].item() == pytest.approx(expected.item()) and ce[k].item() == pytest.approx(
            F.cross_entropy(logits[k], labels).item()
        )
        total = total + expected
    # Each network's own gradient alone: its logits are fixed where it teaches.
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (found.sum(), total)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)


def test_the_best_peer_is_the_one_with_the_lowest_cross_entropy():
    logits, labels = random(3, 6, 4), torch.arange(6) % 4
    logits[1] += 3 * F.one_hot(labels, 4)
    assert torch.equal(best_peer(logits, labels), logits[1])


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_best_combination_is_that_of_a_fine_search(scale):
    labels = torch.arange(40) % 4
    logits = scale * random(2, 40, 4, seed=1) + F.one_hot(labels, 4)
    found = F.cross_entropy(best_combination(logits, labels), labels)
    grid = [w * logits[0] + (1 - w) * logits[1] for w in torch.linspace(0, 1, 1001, dtype=F64)]
    best = min(F.cross_entropy(mixed, labels) for mixed in grid)
    alone = min(F.cross_entropy(each, labels) for each in logits)
    assert best <= found + 1e-5 and found <= best + 0.02 * (alone - best) + 1e-4


def test_least_logits():
    logits, labels = random(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    found = least_logits(logits, labels)
    for n in range(5):
        for c in range(4):
            assert found[n, c] == min((logits[k, n, c] - logits[k, n, labels[n]]).item() for k in range(3))
    assert not found.gather(1, labels[:, None]).any()


def test_shares_have_the_least_error():
    """Against a search over the shares of three peers, on the error that they should minimise."""
    labels = torch.arange(60) % 4
    logits = random(3, 60, 4, seed=2) + torch.tensor([3.0, 2.0, 0.5])[:, None, None] * F.one_hot(labels, 4)
    parts = sum(error_products(each, part) for each, part in zip(logits.split(25, 1), labels.split(25), strict=True))
    shares = least_error_shares(parts)
    probabilities = logits.softmax(2)

    def error(w: torch.Tensor) -> float:
        return (torch.einsum("k,knc->nc", w, probabilities) - F.one_hot(labels, 4)).square().sum().item()

    grid = torch.linspace(-0.5, 1.5, 81, dtype=F64)
    best = min(error(torch.stack([a, b, 1 - a - b])) for a in grid for b in grid)
    assert shares.sum().item() == pytest.approx(1) and error(shares) == pytest.approx(best, rel=1e-3)
    assert least_error_shares(torch.ones(2, 2, dtype=F64)).tolist() == pytest.approx([0.5, 0.5])
    mixed = shared_logits(logits, shares)
    assert torch.allclose(mixed, sum(w * z for w, z in zip(shares, logits, strict=True)))


@pytest.mark.parametrize("name", NAMES)
def test_swapping_peers_swaps_their_gradients(name):
    torch.manual_seed(0)
    one, two = create_model("resnet8", 4), create_model("resnet8", 4)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 4
    results = []
    for networks in ([one, two], [two, one]):
        objective = Peers(networks, METHODS[name])
        batch = Batch(images if objective.copies == 1 else torch.cat([images, images]), labels)
        objective.zero_grad()
        terms = objective(batch, 0)
        weighted_sum(objective, terms).backward()
        results.append([terms["ce"].item(), terms["kl"].item(), one.fc.weight.grad.clone(), two.fc.weight.grad.clone()])
    for before, after in zip(*results, strict=True):
        assert torch.allclose(torch.as_tensor(before), torch.as_tensor(after), rtol=1e-4, atol=1e-5)
    assert results[0][1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_nothing_to_teach(name):
    torch.manual_seed(0)
    one, two = create_model("resnet8", 4), create_model("resnet8", 4)
    two.load_state_dict(one.state_dict())
    objective = Peers([one, two], METHODS[name]).eval()
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 4
    found = objective(Batch(images if objective.copies == 1 else torch.cat([images] * 2), labels), 0)["kl"]
    assert abs(found.item()) < 1e-5


def test_copies_have_the_same_images_and_crops_of_their_own():
    data = load_images("digits", 16)
    plain = Normalise(data.mean, data.std, torch.device("cpu"))
    augmentation = Augmentation(16, padding=2, flip=False)
    both = DeviceLoader(data.train, 64, plain, augmentation, seed=3, copies=3).one(0)
    alone = DeviceLoader(data.train, 64, plain, augmentation, seed=3).one(0)
    first, second, third = both.images.chunk(3)
    assert torch.equal(first, alone.images) and torch.equal(both.labels, alone.labels) and len(both.labels) == 64
    assert both.images.is_contiguous(memory_format=torch.channels_last)
    for one, other in ((first, second), (second, third), (first, third)):
        different = (one != other).flatten(1).any(1).float().mean()
        assert different > 0.85  # 1 in 25 has the same crop


def test_the_scripts_train_peers(tmp_path):
    fixed = ["--student", "resnet8", *TINY[2:], "--train_fraction", "0.2"]
    done = succeeded(forked("distill.py", *fixed, "--method", "kdcl", "--peers", "resnet8x2", "resnet14",
                            "--output_dir", tmp_path / "kdcl"))  # fmt: skip
    row = read_rows(tmp_path / "kdcl" / "metrics.jsonl")[0]
    assert list(row["accuracy"]) == ["student", "peer2", "peer3"] and row["images"] == 288
    assert "kdcl with resnet8x2 and resnet14" in done.stdout and "--method none" in done.stdout
    assert read_json(tmp_path / "kdcl" / "model.json")["name"] == "resnet8"
    succeeded(forked_two("distill.py", *fixed, "--method", "dml", "--output_dir", tmp_path / "dml"))
    assert read_rows(tmp_path / "dml" / "metrics.jsonl")[0]["images"] == 288
    general = [*fixed, "--method", "kdcl_general", "--output_dir", tmp_path / "general"]
    refused = here("distill.py", *general)
    assert refused.returncode == 2 and "--method kdcl_general: weighs its peers on a" in refused.stderr
    succeeded(forked_two("distill.py", *general, "--val_fraction", "0.2", "--peers", "resnet8x2", "--epochs", "2"))
    state = load_file(tmp_path / "general" / "checkpoints" / "last.safetensors")
    (shares,) = (tensor for name, tensor in state.items() if name.endswith("shares"))
    assert shares.sum().item() == pytest.approx(1) and shares.tolist() != [0.5, 0.5]
    done = here("distill.py", *fixed, "--method", "none", "--peers", "resnet8", "--output_dir", tmp_path / "no")
    assert done.returncode == 2 and "--peers resnet8 (for dml" in done.stderr


def test_peers_are_an_objective():
    objective = Peers([nn.Identity(), nn.Identity()], METHODS["kdcl"])
    assert objective.copies == 2 and objective.term_weights == {"ce": 1.0, "kl": 4.0}
    assert Peers([nn.Identity(), nn.Identity()], METHODS["dml"]).term_weights == {"ce": 1.0, "kl": 1.0}
