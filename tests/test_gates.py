"""Gates: their gradient against the exact expectation, two-path updates, draws."""

import itertools
import math

import pytest
import torch

from kernels import gate_gradient, gated_mix
from kernels import gates as gates_module
from kernels.gates import _mix, _mix_backward
from objectives.gates import Gates


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gated_mix_sends_nothing_to_inactive_outputs_and_takes_none_for_zero():
    a, b = (torch.randn(3, requires_grad=True) for _ in range(2))
    shortcut = torch.randn(3, requires_grad=True)
    gates = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    y = gated_mix([a, b, None], gates, 2, shortcut)
    assert torch.equal(y, shortcut)
    y.sum().backward()
    assert a.grad is None and b.grad is None
    assert torch.allclose(gates.grad, torch.stack([a.sum(), b.sum(), torch.tensor(0.0)]).detach())
    assert torch.equal(shortcut.grad, torch.ones(3))


def test_gated_mix_accumulates_half_precision_dots_in_float32():
    output = torch.full((1 << 20,), 0.5, dtype=torch.float16, requires_grad=True)
    gates = torch.ones(1, requires_grad=True)
    gated_mix([output], gates, 0).backward(torch.full_like(output, 0.5))
    assert gates.grad.item() == (1 << 20) * 0.25  # float16 overflows at 65504


@pytest.mark.parametrize(("count", "active"), [(2, 2), (2, -1), (3, 0)])
def test_gated_mix_refuses_gates_that_do_not_fit(count, active):
    with pytest.raises(ValueError, match="gates"):
        gated_mix([torch.zeros(1)] * 2, torch.zeros(count), active)


def test_gated_mix_refuses_a_dead_path():
    with pytest.raises(ValueError, match="cut"):
        gated_mix([None, torch.zeros(1)], torch.tensor([1.0, 0.0]), 0)


def test_gate_gradient_is_the_jacobian_of_softmax():
    phi = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    dg = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad((phi.softmax(-1) * dg).sum(), phi)[0]
    assert torch.allclose(gate_gradient(phi.softmax(-1).detach(), dg), expected, atol=1e-14)


def linear_supernet(layers: int, candidates: int):
    """Matrices [layers][candidates] of a supernet whose loss is linear in every gate."""
    torch.manual_seed(1)
    return [[torch.randn(4, 4, dtype=torch.float64) / 2 for _ in range(candidates)] for _ in range(layers)]


def path_loss(net, path, gates=None):
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    for layer, matrices in enumerate(net):
        outputs = [matrix @ x for matrix in matrices]
        if gates is None:
            x = x + outputs[path[layer]]
        else:
            x = gated_mix(outputs, gates[layer], path[layer], x)
    return x @ torch.tensor([0.3, -1.0, 0.7, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(("layers", "candidates"), [(1, 3), (2, 3), (3, 2)])
def test_gate_gradient_is_exact_on_average_over_all_paths(layers, candidates):
    """sum over paths of p(path) x binary-gate gradient = d/dphi of the expected loss (ProxylessNAS, eq. 4)."""
    net = linear_supernet(layers, candidates)
    phi = torch.randn(layers, candidates, dtype=torch.float64, requires_grad=True)
    p = phi.softmax(-1)
    paths = list(itertools.product(range(candidates), repeat=layers))
    chance = {path: math.prod(p[layer, j] for layer, j in enumerate(path)) for path in paths}
    exact = torch.autograd.grad(sum(chance[path] * path_loss(net, path) for path in paths), phi)[0]
    average = torch.zeros_like(phi)
    for path in paths:
        gates = torch.nn.functional.one_hot(torch.tensor(path), candidates).double().requires_grad_()
        dg = torch.autograd.grad(path_loss(net, path, gates), gates)[0]
        average += chance[path].detach() * gate_gradient(p.detach(), dg)
    assert torch.allclose(average, exact, rtol=1e-10, atol=1e-12)


def make_gates(counts, full=False, spread=1.0) -> Gates:
    torch.manual_seed(3)
    gates = Gates(counts, full)
    with torch.no_grad():
        gates.phi.add_(torch.randn(gates.phi.shape) * spread)
    return gates


def test_initial_gates_are_nearly_uniform_over_what_is_offered():
    gates = Gates([2, 5, 1])
    p = gates.probabilities()
    for row, count in zip(p, [2, 5, 1], strict=True):
        assert torch.allclose(row[:count], torch.full((count,), 1 / count, dtype=torch.float64), atol=2e-3)
        assert row[count:].eq(0).all()
    assert gates.normalised_entropy()[1] == pytest.approx(1, abs=1e-4)


def gate_step(gates: Gates, seed: int, optimizer) -> list:
    draws = gates.draw_gate_step(generator(seed))
    gates.leaf().grad = torch.randn(gates.leaf().shape, generator=generator(seed + 1))
    gates.set_gradient(lambda gradient: gradient)
    optimizer.step()
    gates.finish_update()
    optimizer.zero_grad()
    return draws


def test_two_path_update_keeps_every_other_candidates_probability():
    gates = make_gates([5, 3, 2, 1])
    optimizer = torch.optim.Adam([gates.phi], lr=0.1, betas=(0.0, 0.999))
    for seed in range(20):
        before = gates.probabilities().clone()
        draws = gate_step(gates, seed, optimizer)
        after = gates.probabilities()
        assert torch.allclose(after.sum(1), torch.ones(4, dtype=torch.float64))
        for layer, draw in enumerate(draws):
            others = [j for j in range(5) if j not in draw.candidates]
            assert torch.allclose(after[layer, others], before[layer, others], atol=1e-6)
            if len(draw.candidates) == 2:
                pair = list(draw.candidates)
                assert (after[layer, pair] - before[layer, pair]).abs().max() > 1e-4


def test_two_path_gradient_is_that_of_the_expectation_restricted_to_the_pair():
    gates = make_gates([4])
    (draw,) = gates.draw_gate_step(generator(5))
    losses = torch.tensor([0.7, -1.3])
    gates.leaf().grad = losses[None]
    gates.set_gradient(lambda gradient: gradient)
    phi = gates.phi.detach().clone().requires_grad_()
    pair = torch.stack([phi[0, j] for j in draw.candidates])
    expected = torch.autograd.grad((pair.softmax(0) * losses).sum(), phi)[0]
    assert torch.allclose(gates.phi.grad, expected, atol=1e-6)


def test_full_form_runs_every_candidate_and_uses_all_probabilities():
    gates = make_gates([3, 2], full=True)
    draws = gates.draw_gate_step(generator())
    assert [draw.candidates for draw in draws] == [(0, 1, 2), (0, 1)]
    dg = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 9.0]])
    gates.leaf().grad = dg
    gates.set_gradient(lambda gradient: gradient)
    assert torch.allclose(gates.phi.grad, gate_gradient(gates.probabilities(), dg.double()), atol=1e-6)
    assert gates.phi.grad[1, 2] == 0


def within(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether counts are what p gives, within five standard deviations each."""
    draws = counts.sum()
    return bool(((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt() + 1e-9).all())


def test_path_frequencies_match_p():
    gates, seeds = make_gates([4, 2]), 6000
    source, counts = generator(), torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(seeds):
        for layer, draw in enumerate(gates.draw(source)):
            counts[layer, draw.active] += 1
    for layer in range(2):
        assert within(counts[layer], gates.probabilities()[layer])


def test_pairs_are_drawn_without_replacement_and_the_active_one_by_renormalised_p():
    gates = make_gates([3])
    p = gates.probabilities()[0].tolist()
    pairs = {
        pair: p[pair[0]] * p[pair[1]] * (1 / (1 - p[pair[0]]) + 1 / (1 - p[pair[1]]))
        for pair in itertools.combinations(range(3), 2)
    }
    source, seen, active = generator(), dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
    for _ in range(6000):
        (draw,) = gates.draw_gate_step(source)
        pair = tuple(sorted(draw.candidates))
        seen[pair] += 1
        active[pair] += draw.active == pair[0]
        assert draw.active in draw.candidates
        assert draw.gates.tolist() == [float(j == draw.active) for j in draw.candidates]
    assert within(torch.tensor([float(seen[pair]) for pair in pairs]), torch.tensor(list(pairs.values())))
    for (a, b), times in seen.items():
        share = torch.tensor([p[a] / (p[a] + p[b])])
        assert abs(active[a, b] - times * share) <= 5 * (times * share * (1 - share)).sqrt()


def test_same_seed_same_draws_other_seed_other_draws():
    gates = make_gates([5] * 12)
    assert gates.draw(generator(1)) == gates.draw(generator(1))
    assert gates.draw(generator(1)) != gates.draw(generator(2))


@pytest.mark.parametrize("active", [0, 1, 2, 3])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_gated_mix_equals_the_explicit_sum_at_every_position_with_a_zero_among_the_outputs(active, with_shortcut):
    torch.manual_seed(active)
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outputs = [leaves[0], leaves[1], None, leaves[2]]
    shortcut = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if with_shortcut else None
    gates = torch.eye(4, dtype=torch.float64)[active].requires_grad_()
    if outputs[active] is None and shortcut is None:
        with pytest.raises(ValueError, match="cut"):
            gated_mix(outputs, gates, active)
        return
    weight = torch.randn(2, 3, dtype=torch.float64)
    inputs = [gates, *leaves, *([shortcut] if with_shortcut else [])]
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    explicit = sum(g * (zeros if o is None else o) for g, o in zip(gates, outputs, strict=True))
    explicit = explicit + shortcut if with_shortcut else explicit
    expected = torch.autograd.grad((explicit * weight).sum(), inputs)
    mixed = gated_mix(outputs, gates, active, shortcut)
    found = torch.autograd.grad((mixed * weight).sum(), inputs, allow_unused=True)
    assert torch.equal(mixed, explicit)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(torch.zeros_like(b) if a is None else a, b, rtol=1e-12, atol=1e-14)


def test_gate_gradient_rows_sum_to_zero_and_ignore_candidates_that_a_layer_lacks():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]], dtype=torch.float64)
    dg = torch.tensor([[1.0, -4.0, 2.0], [3.0, 1.0, 1e6]], dtype=torch.float64)
    found = gate_gradient(p, dg)
    assert found.sum(-1).abs().max() < 1e-14
    assert found[1].tolist() == pytest.approx([0.24 * 2, -0.24 * 2, 0.0])  # p0 p1 (dL/dg0 - dL/dg1)


def test_a_gate_step_is_exact_on_average_over_the_active_ones_of_its_pairs():
    """phi.grad over all choices within the drawn pairs, weighted, is d/dphi of the loss expected over them."""
    net = linear_supernet(3, 4)
    gates = make_gates([4, 4, 4]).double()
    gates.draw_gate_step(generator(2))
    step = gates._step
    pairs = step.columns.tolist()
    phi = gates.phi.detach().clone().requires_grad_()
    chosen = torch.stack([phi[layer, pair].softmax(0) for layer, pair in enumerate(pairs)])
    within_pairs = [[row[j] for j in pair] for row, pair in zip(net, pairs, strict=True)]
    expected_loss, average = torch.zeros((), dtype=torch.float64), torch.zeros_like(phi)
    for path in itertools.product(range(2), repeat=3):
        chance = math.prod(chosen[layer, j] for layer, j in enumerate(path))
        expected_loss = expected_loss + chance * path_loss(within_pairs, path)
        step.gates = torch.nn.functional.one_hot(torch.tensor(path), 2).double().requires_grad_()
        path_loss(within_pairs, path, step.gates).backward()
        gates.set_gradient(lambda gradient: gradient)
        average += chance.detach() * gates.phi.grad
    (exact,) = torch.autograd.grad(expected_loss, phi)
    assert torch.allclose(average, exact, rtol=1e-9, atol=1e-11)
    for layer, pair in enumerate(pairs):
        others = [j for j in range(4) if j not in pair]
        assert exact[layer, pair].abs().min() > 1e-6 and average[layer, others].eq(0).all()


def test_set_gradient_hands_the_gradient_to_the_average_over_processes():
    gates = make_gates([3, 2])
    gates.draw_gate_step(generator())
    gates.leaf().grad = torch.ones(gates.leaf().shape).cumsum(1)
    gates.set_gradient(lambda gradient: gradient)
    alone = gates.phi.grad.clone()
    gates.set_gradient(lambda gradient: 3 * gradient)
    assert alone.abs().max() > 0 and torch.allclose(gates.phi.grad, 3 * alone, rtol=1e-12)


def test_two_candidates_shift_between_themselves_and_one_never_moves():
    gates = make_gates([2, 1])
    optimizer = torch.optim.Adam([gates.phi], lr=0.1, betas=(0.0, 0.999))
    before = gates.probabilities().clone()
    log_sum = gates.phi[0].detach().double().logsumexp(0)
    draws = gate_step(gates, 0, optimizer)
    assert sorted(draws[0].candidates) == [0, 1] and draws[1].candidates == (0,)
    after = gates.probabilities()
    assert (after[0] - before[0]).abs().min() > 1e-3 and after[0].sum().item() == pytest.approx(1, abs=1e-12)
    assert after[1].tolist() == [1.0, 0.0]
    assert gates.phi[0].detach().double().logsumexp(0).item() == pytest.approx(log_sum.item(), abs=1e-6)


def test_layers_with_one_candidate_only_can_take_a_gate_step():
    gates = make_gates([1, 1])
    draws = gate_step(gates, 0, torch.optim.Adam([gates.phi], lr=0.1, betas=(0.0, 0.999)))
    assert [draw.candidates for draw in draws] == [(0,), (0,)]
    assert gates.probabilities().tolist() == [[1.0], [1.0]] and gates.normalised_entropy() == [1.0, 1.0]


def test_a_full_update_is_adams_and_nothing_else():
    gates = make_gates([3, 2], full=True)
    reference = gates.phi.detach().clone().requires_grad_()
    adam = torch.optim.Adam([gates.phi], lr=0.1, betas=(0.0, 0.999))
    theirs = torch.optim.Adam([reference], lr=0.1, betas=(0.0, 0.999))
    for seed in range(3):
        gates.draw_gate_step(generator(seed))
        gates.leaf().grad = dg = torch.randn(2, 3, generator=generator(seed + 9))
        gates.set_gradient(lambda gradient: gradient)
        masked = reference.masked_fill(~gates.offered, -math.inf).softmax(-1)
        (reference.grad,) = torch.autograd.grad((masked * dg).sum(), reference)
        for optimizer in (adam, theirs):
            optimizer.step()
        gates.finish_update()
    assert torch.allclose(gates.phi[gates.offered], reference[gates.offered], atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_candidates_that_a_layer_lacks_are_never_drawn(full):
    counts = [5, 3, 2, 1]
    gates, source = make_gates(counts, full), generator()
    for _ in range(1000):
        for draw, step, count in zip(gates.draw(source), gates.draw_gate_step(source), counts, strict=True):
            assert draw.active < count and max(step.candidates) < count
            assert len(set(step.candidates)) == len(step.candidates) == (count if full else min(2, count))


def test_draws_follow_phi_after_an_update():
    gates = make_gates([3])
    before = gates.probabilities().clone()
    gate_step(gates, 0, torch.optim.SGD([gates.phi], lr=10.0))
    source, counts = generator(1), torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        counts[gates.draw(source)[0].active] += 1
    expected = gates.phi[0].detach().double().softmax(0)
    assert within(counts, expected) and not within(counts, before[0])


def test_same_seed_same_gate_step_other_seed_other_gate_step():
    gates = make_gates([5] * 12)

    def pairs(seed):
        return [(draw.active, draw.candidates) for draw in gates.draw_gate_step(generator(seed))]

    torch.manual_seed(1)
    first = pairs(1)
    torch.manual_seed(2)  # the global generator has no say
    assert pairs(1) == first != pairs(2)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("zero", [None, 1])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("active", [None, 0, 2])
def test_soft_gates_and_the_epilogue_equal_the_explicit_sum(active, with_shortcut, zero, relu):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    outputs = [None if j == zero else tensors[j] for j in range(3)]
    shortcut = tensors[3] if with_shortcut else None
    gates = torch.randn(3, dtype=torch.float64) if active is None else torch.eye(3, dtype=torch.float64)[active]
    gates.requires_grad_()
    explicit = sum(g * o for g, o in zip(gates, outputs, strict=True) if o is not None)
    explicit = explicit + shortcut if with_shortcut else explicit
    explicit = explicit.relu() if relu else explicit
    y = gated_mix(outputs, gates, active, shortcut, relu)
    assert torch.allclose(y, explicit, rtol=1e-14)
    leaves = [gates, *(x for j, x in enumerate(outputs) if x is not None and active in (None, j))]
    leaves += [shortcut] if with_shortcut else []
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(explicit, leaves, upstream)
    for a, b in zip(torch.autograd.grad(y, leaves, upstream), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_gates_meet_the_free_gradient_of_an_affine_batchnorm():
    """An output of BatchNorm is linear in gamma and beta, so <dL/dy, o> = gamma dL/dgamma + beta dL/dbeta."""
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm2d(6).double() for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    convs = [torch.nn.Conv2d(3, 6, 3).double() for _ in range(2)]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gates = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    y = gated_mix([norm(conv(x)) for norm, conv in zip(norms, convs, strict=True)], gates)
    y.square().sum().backward()
    for gate, slope, norm in zip(gates.tolist(), gates.grad.tolist(), norms, strict=True):
        free = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).sum().item()
        assert gate * slope == pytest.approx(free, rel=1e-10)


def test_layouts_are_kept_and_mixed_ones_follow_the_first():
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = torch.randn(2, 3, 4, 5, requires_grad=True)
    gates = torch.tensor([1.0, 0.0], requires_grad=True)
    for outputs, layout in (([last, plain], torch.channels_last), ([plain, last], torch.contiguous_format)):
        y = gated_mix(outputs, gates, 0, outputs[1], relu=True)
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(y, (last + plain).relu())
        (dg,) = torch.autograd.grad(y.sum(), gates)
        assert torch.allclose(dg, torch.stack([((y > 0) * each).sum() for each in outputs]), rtol=1e-5)


def test_a_shortcut_in_another_type_keeps_it():
    half = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    shortcut = torch.randn(2, 3, requires_grad=True)
    y = gated_mix([half], torch.ones(1), 0, shortcut)
    assert y.dtype == torch.float32 and torch.equal(y, half + shortcut)
    y.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and shortcut.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"outputs": [torch.zeros(2), torch.zeros(3)]}, "one shape"),
        ({"shortcut": torch.zeros(3)}, "one shape"),
        ({"shortcut": torch.zeros(2, dtype=torch.int64)}, "floating"),
        ({"shortcut": torch.zeros(2, device="meta")}, "is on meta"),
        ({"gates": torch.zeros(2, dtype=torch.int64)}, "gates must be floating"),
        ({"active": True}, "active must be a whole number; got True"),
        ({"active": torch.tensor(0)}, "active must be a whole number; got a Tensor"),
    ],
)
def test_gated_mix_names_what_does_not_fit(wrong, named):
    fine = {"outputs": [torch.zeros(2), torch.zeros(2)], "gates": torch.zeros(2), "active": 0, "shortcut": None}
    with pytest.raises(ValueError, match=named):
        gated_mix(**(fine | wrong))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanting", [(0,), (2,), (1, 2), (0, 1, 3), (3,)])  # output, output, shortcut, gates
def test_what_needs_no_gradient_is_neither_kept_nor_written(monkeypatch, soft, relu, wanting):
    leaves = [torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1.0, 0.0])]
    for place in wanting:
        leaves[place].requires_grad_()
    *outputs, shortcut, gates = leaves
    y = gated_mix(outputs, gates, None if soft else 0, shortcut, relu)
    if not y.requires_grad:
        assert not soft and wanting == (1,)
        return
    kept = y.grad_fn.saved_tensors[2:]
    assert [x is not None for x in kept] == [gates.requires_grad] * 2
    written, run = [], gates_module._run_mix_backward
    monkeypatch.setattr(gates_module, "_run_mix_backward", lambda *given: written.append(run(*given)) or written[0])
    y.sum().backward()
    for_sum = relu and (shortcut.requires_grad or (not soft and outputs[0].requires_grad))
    shares = [x for x in outputs if x.requires_grad] if soft else []
    if written:
        dz, dots, d_outputs = written[0]
        assert (dz.numel() > 0, dots.numel() > 0, len(d_outputs)) == (for_sum, gates.requires_grad, len(shares))
    else:
        assert not (for_sum or gates.requires_grad or shares)
    explicit = gates[0] * outputs[0] + (gates[1] * outputs[1] if soft else gates[1] * outputs[1].detach()) + shortcut
    wanted = [leaves[place] for place in wanting if soft or place != 1]
    expected = torch.autograd.grad((explicit.relu() if relu else explicit).sum(), wanted)
    assert all(torch.allclose(leaf.grad, each, rtol=1e-5) for leaf, each in zip(wanted, expected, strict=True))


def test_what_is_passed_through_can_be_changed_in_place():
    """As nn.ReLU(inplace=True) does; gates that need the output for their gradient must notice."""
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    gated_mix([x * 3, None], torch.tensor([1.0, 0.0]), 0).relu_().sum().backward()
    assert x.grad.tolist() == [0, 3]
    gates = torch.tensor([1.0, 0.0], requires_grad=True)
    y = gated_mix([x * 3, None], gates, 0).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("active", [None, 0])
def test_a_second_derivative_of_the_mix_is_refused(active):
    outputs = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    gates = torch.tensor([1.0, 0.0], requires_grad=True)
    y = gated_mix(outputs, gates, active)
    (slope,) = torch.autograd.grad(y.sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        (y.sum() + slope.square().sum()).backward()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_mix_operators_keep_the_rules_of_custom_operators(soft, relu):
    a, b, s = torch.randn(3, 2, 3, 4, 4)
    gates = torch.tensor([0.3, 0.7, 0.1]) if soft else None
    torch.library.opcheck(_mix, ([a, None, b] if soft else [a], gates, s, relu))
    torch.library.opcheck(_mix_backward, (s, [a, None, b], gates, b if relu else None, True, relu, [soft] * 3))


def test_phi_is_state_but_stays_on_the_host():
    gates = make_gates([3, 2])
    assert list(gates.parameters()) == [] and list(gates.state_dict()) == ["phi"]
    gates.to("meta").half()  # as a module on its way to a GPU
    assert gates.phi.device.type == "cpu" and gates.phi.dtype == torch.float64
    other = make_gates([3, 2])
    torch.nn.init.normal_(other.phi)
    phi = gates.phi
    gates.load_state_dict(other.state_dict())
    assert gates.phi is phi and torch.equal(phi, other.phi)  # in place: an optimiser holds it
    with pytest.raises(RuntimeError, match="phi"):
        gates.load_state_dict({})
    with pytest.raises(RuntimeError, match="does not fit"):
        gates.load_state_dict(make_gates([3, 3, 3]).state_dict())


def test_a_gate_step_puts_its_gates_where_the_images_are():
    gates = make_gates([3, 2])
    gates.draw_gate_step(generator(), torch.zeros(1, device="meta", dtype=torch.bfloat16))
    assert gates.leaf().device.type == "meta" and gates.leaf().dtype == torch.float32
