"""Metrics and statistics of reports/, against closed forms."""

import math

import pytest
import torch
from scipy.stats import ttest_1samp

from reports import metrics
from reports.statistics import paired_difference, student_interval


def test_kl_confidence_and_entropy_of_two_classes():
    p, q = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])  # (3/4, 1/4) and (1/2, 1/2)
    assert metrics.kl_divergence(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert metrics.kl_divergence(q, p) == pytest.approx(-0.5 * math.log(1.5) - 0.5 * math.log(0.5), rel=1e-6)
    assert metrics.confidence(p) == pytest.approx(0.75) and metrics.confidence(q) == pytest.approx(0.5)
    assert metrics.entropy(q) == pytest.approx(math.log(2))
    assert metrics.cross_entropy(p, torch.tensor([1])) == pytest.approx(math.log(4), rel=1e-6)


def test_agreement_is_about_the_most_likely_class():
    one = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 0.0], [0.0, 0.1]])
    other = torch.tensor([[9.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 7.0]])
    assert metrics.agreement(one, other) == 75.0


def test_cka_ignores_rotation_scale_and_shift_and_sees_independence():
    torch.manual_seed(0)
    x = torch.randn(2000, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert metrics.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-9)
    assert metrics.linear_cka(x, torch.randn(2000, 6)) < 0.02
    # Two one-dimensional embeddings: the squared correlation.
    a, b = x[:, :1], x[:, :1] + x[:, 1:2]
    correlation = torch.corrcoef(torch.cat([a, b], 1).T)[0, 1]
    assert metrics.linear_cka(a, b) == pytest.approx(float(correlation) ** 2, rel=1e-9)


def test_the_interval_is_students_over_the_seeds():
    """However many students a seed has: they share its teacher."""
    values, baseline = [3.0, 4.5, 2.0, 5.0, 4.0], [2.0, 3.0, 2.5, 3.0, 2.0]
    keys = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    found = paired_difference(
        dict(zip(keys, values, strict=True)), dict(zip(keys, baseline, strict=True)), {key: key[1] for key in keys}
    )
    expected = ttest_1samp([1.25, 0.75, 2.0], 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(4 / 3) and (found.pairs, found.seeds) == (5, 3)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.verdict() == "not distinguishable with this many seeds"


@pytest.mark.parametrize(("shift", "verdict"), [(5.0, "better"), (-5.0, "worse"), (0.0, "not distinguishable")])
def test_the_verdict_follows_the_intervals(shift, verdict):
    baseline = {(student, seed): 10.0 + seed + student for student in range(4) for seed in range(3)}
    values = {key: value + shift + 0.1 * (-1) ** key[1] for key, value in baseline.items()}
    assert paired_difference(values, baseline, {key: key[1] for key in values}).verdict().startswith(verdict)


def test_one_seed_gives_no_verdict_and_no_pairs_an_error():
    one = {("a", 0): 1.0, ("b", 0): 2.0}
    assert paired_difference(one, dict.fromkeys(one, 0.0), dict.fromkeys(one, 0)).verdict().startswith("too few")
    assert student_interval([1.0]) is None
    with pytest.raises(ValueError, match="no runs in common"):
        paired_difference(one, {}, {})


def test_calibration_of_a_hand_made_set():
    """Two bins: 0.95 said of four, right three times; 0.55 said of two, right once."""
    confidences = torch.tensor([0.95] * 4 + [0.55] * 2)
    correct = torch.tensor([1, 1, 1, 0, 1, 0])
    expected = 4 / 6 * abs(0.75 - 0.95) + 2 / 6 * abs(0.5 - 0.55)
    bins = metrics.calibration_bins(confidences, correct)
    assert metrics.calibration_error(bins) == pytest.approx(expected, abs=1e-7)
    first, second = metrics.reliability(bins)
    assert first["share"] == pytest.approx(1 / 3) and second["accuracy"] == pytest.approx(0.75)
    # A bin holds its upper edge: 0.2 and 0.21 are in different ones of five.
    edges = metrics.calibration_bins(torch.tensor([0.2, 0.21], dtype=torch.float64), torch.tensor([1, 0]), bins=5)
    assert edges[0].tolist() == [1, 1, 0, 0, 0] and len(metrics.reliability(edges)) == 2
    assert metrics.calibration_error(metrics.calibration_bins(torch.ones(5), torch.ones(5))) == 0


def test_the_bootstrap_interval_is_the_binomials():
    from scipy.stats import binom

    low, high = metrics.bootstrap_interval(700, 1000)
    assert low == pytest.approx(binom.ppf(0.025, 1000, 0.7) / 10, abs=0.2)
    assert high == pytest.approx(binom.ppf(0.975, 1000, 0.7) / 10, abs=0.2)


def hsic_by_definition(k: torch.Tensor, other: torch.Tensor) -> float:
    """The U-statistic that HSIC_1 is: over all ordered quadruples of different images (Song et al., 2012, eq. 4)."""
    from itertools import permutations

    n, total = len(k), 0.0
    for i, j, q, r in permutations(range(n), 4):
        total += float(k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_unbiased_hsic_equals_its_definition():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    grams = [x @ x.T, y @ y.T]
    found = metrics.unbiased_hsic(torch.stack(grams), torch.stack(grams[::-1]))
    expected = [[hsic_by_definition(k, other) for other in grams[::-1]] for k in grams]
    assert found.tolist() == [pytest.approx(row, rel=1e-9) for row in expected]


def test_similarity_over_batches():
    torch.manual_seed(0)
    x = torch.randn(600, 8)
    noise, half = torch.randn(600, 8), torch.cat([x[:, :4], torch.randn(600, 4)], 1)
    found = metrics.Similarity()
    for part in range(0, 600, 100):
        rows = slice(part, part + 100)
        found.update([x[rows], noise[rows]], [2 * x[rows] + 1, half[rows]])
    (same, part), (apart, _) = found.matrix()
    assert same == pytest.approx(1, abs=1e-9) and abs(apart) < 0.05
    assert part == pytest.approx(0.5, abs=0.05)  # four of eight independent directions in common
    shifted = metrics.Similarity()
    shifted.update([x + 1000], [x])  # in float32, as the maps behind a ReLU have a mean
    assert shifted.matrix() == [[pytest.approx(1, abs=1e-4)]]
