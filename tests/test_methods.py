"""Every distillation loss against its paper's formula, written out in NumPy and float64; and what it implies."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from data.batch import Batch
from engine.objective import weighted_sum
from losses.adapters import pair_stages, regressor
from losses.contrastive import contrast, similarity_ratios
from losses.features import (
    activation_boundaries,
    attention_transfer,
    factor_transfer,
    gaussian_likelihood,
    last_norm,
    margins,
    mean_squares,
    neuron_selectivity,
    partial_distance,
)
from losses.logits import KD
from losses.method import Method, MethodContext, Outputs, full_precision
from losses.registry import METHODS, find_methods
from losses.relations import (
    angles_loss,
    correlation_congruence,
    distances_loss,
    probabilistic_transfer,
    similarity_preserving,
)
from losses.review import Fusion, hierarchical_context
from losses.self_supervised import cosines, rotate, selected_divergence
from models import create_model
from objectives.distillation import Distillation, build_methods
from tests.runs import forked_two, succeeded

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def agree(ours, formula, *inputs: torch.Tensor, step: float = 1e-6) -> None:
    """Value, and the gradient with respect to every input that requires it, along random directions."""
    value = ours(*inputs)
    assert value.dtype == F64 and value.item() == pytest.approx(
        formula(*(x.detach().numpy() for x in inputs)), rel=1e-9
    )
    trained = [index for index, x in enumerate(inputs) if x.requires_grad]
    assert trained
    gradients = torch.autograd.grad(value, [inputs[index] for index in trained])
    for seed, (index, gradient) in enumerate(zip(trained, gradients, strict=True)):
        direction = random(*inputs[index].shape, seed=100 + seed)
        moved = []
        for sign in (1, -1):
            arrays = [x.detach().numpy() for x in inputs]
            arrays[index] = (inputs[index].detach() + sign * step * direction).numpy()
            moved.append(formula(*arrays))
        expected = (moved[0] - moved[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def maps(*shape: int, seed: int, train: bool = False) -> torch.Tensor:
    return random(*shape, seed=seed).requires_grad_(train)


def pooled(x: np.ndarray, side: int) -> np.ndarray:
    """Means of equal squares."""
    n, c, h, _ = x.shape
    return x.reshape(n, c, side, h // side, side, h // side).mean((3, 5))


@pytest.mark.parametrize(("ours", "theirs"), [((3, 4, 4, 4), (3, 6, 4, 4)), ((3, 4, 8, 8), (3, 6, 4, 4))])
def test_attention_transfer(ours, theirs):
    def formula(s, t):
        side = min(s.shape[2], t.shape[2])
        vectors = []
        for x in (pooled(s, side), pooled(t, side)):
            a = (x**2).mean(1).reshape(len(x), -1)
            vectors.append(a / np.sqrt((a**2).sum(1, keepdims=True)))
        return ((vectors[0] - vectors[1]) ** 2).mean()

    agree(attention_transfer, formula, maps(*ours, seed=1, train=True), maps(*theirs, seed=2))


def test_neuron_selectivity_transfer():
    def formula(s, t):
        def k(a, b):
            total = 0.0
            for n in range(len(a)):
                for x in a[n]:
                    for y in b[n]:
                        cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
                        total += cosine**2 / (len(a) * a.shape[1] * b.shape[1])
            return total

        return k(t, t) + k(s, s) - 2 * k(s, t)

    agree(neuron_selectivity, formula, maps(2, 3, 3, 3, seed=1, train=True), maps(2, 4, 3, 3, seed=2))


def test_variational_information_distillation():
    def formula(mu, t, rho):
        v = np.log1p(np.exp(rho)) + 1e-5
        total = 0.0
        for n, c, i, j in np.ndindex(*t.shape):
            total += (t[n, c, i, j] - mu[n, c, i, j]) ** 2 / (2 * v[c]) + 0.5 * math.log(v[c])
        return total / t.size

    rho = random(4, seed=3).requires_grad_()
    mean, target = maps(2, 4, 3, 3, seed=1, train=True), maps(2, 4, 3, 3, seed=2)
    agree(lambda m, t, r: gaussian_likelihood(m, t, r, 1e-5), formula, mean, target, rho)


def test_activation_boundaries():
    def formula(s, t):
        total = 0.0
        for index in np.ndindex(*t.shape):
            if t[index] <= 0 and s[index] > -1:
                total += (s[index] + 1) ** 2
            elif t[index] > 0 and s[index] <= 1:
                total += (s[index] - 1) ** 2
        return total / len(s)

    agree(
        lambda s, t: activation_boundaries(s, t, 1.0),
        formula,
        maps(2, 3, 4, 4, seed=1, train=True),
        maps(2, 3, 4, 4, seed=2),
    )


def test_factor_transfer():
    def formula(s, t):
        unit = [x.reshape(len(x), -1) for x in (s, t)]
        unit = [x / np.sqrt((x**2).sum(1, keepdims=True)) for x in unit]
        return np.abs(unit[0] - unit[1]).mean()

    agree(factor_transfer, formula, maps(3, 4, 2, 2, seed=1, train=True), maps(3, 4, 2, 2, seed=2))


def test_overhaul_distance():
    def formula(s, t, m):
        total = 0.0
        for n, c, i, j in np.ndindex(*t.shape):
            a, b = s[n, c, i, j], t[n, c, i, j]
            if b <= m[c]:
                total += (a - m[c]) ** 2 if a > m[c] else 0.0
            elif b <= 0:
                total += (a - b) ** 2 if a > b else 0.0
            else:
                total += (a - b) ** 2
        return total / len(s)

    margin = torch.tensor([-0.3, -1.0, -0.05], dtype=F64)
    agree(partial_distance, formula, maps(2, 3, 4, 4, seed=1, train=True), maps(2, 3, 4, 4, seed=2), margin)


def test_margins_are_means_of_what_a_relu_takes_away():
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
        norm.bias.copy_(torch.tensor([0.0, 0.3, -1.0, 1.0]))
    found = margins(norm)
    for channel in range(3):
        x = np.linspace(-30, 0, 400_001)
        mean, deviation = norm.bias[channel].item(), abs(norm.weight[channel].item())
        density = np.exp(-((x - mean) ** 2) / (2 * deviation**2))
        assert found[channel].item() == pytest.approx((x * density).sum() / density.sum(), rel=1e-3)
    assert found[3].item() == pytest.approx(-0.3)  # below 0 only beyond 10 deviations


def test_hints():
    agree(
        mean_squares,
        lambda s, t: ((s - t) ** 2).sum() / s.size,
        maps(2, 3, 4, 4, seed=1, train=True),
        maps(2, 3, 4, 4, seed=2),
    )


def test_similarity_preserving():
    def formula(s, t):
        rows = []
        for x in (s, t):
            flat = x.reshape(len(x), -1)
            g = flat @ flat.T
            rows.append(g / np.sqrt((g**2).sum(1, keepdims=True)))
        return ((rows[0] - rows[1]) ** 2).sum() / len(s) ** 2

    agree(similarity_preserving, formula, maps(5, 3, 4, 4, seed=1, train=True), maps(5, 6, 2, 2, seed=2))


def test_correlation_congruence():
    def formula(s, t, gamma=0.4):
        def k(x):
            x = x / np.sqrt((x**2).sum(1, keepdims=True))
            out = np.empty((len(x), len(x)))
            for i, j in np.ndindex(*out.shape):
                dot = x[i] @ x[j]
                out[i, j] = math.exp(-2 * gamma) * (1 + 2 * gamma * dot + (2 * gamma * dot) ** 2 / 2)
            return out

        return ((k(s) - k(t)) ** 2).sum() / len(s) ** 2

    agree(correlation_congruence, formula, maps(5, 4, seed=1, train=True), maps(5, 7, seed=2))


def test_the_correlation_kernel_is_nearly_a_gaussian():
    """Its Taylor series to the second power, on the unit sphere: |x - y|^2 = 2 - 2 x y."""
    x = torch.nn.functional.normalize(random(2, 3), dim=1)
    far = (x[0] - x[1]).square().sum()
    loss = correlation_congruence(x, torch.tensor([[1.0, 0], [1, 0]], dtype=F64))
    assert loss.sqrt().item() == pytest.approx((1 - math.exp(-0.4 * far)) / math.sqrt(2), abs=0.06)


def huber(d: float) -> float:
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def test_relational_distances():
    def formula(s, t):
        def psi(x):
            d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
            return d / d[d > 0].mean()

        return sum(huber(d) for d in (psi(s) - psi(t)).ravel()) / len(s) ** 2

    agree(distances_loss, formula, maps(5, 3, seed=1, train=True), maps(5, 6, seed=2))


def test_relational_angles():
    def formula(s, t):
        def psi(x, i, j, k):
            a, b = x[i] - x[j], x[k] - x[j]
            if i == j or k == j:
                return 0.0
            return a @ b / np.sqrt((a @ a) * (b @ b))

        total, n = 0.0, len(s)
        for i, j, k in np.ndindex(n, n, n):
            total += huber(psi(s, i, j, k) - psi(t, i, j, k))
        return total / n**3

    agree(angles_loss, formula, maps(4, 3, seed=1, train=True), maps(4, 6, seed=2))


def test_probabilistic_transfer():
    def formula(s, t):
        def p(x):
            x = x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-7)
            k = (x @ x.T + 1) / 2
            return k / k.sum(1, keepdims=True)

        a, b = p(t), p(s)
        return (a * np.log((a + 1e-7) / (b + 1e-7))).mean()

    agree(probabilistic_transfer, formula, maps(5, 3, seed=1, train=True), maps(5, 6, seed=2))


def test_contrastive_estimation():
    """h = P / (P + K / n); P = exp(<e, m> / 0.07) / Z."""
    bank, chosen, images, z = random(9, 4, seed=3), torch.tensor([[0, 5, 6, 7], [1, 8, 5, 5]]), 9, 40.0

    def formula(e):
        total = 0.0
        for row, columns in zip(e, chosen.numpy(), strict=True):
            p = [math.exp(row @ bank.numpy()[index] / 0.07) / z for index in columns]
            h = [each / (each + 3 / images) for each in p]
            total -= math.log(h[0]) + sum(math.log(1 - each) for each in h[1:])
        return total / len(e)

    def ours(e):
        return contrast(similarity_ratios(e, bank, chosen, 0.07), torch.tensor(z, dtype=F64), images)

    agree(ours, formula, (0.1 * random(2, 4)).requires_grad_(), step=1e-7)


def test_the_order_of_a_batch_does_not_matter_to_contrast():
    bank, chosen, anchors = random(9, 4, seed=3), torch.tensor([[0, 5, 6], [1, 8, 5], [2, 3, 4]]), random(3, 4)
    order, z = torch.tensor([2, 0, 1]), torch.tensor(40.0, dtype=F64)
    losses = [
        contrast(similarity_ratios(anchors[rows], bank, chosen[rows], 0.07), z, 9) for rows in (torch.arange(3), order)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)


def test_hierarchical_context():
    def formula(s, t):
        total, weights = ((s - t) ** 2).mean(), 1.0
        for k, side in enumerate((4, 2, 1), start=1):
            total += 2.0**-k * ((pooled(s, side) - pooled(t, side)) ** 2).mean()
            weights += 2.0**-k
        return total / weights

    agree(hierarchical_context, formula, maps(2, 3, 8, 8, seed=1, train=True), maps(2, 3, 8, 8, seed=2))
    small = maps(2, 3, 1, 1, seed=1), maps(2, 3, 1, 1, seed=2)
    assert hierarchical_context(*small).item() == pytest.approx((small[0] - small[1]).square().mean().item())


@pytest.mark.parametrize("target_side", [8, 4, 12])
def test_the_last_fusion_is_what_all_are(target_side):
    """Where nothing is handed on, the narrowed map is never made: values, gradients and statistics are the same."""
    torch.manual_seed(0)
    plain = Fusion(6, 10, 5, 8, target_side, first=False).double()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    late = copy.deepcopy(plain)
    found = []
    for fusion, last in ((plain, False), (late, True)):
        own, handed = maps(3, 6, 8, 8, seed=1, train=True), maps(3, 10, 4, 4, seed=2, train=True)
        fused, _ = fusion(own, handed, last)
        fused.square().sum().backward()
        fusion.eval()
        evaluated, _ = fusion(own, handed, last)
        gradients = [own.grad, handed.grad, *(parameter.grad for parameter in fusion.parameters())]
        found.append([fused, evaluated, *gradients, *fusion.buffers()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    assert not torch.equal(late.narrow[1].running_var, torch.ones(10, dtype=F64))


def test_selected_divergence():
    """Rows that the teacher gets right, and the share of the others in which the truth ranks best."""
    own = torch.tensor([0, 1, 2, 0, 1, 2])

    def formula(s, t, share=0.5, temperature=0.5):
        rank = [(row > row[label]).sum() for row, label in zip(t, own.numpy(), strict=True)]
        order = sorted(range(len(rank)), key=lambda index: rank[index])
        wrong = sum(each > 0 for each in rank)
        kept = order[: len(rank) - wrong + math.floor(share * wrong)]
        total = 0.0
        for index in kept:
            p, q = (np.exp(x[index] / temperature) / np.exp(x[index] / temperature).sum() for x in (t, s))
            total += (p * np.log(p / q)).sum()
        return total / len(kept)

    student, teacher = maps(6, 3, seed=1, train=True), maps(6, 3, seed=5)
    wrong = (teacher > teacher.gather(1, own[:, None])).any(1).sum()
    assert 1 < wrong < 6
    agree(lambda s, t: selected_divergence(s, t, own, 0.5, 0.5), formula, student, teacher)


def test_cosines_are_those_of_turned_with_upright_images():
    x = random(8, 3)
    expected = [[(a @ b / (a.norm() * b.norm())).item() for b in x[:2]] for a in x[2:]]
    assert torch.allclose(cosines(x, 2), torch.tensor(expected, dtype=F64))


def test_rotations_come_in_quarters():
    images = random(2, 3, 4, 4)
    turned = rotate(images)
    assert turned.shape == (8, 3, 4, 4) and torch.equal(turned[:2], images)
    for quarter in (1, 2, 3):
        expected = np.rot90(images.numpy(), quarter, axes=(2, 3))
        np.testing.assert_array_equal(turned[2 * quarter : 2 * quarter + 2].numpy(), expected)


PAIRWISE = {
    "at": (attention_transfer, (4, 5, 4, 4)),
    "nst": (neuron_selectivity, (4, 5, 4, 4)),
    "sp": (similarity_preserving, (4, 5, 4, 4)),
    "ft": (factor_transfer, (4, 5, 4, 4)),
    "hcl": (hierarchical_context, (4, 5, 4, 4)),
    "cc": (correlation_congruence, (4, 5)),
    "rkd_distance": (distances_loss, (4, 5)),
    "rkd_angle": (angles_loss, (4, 5)),
    "pkt": (probabilistic_transfer, (4, 5)),
    "oh": (lambda s, t: partial_distance(s, t, torch.full((5,), -0.5, dtype=F64)), (4, 5, 4, 4)),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_nothing_is_left_to_learn_from_oneself(name):
    loss, shape = PAIRWISE[name]
    student = maps(*shape, seed=1, train=True)
    value = loss(student, student.detach().clone())
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("at", lambda x: 3 * x),
        ("nst", lambda x: 3 * x),
        ("ft", lambda x: 3 * x),
        ("sp", lambda x: 3 * x),
        ("sp", lambda x: x.flip(1)),
        ("at", lambda x: x.flip(1)),
        ("cc", lambda x: x.flip(1)),
        ("cc", lambda x: 3 * x),
        ("pkt", lambda x: 3 * x),
        ("rkd_distance", lambda x: 3 * x),
        ("rkd_angle", lambda x: 3 * x),
        ("rkd_distance", lambda x: x @ torch.linalg.qr(random(5, 5, seed=9))[0] + 1),
        ("rkd_angle", lambda x: x @ torch.linalg.qr(random(5, 5, seed=9))[0] + 1),
    ],
)
def test_what_the_student_may_change_unpunished(name, change):
    loss, shape = PAIRWISE[name]
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    tolerance = 1e-6 if name == "pkt" else 1e-9  # PKT adds 1e-7 to norms
    assert loss(change(student), teacher).item() == pytest.approx(loss(student, teacher).item(), rel=tolerance)


@pytest.mark.parametrize("name", ["pkt", "cc", "sp", "rkd_distance", "rkd_angle", "at"])
def test_the_order_of_a_batch_does_not_matter(name):
    loss, shape = PAIRWISE[name]
    student, teacher, order = random(*shape, seed=1), random(*shape, seed=2), torch.tensor([2, 0, 3, 1])
    assert loss(student[order], teacher[order]).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("case", ["zeros", "constant", "one image", "equal images"])
def test_gradients_stay_finite(name, case):
    loss, shape = PAIRWISE[name]
    teacher = random(*shape, seed=2).float()
    one = teacher[:1]
    cases = {"zeros": teacher * 0, "constant": teacher * 0 + 1, "one image": 2 * one, "equal images": one.expand(shape)}
    student = cases[case].clone().requires_grad_()
    value = loss(student, teacher[: len(student)])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_half_precision_is_raised(name):
    """Under autocast, with features far beyond what products in float16 bear."""
    loss, shape = PAIRWISE[name]
    student, teacher = (200 * random(*shape, seed=seed) for seed in (1, 2))
    exact = loss(student.half().double(), teacher.half().double())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student.half(), teacher.half())
    assert found.dtype in (torch.float32, F64) and found.item() == pytest.approx(exact.item(), rel=2e-3, abs=1e-6)


def test_full_precision_leaves_float64_alone():
    seen = full_precision(lambda x, many: (x.dtype, [y.dtype for y in many]))
    assert seen(torch.zeros(1).half(), [torch.zeros(1, dtype=F64), torch.zeros(1)]) == (
        torch.float32,
        [F64, torch.float32],
    )


# --- pairs of networks ----------------------------------------------------------------------------------------------


def sides(*numbers: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, side, side) for side in numbers]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((32, 32, 16, 8), (32, 32, 16, 8), [(1, 1), (2, 2), (3, 3)]),
        ((32, 16, 8, 4), (32, 32, 16, 8, 4), [(1, 2), (2, 3), (3, 4)]),  # resnet50 -> shufflenetv1
        ((32, 32, 16, 8), (16, 16, 8, 4, 2), [(1, 1), (2, 2), (3, 3)]),  # mobilenetv2 -> resnet8
        ((32, 16, 8, 4, 4), (32, 32, 16, 8), [(1, 1), (2, 2), (4, 3)]),
        ((8, 8, 8), (8, 8, 8, 8), [(1, 2), (2, 3)]),  # a tie: the deepest
    ],
)
def test_stages_are_paired_by_size(student, teacher, pairs):
    assert pair_stages(sides(*student), sides(*teacher)) == pairs


@pytest.mark.parametrize(("side", "target"), [(8, 8), (8, 4), (8, 2), (4, 8), (2, 8), (7, 4), (5, 6), (1, 4)])
def test_a_regressor_reaches_any_shape(side, target):
    net = regressor(torch.zeros(1, 3, side, side), torch.zeros(1, 5, target, target), rectified=True)
    out = net(torch.randn(2, 3, side, side))
    assert out.shape == (2, 5, target, target) and out.min() >= 0


class Options:
    alpha, temperature, dkd_alpha, dkd_beta = 0.9, 4.0, 1.0, None
    ce_weight, kd_weight, method_weights = None, None, ()
    lr, momentum, weight_decay, batch_size = 0.05, 0.9, 5e-4, 64


def objective(
    name: str, student: str = "resnet8", teacher: str = "resnet14", images=20, size=16, **options
) -> Distillation:
    torch.manual_seed(0)
    networks = [create_model(each, 5, image_size=size) for each in (student, teacher)]
    options = type("ChangedOptions", (Options,), options)
    classes, names, labels = find_methods(name), (student, teacher), torch.arange(images) % 5
    built, weights = build_methods(classes, networks[0], networks[1:], size, 5, labels, options, names)
    return Distillation(networks[0], networks[1:], built, weights, options=options, warmup_epochs=2)


def batch(count: int = 6, size: int = 16) -> Batch:
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(count) % 5, indices=torch.arange(count))


def rows_of(whole: Batch, rows: slice) -> Batch:
    return Batch(whole.images[rows], whole.labels[rows], indices=whole.indices[rows])


def run_step(made: Distillation, epoch: int, batch: Batch) -> dict[str, torch.Tensor]:
    made.begin_epoch(epoch)
    made.train()
    made.zero_grad()
    terms, phase = made(batch, 0), made.phase(0)
    weighted_sum(made, terms).backward(inputs=phase.grad_inputs() if phase else None)
    return terms


NAMES = [name for name, row in METHODS.items() if row.needs_teacher]
PAIRS = [("resnet8", "resnet14"), ("shufflenetv1", "resnet8x4"), ("shufflenetv2", "resnet8"), ("vgg8", "resnet8x2"),
         ("mobilenetv2", "wrn10_2"), ("nas_s", "resnet8x2"), ("wrn10_1", "mobilenetv2")]  # fmt: skip


# What is computed from logits alone knows nothing of the pair.
CASES = [(name, *pair) for name in NAMES for pair in PAIRS if METHODS[name].teacher_features or pair == PAIRS[0]]


def test_distillation_that_is_stopped_leaves_the_labels():
    made, gradients = objective("at+kd", ce_weight=0.4), []
    made.stop_kd_epoch = 2
    for epoch in (1, 2):
        terms = run_step(made, epoch, batch())
        gradients.append(made.student.conv1.weight.grad.clone())
    assert terms.keys() == {"ce", "kl", "at"}  # they can still be followed
    made.zero_grad()
    F.cross_entropy(made.student(batch().images), batch().labels).backward()
    torch.testing.assert_close(gradients[1], made.student.conv1.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_any_teacher_with_any_student(name, student, teacher):
    """Every parameter that trains gets a finite gradient; the teacher gets none and does not change."""
    size = 32 if "vgg8" in (student, teacher) else 16
    made = objective(name, student, teacher, size=size)
    frozen = made.frozen[0]
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    for epoch in range(-made.warmup_epochs, 1, 2):
        terms = run_step(made, epoch, batch(size=size))
        assert all(term.isfinite() for term in terms.values()) and set(terms) <= set(made.term_weights)
        assert epoch < 0 or set(terms) >= {"ce", *made.methods[-1].terms}
        phase = made.phase(0)
        wanted = phase.grad_inputs() if phase else [p for p in made.weight_parameters() if p.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in wanted)
        others = {id(p) for p in made.parameters()} - {id(p) for p in wanted}
        assert all(p.grad is None or not p.grad.any() for p in made.parameters() if id(p) in others)
    assert not frozen.training and all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert set(made.trained_model().state_dict()) == set(create_model(student, 5, image_size=size).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_all_alike_do_no_harm(name):
    made = objective(name)
    given = batch()
    terms = run_step(made, 0, given._replace(labels=torch.zeros_like(given.labels)))
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in made.student.parameters())


@pytest.mark.parametrize("name", ["ab", "ft", "sskd", "hsakd"])
def test_the_warm_up_trains_what_it_should(name):
    made = objective(name)
    optimizer = made.phases[0].optimizer
    assert made.warmup_epochs == 2
    start = {key: value.clone() for key, value in made.state_dict().items()}
    run_step(made, -2, batch())
    assert optimizer.param_groups[0]["lr"] == (0.01 if name == "ft" else 0.05)
    optimizer.step()
    changed = {key for key, value in made.state_dict().items() if not torch.equal(value, start[key])}
    student = {key for key in changed if key.startswith("student.")}
    assert bool(student) is (name == "ab") and not any(key.startswith("student.fc") for key in student)
    only = [module for method in made.methods for module in method.warmup_only()]
    parameters = [p for module in only for p in module.parameters()]
    assert all(p.requires_grad for p in parameters)
    middle = {key: value.clone() for key, value in made.state_dict().items()}
    run_step(made, 0, batch())
    assert not any(p.requires_grad for p in parameters) and not any(module.training for module in only)
    idle = {id(p) for p in parameters}
    assert not idle & {id(p) for p in made.weight_parameters()}
    names = [key for key, p in made.named_parameters() if id(p) in idle]
    assert all(torch.equal(made.state_dict()[key], middle[key]) for key in names)


def test_margins_come_from_the_norm_before_the_relu():
    resnet, wrn = create_model("resnet8", 5), create_model("wrn10_2", 5)
    assert last_norm(resnet, 1, 16) is resnet.layer1[0].bn2 and last_norm(resnet, 3, 64) is resnet.layer3[0].bn2
    assert last_norm(wrn, 1, 32) is wrn.block2.layer[0].bn1 and last_norm(wrn, 3, 128) is wrn.bn1
    vgg = create_model("vgg8", 5)
    assert last_norm(vgg, 4, 512) is vgg.block4[-1]
    with pytest.raises(UserError, match="--method oh: stage 1 of the teacher"):
        objective("oh", "resnet8", "shufflenetv2")


def test_contrast_with_memories():
    made = objective("crd")
    crd = made.methods[1]
    labels = torch.arange(20) % 5
    drawn = crd.draw_negatives(torch.tensor([0, 3]).repeat(3000))
    assert drawn.shape == (6000, 20)
    for label in (0, 3):
        others = labels[drawn[label // 3 :: 2]]
        counts = torch.bincount(drawn[label // 3 :: 2].flatten(), minlength=20).double()
        assert (others != label).all()
        expected = counts[labels != label].sum() / 16
        assert (counts[labels != label] - expected).abs().max() < 5 * expected.sqrt()
    given = batch()
    banks = [crd.student_bank.clone(), crd.teacher_bank.clone()]
    terms = run_step(made, 0, given._replace(indices=given.indices + 3))
    z = crd.z.clone()
    assert (z > 0).all() and torch.equal(crd.student_bank, banks[0])  # it changes after the step
    ((_, ours, _),) = crd._pending
    made.after_step()
    expected = torch.nn.functional.normalize((banks[0][3:9] + ours) / 2, dim=1)
    assert torch.allclose(crd.student_bank[3:9], expected) and torch.equal(crd.student_bank[9:], banks[0][9:])
    # By the formula, negatives that follow the noise exactly: about log(1 + K / n) and K log(1 + ...), finite.
    assert 0 < terms["crd"] < 200
    run_step(made, 0, given)
    assert torch.equal(crd.z, z)  # fixed at the first batch
    assert {"methods.1.student_bank", "methods.1.teacher_bank", "methods.1.z"} <= set(made.state_dict())
    with pytest.raises(UserError, match="--streaming"):
        build_methods(find_methods("crd"), made.student, list(made.frozen), 16, 5, None, Options)


def everyones_bank(folder: str) -> None:
    """One of two processes: half of a batch each, of different sizes."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    made = objective("crd")
    run_step(made, 0, rows_of(batch(7), slice(rank, None, 2)))
    made.after_step()
    torch.save([made.methods[1].z, made.methods[1].student_bank, made.methods[1].teacher_bank], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_one_bank(tmp_path):
    succeeded(forked_two("-c", f"from {__name__} import everyones_bank as f; f({str(tmp_path)!r})"))
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    fresh = objective("crd").methods[1]
    changed = (ours[2] != fresh.teacher_bank).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(7))  # every image's row, of either process
    # The teacher is in eval mode and its layer has not moved: one process computes the same for all seven.
    alone = objective("crd")
    run_step(alone, 0, batch(7))
    alone.after_step()
    assert torch.allclose(ours[2], alone.methods[1].teacher_bank, atol=1e-6)
    parts = objective("crd")
    for part in (slice(4), slice(4, None)):
        run_step(parts, 0, rows_of(batch(7), part))
    parts.after_step()
    assert torch.allclose(ours[2], parts.methods[1].teacher_bank, atol=1e-6)


def test_the_warm_up_has_weights_of_its_own():
    """What a warm-up minimises is no part of the loss after it, whatever it is called."""
    made = objective("ft+ab")
    after = {"ce": 1.0, "ft": made.methods[1].weight}
    assert made.term_weights == after
    made.begin_epoch(-1)
    assert made.term_weights == {"paraphraser": 1.0, "ab": 1.0}
    made.begin_epoch(0)
    assert made.term_weights == after


def test_a_warm_up_must_say_what_it_minimises():
    with pytest.raises(TypeError, match="Half: a method with warmup_epochs needs"):
        type("Half", (Method,), {"warmup_epochs": 3, "warmup_terms": {"half": 1.0}})


def test_a_shorter_warm_up_keeps_the_shape_of_its_schedule():
    made = objective("sskd")
    made.lengths, made.warmup_epochs = [0, 8], 8
    (group,) = made.phases[0].optimizer.param_groups
    rates = []
    for epoch in range(-8, 0):
        made.begin_epoch(epoch)
        rates.append(group["lr"])
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 2 + [0.0005] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_safe(name):
    made = objective(name)
    for epoch in (-2, 0)[0 if made.warmup_epochs else 1 :]:
        with torch.autocast("cpu", torch.bfloat16):
            terms = run_step(made, epoch, batch())
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_sckd_teaches_only_where_the_gradients_agree():
    made = objective("sckd")
    given, teacher = batch(), made.frozen[0]
    seen = set()
    for sign in (1, -1):
        # A teacher that is sure of the labels agrees with them; one that is sure of the opposite does not.
        scores = sign * 20 * torch.nn.functional.one_hot(given.labels, 5).float()
        teacher.forward = lambda x, scores=scores, **_: scores
        term = run_step(made, 0, given)["sckd"]
        seen.add(bool(term > 0))
        assert (term > 0) == (sign > 0)
    assert seen == {True, False}


def test_sckd_looks_at_the_gradients_of_the_last_block():
    made = objective("sckd")
    method = made.methods[1]
    given = batch()
    images, labels = given.images, given.labels
    target = Outputs(made.frozen[0](images))
    value = method(Outputs(made.student(images)), target, given)["sckd"]
    ce = torch.nn.functional.cross_entropy(made.student(images), labels)
    p = (target.logits / 4).softmax(1)
    kl = (p * (p.log() - (made.student(images) / 4).log_softmax(1))).sum(1).mean()
    last = list(made.student.blocks[-1].parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(each, last, retain_graph=True)]) for each in (ce, kl))
    assert (value > 0) == (torch.cosine_similarity(a, b, dim=0) > 0)


def test_dkd_weighs_pairs_and_rises():
    assert objective("dkd", "resnet8x4", "resnet32x4").term_weights["dkd_others"] == 8 * 16
    assert objective("dkd", "resnet20", "resnet56").term_weights["dkd_others"] == 2 * 16
    made = objective("dkd", dkd_beta=3.0)
    assert made.term_weights == {"ce": 1.0, "dkd_target": 16.0, "dkd_others": 48.0}
    made.eval()
    terms = []
    for epoch in (0, 9, 19, 100):
        made.begin_epoch(epoch)
        terms.append(made(batch(), 0)["dkd_others"].item())
    assert [term / terms[-1] for term in terms] == pytest.approx([1 / 20, 10 / 20, 1, 1])


def test_dkd_with_the_teachers_weights_is_kd():
    """alpha = 1 and beta = 1 - p_y, sample by sample: KL = KL(b) + (1 - p_y) KL(others) (DKD, eq. 6)."""
    from kernels import decoupled_kd_loss, kd_loss

    student, teacher, labels = random(6, 5, seed=1), random(6, 5, seed=2), torch.arange(6) % 5
    _, target, others = decoupled_kd_loss(student, teacher, labels, temperature=4.0, reduction="none")
    p = (teacher / 4).softmax(1).gather(1, labels[:, None])[:, 0]
    _, kl = kd_loss(student, teacher, labels, temperature=4.0, reduction="none")
    assert torch.allclose(target[0] + (1 - p) * others[0], kl[0], rtol=1e-10)


def test_review_starts_at_the_deepest_level_and_rises():
    made = objective("reviewkd", "vgg8", "resnet18", size=32)
    method = made.methods[1]
    assert [fusion.gates is None for fusion in method.fusions] == [True, False, False, False, False]
    assert objective("reviewkd", "resnet8x4", "resnet32x4").methods[1].weight == 5.0
    made.eval()
    terms = []
    for epoch in (0, 19, 50):
        made.begin_epoch(epoch)
        terms.append(made(batch(size=32), 0)["reviewkd"].item())
    assert [term / terms[-1] for term in terms] == pytest.approx([1 / 20, 1, 1])


# --- joined, own, and ensembles -------------------------------------------------------------------------------------


def test_joined_methods_add_up():
    """at needs maps, oh what is before their ReLU, sskd rotations: one pass gives all."""
    joined, alone = objective("at+oh+sskd+kd"), {name: objective(name) for name in ("at", "oh")}
    joined.eval()
    joined.begin_epoch(0)
    found = joined(batch(), 0)
    assert {"ce", "at", "oh", "sskd_rotated", "sskd_ss"} <= set(found)
    for name, single in alone.items():
        single.student.load_state_dict(joined.student.state_dict())
        single.frozen[0].load_state_dict(joined.frozen[0].state_dict())
        single.methods[1].load_state_dict(joined.methods[1 + ["at", "oh"].index(name)].state_dict())
        single.eval()
        assert single(batch(), 0)[name].item() == pytest.approx(found[name].item(), rel=1e-4)


OWN = """
from losses.method import Method


class Mine(Method):
    paper, usual, terms = "mine", "1", {"mine": 1.0}

    def forward(self, student, teacher, batch):
        return {"mine": (student.logits - teacher.logits).square().mean()}


class Other:
    pass
"""


def test_a_method_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    made = objective(f"{tmp_path}/own.py:Mine")
    terms = run_step(made, 0, batch())
    assert terms["mine"] > 0
    for wrong, message in {
        f"{tmp_path}/no.py:Mine": "there is no file",
        f"{tmp_path}/own.py:Other": "defines no class Other that extends",
        f"{tmp_path}/own.py:None": "defines no class None",
        "kd+kd": "joins different methods",
        "kd+none": "stand alone",
        "kdd": "did you mean kd",
    }.items():
        with pytest.raises(UserError, match=message):
            find_methods(wrong)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match="cannot be imported"):
        find_methods(f"{tmp_path}/broken.py:Mine")


def plain_kd(**options) -> KD:
    return KD(MethodContext(None, None, None, None, 5, None, type("ChangedOptions", (Options,), options)))


def test_several_teachers_are_averaged_in_their_logits():
    torch.manual_seed(0)
    student, *teachers = (create_model("resnet8", 5) for _ in range(3))
    made = Distillation(student, teachers, [plain_kd(temperature=2.0)], [1.0]).eval()
    images = batch().images
    p = ((teachers[0](images) + teachers[1](images)) / 2 / 2.0).softmax(1)
    expected = (p * (p.log() - (student(images) / 2.0).log_softmax(1))).sum(1).mean()
    assert made(batch(), 0)["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(UserError, match="several teachers"):
        build_methods(find_methods("at"), student, teachers, 16, 5, torch.arange(20) % 5, Options)


def test_anchors_take_turns_in_one_teacher():
    torch.manual_seed(0)
    student, teacher, *others = (create_model("resnet8", 5) for _ in range(5))
    states = [{key: value.clone() for key, value in other.state_dict().items()} for other in others]
    options = type("ChangedOptions", (Options,), {"epochs": 7})
    made = Distillation(student, [teacher], [plain_kd()], [1.0], anchors=states, options=options)
    met = []
    for epoch in range(7):
        made.begin_epoch(epoch)
        met.append(next(i for i, state in enumerate(states) if torch.equal(state["fc.weight"], teacher.fc.weight)))
    assert met == [0, 0, 0, 1, 1, 2, 2] and not teacher.training


def test_every_row_of_the_table_is_complete():
    for name, row in METHODS.items():
        assert issubclass(row, Method) and row.paper and row.__doc__ and (row.usual or name == "none")
