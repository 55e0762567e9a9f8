"""KDCL's ensembles: the best combination against a fine grid, and full precision under autocast."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from losses.peers import best_combination, best_peer, least_logits, shared_logits


def peers(count: int, scale: float, seed: int, images: int = 48, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of peers that know some of the labels, each more than the one before, and the last at another scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    known = torch.arange(1, count + 1)[:, None, None] * F.one_hot(labels, classes)
    logits = torch.randn(count, images, classes, generator=generator) + known
    logits[-1] *= scale
    return logits, labels


def least_of_grid(logits: torch.Tensor, labels: torch.Tensor, parts: int) -> float:
    """The lowest cross-entropy of all weights that are multiples of 1 / parts, in float64."""
    count = len(logits)
    points = [w for w in itertools.product(range(parts + 1), repeat=count - 1) if sum(w) <= parts]
    weights = torch.tensor([(*w, parts - sum(w)) for w in points], dtype=torch.float64) / parts
    apart = logits.double() - logits.double().gather(2, labels[None, :, None].expand(count, -1, 1))
    return min(
        torch.einsum("jk,knc->jnc", some, apart).logsumexp(2).mean(1).min().item() for some in weights.split(512)
    )


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0, 1 / 16])
@pytest.mark.parametrize(("count", "parts"), [(2, 1000), (3, 100), (4, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_combination_is_better(count, parts, scale, seed):
    logits, labels = peers(count, scale, seed)
    mixed = best_combination(logits, labels)
    found = F.cross_entropy(mixed.double(), labels).item()
    assert mixed.dtype == torch.float32 and found < least_of_grid(logits, labels, parts) + 1e-3


def test_peers_that_are_alike_share_alike():
    """Columns of their own, too low to count, show the weights."""
    logits, labels = peers(3, 1.0, 0)
    twins = torch.cat([logits[:1].expand(3, -1, -1), torch.eye(3)[:, None].expand(-1, len(labels), -1) - 1e4], 2)
    assert torch.allclose(best_combination(twins, labels)[:, -3:] + 1e4, torch.tensor(1 / 3), atol=2e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
def test_ensembles_are_mixed_in_full_precision(half):
    logits, labels = peers(3, 4.0, 2)
    logits = logits.to(half)
    shares = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    calls = {
        "peer": lambda x: best_peer(x, labels),
        "combination": lambda x: best_combination(x, labels),
        "least": lambda x: least_logits(x, labels),
        "shared": lambda x: shared_logits(x, shares),
    }
    for name, ensemble in calls.items():
        exact = ensemble(logits.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = ensemble(logits)
        limit = 1e-2 if name == "combination" else 1e-6  # its weights are found to some digits only
        assert found.dtype == torch.float32, name
        assert ((found - exact).norm() / exact.norm()).item() < limit, name
