"""GTN's two phases: what each may touch, what reaches the teacher, what is reported."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from common import UserError, derive_seed
from data.batch import Batch
from engine.objective import weighted_sum
from models import create_model
from models.network import run_blocks
from models.pool import Pool
from objectives.gtn import GTN, GTNOptions

POOL = {"stem": 4, "widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 1], "head": 8}
POOL["candidates"] = ["res3x2", "res5x2", "identity", "zero"]


@dataclass
class Options(GTNOptions):
    seed: int = 0


def make(**options) -> GTN:
    torch.manual_seed(0)
    return GTN(create_model("resnet8", 5), Options(pool=Pool(**POOL), **options), 16)


@pytest.mark.parametrize("share", [False, True])
def test_some_branches(share):
    """Branches 2 and 3 alone: their gates, names and terms, and gradients for all of the teacher up to its end."""
    objective = make(branches=[3, 2], share_branches=share)
    layers = [len(branch.supernet.layers) for branch in objective.branches]
    assert layers == [3, 1] and len(objective.gates.counts) == 4
    assert list(objective.record()["gates"]) == ["branch2", "branch3"]
    assert list(objective.record()["gates"]["branch2"]) == ["L4", "L5", "L6"]
    assert list(objective.predict(batch().images, 0)) == ["teacher", "branch2", "branch3"]
    terms = objective(batch(), 0)
    terms["branch_ce"].backward()
    *before, last = objective.teacher.blocks
    assert all(p.grad is not None for block in before for p in block.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in last.parameters())


def batch(size: int = 8) -> Batch:
    source = torch.Generator().manual_seed(4)
    images = torch.randn(size, 3, 16, 16, generator=source)
    return Batch(images, torch.randint(0, 5, (size,), generator=source))


def step(objective: GTN, optimizers: dict, iteration: int) -> dict:
    phase = objective.phase(iteration)
    terms = objective(batch(), iteration)
    weighted_sum(objective, terms).backward(inputs=phase.grad_inputs() if phase else None)
    if phase:
        phase.before_update(lambda gradient: gradient)
    optimizer = optimizers[phase.name if phase else "weights"]
    optimizer.step()
    optimizer.zero_grad()
    phase.after_update() if phase else objective.after_step()
    return terms


def optimizers_of(objective: GTN) -> dict:
    sgd = torch.optim.SGD(objective.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return {"weights": sgd, **{phase.name: phase.optimizer for phase in objective.phases}}


def snapshot(objective: GTN) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in objective.state_dict().items()}


def changed(before: dict, objective: GTN) -> set[str]:
    return {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}


def drawn_prefixes(objective: GTN, iteration: int) -> tuple[str, ...]:
    """State-dict prefixes of the candidates that an even iteration draws."""
    source = torch.Generator().manual_seed(derive_seed(objective.options.seed, "paths", iteration))
    draws = iter(objective.gates.draw(source))
    return tuple(
        f"branches.{b}.supernet.layers.{i}.candidates.{layer.names[next(draws).active]}."
        for b, branch in enumerate(objective.branches)
        for i, layer in enumerate(branch.supernet.layers)
    )


def test_even_steps_update_teacher_and_drawn_candidates_only():
    objective = make()
    optimizers = optimizers_of(objective)
    for iteration in (0, 2, 4, 6):  # later ones have momentum that must not move what is not drawn
        before = snapshot(objective)
        drawn = drawn_prefixes(objective, iteration)
        step(objective, optimizers, iteration)
        moved = changed(before, objective)
        assert "gates.phi" not in moved
        assert {name for name in before if name.startswith("teacher.") and name.endswith("weight")} <= moved
        trained = {name for name in moved if ".candidates." in name}
        assert trained == {name for name in before if name.startswith(drawn)}
        assert any(".candidates." in name for name in set(before) - moved)


def test_odd_steps_leave_every_weight_and_batchnorm_statistic_untouched():
    objective = make()
    optimizers = optimizers_of(objective)
    step(objective, optimizers, 0)
    for iteration in (1, 3, 5):
        before = snapshot(objective)
        step(objective, optimizers, iteration)
        assert changed(before, objective) == {"gates.phi"}
        assert all(parameter.grad is None for parameter in objective.weight_parameters())


def test_phases_alternate_as_gate_every_says():
    phases = {every: [make(gate_every=every).phase(i) is not None for i in range(8)] for every in (0, 2, 4)}
    assert phases == {0: [False] * 8, 2: [False, True] * 4, 4: [False, False, False, True] * 2}


def test_terms_are_those_of_the_paper_recomputed_from_the_logits():
    objective = make(temperature=2.0)
    images, labels = batch()[:2]
    terms = copy.deepcopy(objective)(batch(), 0)
    source = torch.Generator().manual_seed(derive_seed(0, "paths", 0))
    features, teacher = run_blocks(objective.teacher, images)
    branches = objective._run_branches(features, objective.gates.draw(source)).double()
    teacher = teacher.double()
    ce = sum(F.cross_entropy(z, labels) for z in branches) / 3
    q, p = (branches / 2).softmax(-1), (teacher / 2).softmax(-1)
    kl = (q * (q / p).log()).sum(-1).mean()  # over images and branches
    expected = {"teacher_ce": F.cross_entropy(teacher, labels), "branch_ce": ce, "branch_kl": kl}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert objective.term_weights["branch_kl"] == 3.0 and objective.term_weights["gate_kl"] == -3.0
    assert make(alpha=2.0, alpha_phi=-0.5).term_weights["gate_kl"] == -0.5


@pytest.mark.parametrize("term", ["branch_ce", "branch_kl"])
def test_every_branch_loss_reaches_the_teacher(term):
    objective = make()
    objective(batch(), 0)[term].backward()
    assert objective.teacher.conv1.weight.grad.abs().sum() > 0  # through the features
    through_logits = objective.teacher.fc.weight.grad
    assert (through_logits is not None and through_logits.abs().sum() > 0) == (term == "branch_kl")


def test_same_iteration_same_terms_other_iteration_other_path():
    objective = make()
    terms = [copy.deepcopy(objective)(batch(), iteration)["branch_ce"].item() for iteration in (2, 2, 4)]
    assert terms[0] == terms[1] != terms[2]


def test_shared_branches_are_tied_and_train():
    objective = make(share_branches=True)
    first, second, third = (branch.supernet for branch in objective.branches)
    assert first.layers[-1] is second.layers[-1] is third.layers[-1] and first.fc is third.fc
    step(objective, optimizers_of(objective), 0)
    own = make()
    assert len(objective.weight_parameters()) < len(own.weight_parameters())
    assert len(objective.gates.counts) == len(own.gates.counts) == 5 + 3 + 1


def test_record_names_every_candidate():
    record = make().record()
    assert list(record["gates"]) == ["branch1", "branch2", "branch3"]
    assert list(record["gates"]["branch1"]) == ["L2", "L3", "L4", "L5", "L6"]
    assert list(record["gates"]["branch3"]["L6"]) == ["res3x2", "res5x2", "identity", "zero"]
    for layers in record["gates"].values():
        for chances in layers.values():
            assert sum(chances.values()) == pytest.approx(1, abs=1e-4)


def history(objective: GTN, kl: list[float]) -> list[dict]:
    return [{"losses": {"branch_kl": value}, **objective.record()} for value in kl]


def test_warnings_name_what_went_wrong_and_nothing_else():
    objective = make()
    assert objective.warnings(history(objective, [0.1, 0.5, 0.4, 0.3, 0.2])) == {}
    bare = [row | {"losses": {"teacher_ce": 1.0}} for row in history(objective, [0.1, 0.2, 0.3, 0.4, 0.5])]
    assert objective.warnings(bare) == {}  # of a checkpoint that somebody has made by hand
    (rising,) = objective.warnings(history(objective, [0.1, 0.2, 0.3, 0.4, 0.5])).values()
    assert "not falling" in rising
    with torch.no_grad():
        objective.gates.phi[0, 1] += 20
    objective.gates._on_host = None
    (collapsed,) = objective.warnings(history(objective, [0.5, 0.1])).values()
    assert "branch1 L2" in collapsed and "'res5x2'" in collapsed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "--temperature"),
        ({"gate_every": 1}, "--gate_every"),
        ({"gate_holdout": 1.0}, "--gate_holdout"),
        ({"gate_lr": 0.0}, "--gate_lr"),
        ({"pool": Pool(strides=[1])}, "pool.widths"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(UserError, match=named):
        Options(**options).check()


def test_what_is_not_drawn_gets_no_gradient_no_decay_and_no_momentum():
    objective = make()
    optimizers = optimizers_of(objective)
    for iteration in (0, 2, 4):
        step(objective, optimizers, iteration)
    parameters, state = dict(objective.named_parameters()), optimizers["weights"].state
    drawn, momenta = drawn_prefixes(objective, 6), {}
    resting = [name for name in parameters if ".candidates." in name and not name.startswith(drawn)]
    for name in resting:
        if "momentum_buffer" in state[parameters[name]]:
            momenta[name] = state[parameters[name]]["momentum_buffer"].clone()
    assert len(momenta) > 10  # some that rest now were drawn before
    before = {name: parameters[name].detach().clone() for name in resting}
    weighted_sum(objective, objective(batch(), 6)).backward()
    assert all(parameters[name].grad is None for name in resting)
    assert all(parameters[name].grad is not None for name in parameters if name.startswith(drawn))
    optimizers["weights"].step()
    assert all(torch.equal(parameters[name], before[name]) for name in resting)
    assert all(torch.equal(state[parameters[name]]["momentum_buffer"], old) for name, old in momenta.items())


def test_batchnorm_statistics_move_in_even_steps_and_rest_in_odd_ones():
    objective = make()
    buffers = {name for name, _ in objective.teacher.named_buffers()}
    assert {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"} <= buffers
    optimizers, before = optimizers_of(objective), snapshot(objective)
    step(objective, optimizers, 1)
    assert changed(before, objective) == {"gates.phi"}
    step(objective, optimizers, 2)
    assert {f"teacher.{name}" for name in buffers} <= changed(before, objective)
    assert all(norm.track_running_stats for norm in objective.modules() if isinstance(norm, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("full", [False, True])
def test_odd_steps_move_only_drawn_candidates_and_keep_the_mass_of_the_others(full):
    objective = make(full_gates=full, gate_lr=0.1)
    optimizers, before = optimizers_of(objective), objective.gates.probabilities().clone()
    step(objective, optimizers, 1)
    source = torch.Generator().manual_seed(derive_seed(0, "paths", 1))
    fresh = make(full_gates=full)
    draws, after = fresh.gates.draw_gate_step(source), objective.gates.probabilities()
    for layer, draw in enumerate(draws):
        others = [j for j in range(before.shape[1]) if j not in draw.candidates]
        assert torch.allclose(after[layer, others], before[layer, others], atol=1e-6)
        assert (after[layer] - before[layer]).abs().max() > 1e-3


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_gates_terms_are_recomputed_from_the_logits(direction):
    objective = make(kl_direction=direction, temperature=3.0)
    images, labels = batch()[:2]
    terms = objective(batch(), 1)
    source = torch.Generator().manual_seed(derive_seed(0, "paths", 1))
    features, teacher = run_blocks(objective.teacher, images)
    paths = objective.gates.draw_gate_step(source)
    ce, kl = [], []
    for branch, feature in zip(objective.branches, features, strict=True):
        drawn, paths = paths[: len(branch.supernet.layers)], paths[len(branch.supernet.layers) :]
        z = branch(feature, drawn).double()
        log_q, log_p = (z / 3).log_softmax(1), (teacher.double() / 3).log_softmax(1)
        a, b = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
        kl.append((a.exp() * (a - b)).sum().item() / len(images))
        ce.append(-z.log_softmax(1)[range(len(images)), labels].mean().item())
    assert terms.keys() == {"gate_ce", "gate_kl"} and not paths
    assert terms["gate_ce"].item() == pytest.approx(sum(ce) / 3, rel=1e-5)
    assert terms["gate_kl"].item() == pytest.approx(sum(kl) / 3, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 7.0])
def test_the_gates_kl_weight_is_minus_alpha_by_default(alpha):
    weights = make(alpha=alpha).term_weights
    assert weights["branch_kl"] == alpha and weights["gate_kl"] == -alpha
    assert weights["teacher_ce"] == weights["branch_ce"] == weights["gate_ce"] == 1


def test_each_branch_reaches_the_teacher_up_to_where_it_is_grafted():
    objective = make()
    images, labels = batch()[:2]
    for index in range(3):
        features, _ = run_blocks(objective.teacher, images)
        source = torch.Generator().manual_seed(0)
        logits = objective._run_branches(features, objective.gates.draw(source))
        objective.zero_grad()
        F.cross_entropy(logits[index], labels).backward()
        reached = [
            any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
            for block in objective.teacher.blocks
        ]
        assert reached == [place <= index for place in range(4)]


def test_the_kl_reaches_the_teacher_through_its_features_and_through_its_logits():
    objective = make()
    images, labels = batch()[:2]
    source = torch.Generator().manual_seed(0)
    features, logits = run_blocks(objective.teacher, images)
    draws, weight = objective.gates.draw(source), objective.teacher.conv1.weight
    branches = objective._run_branches(features, draws)
    parts = []
    for b, t in ((branches, logits.detach()), (branches.detach(), logits), (branches, logits)):
        _, kl = objective._compare(b, t, Batch(images, labels))
        parts.append(torch.autograd.grad(kl, weight, retain_graph=True)[0])
    through_features, through_logits, both = parts
    assert through_features.abs().sum() > 0 and through_logits.abs().sum() > 0
    assert torch.allclose(through_features + through_logits, both, atol=1e-6)
    objective.zero_grad()
    objective(batch(), 0)["branch_kl"].backward()
    assert objective.teacher.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("full", [False, True])
def test_the_gradient_of_phi_in_float64_equals_autograd_through_explicit_gates(full):
    """phi.grad of a whole gate step, against gates that are multiplied and a softmax over what was drawn."""
    objective = make(full_gates=full).double()
    images, labels = batch()[:2]
    images, (gates,) = images.double(), objective.phases
    weighted_sum(objective, objective(Batch(images, labels), 1)).backward(inputs=gates.grad_inputs())
    gates.before_update(lambda gradient: gradient)
    found = objective.gates.phi.grad.clone()

    draws = objective.gates.draw_gate_step(torch.Generator().manual_seed(derive_seed(0, "paths", 1)), images)
    one_hot = [draw.gates[: len(draw.candidates)].detach().clone().requires_grad_() for draw in draws]
    with torch.no_grad():
        features, teacher = run_blocks(objective.teacher, images)
    row, branch_logits = 0, []
    for branch, feature in zip(objective.branches, features, strict=True):
        x = branch.transform(feature)
        for layer in branch.supernet.layers:
            outputs = [layer.candidates[layer.names[j]](x) for j in draws[row].candidates]
            mixed = sum(g * o for g, o in zip(one_hot[row], outputs, strict=True) if o is not None)
            x, row = x + mixed if layer.shortcut else mixed, row + 1
        branch_logits.append(branch.supernet.fc(branch.supernet.head(x)))
    log_p, loss = teacher.log_softmax(1), 0.0
    for z in branch_logits:
        log_q = z.log_softmax(1)
        loss = loss + F.nll_loss(log_q, labels) / 3 - 3.0 * (log_q.exp() * (log_q - log_p)).sum() / len(images) / 3
    by_gate = torch.autograd.grad(loss, one_hot)

    phi = objective.gates.phi.detach().clone().requires_grad_()
    surrogate = sum(
        (phi[i, list(draw.candidates)].softmax(0) * dg).sum()
        for i, (draw, dg) in enumerate(zip(draws, by_gate, strict=True))
    )
    (expected,) = torch.autograd.grad(surrogate, phi)
    assert expected.abs().max() > 1e-6
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_paths_follow_the_runs_seed_and_the_iteration_and_nothing_else():
    def losses(seed: int, iteration: int, noise: int):
        objective = make(seed=seed)  # the same weights whatever the seed
        torch.manual_seed(noise)
        return [term.item() for term in objective(batch(), iteration).values()]

    assert losses(0, 2, 1) == losses(0, 2, 99)
    assert losses(0, 3, 1) == losses(0, 3, 99)
    assert losses(0, 2, 1)[1:] != losses(1, 2, 1)[1:] and losses(0, 2, 1)[0] == losses(1, 2, 1)[0]


@pytest.mark.parametrize("size", [1, 8])
def test_predict_restores_the_mode_and_repeats_itself(size):
    objective = make(gate_every=0)
    optimizers = optimizers_of(objective)
    for iteration in range(2):
        step(objective, optimizers, iteration)
    objective.eval()
    before, images = snapshot(objective), batch(size).images
    first, again, other = (objective.predict(images, seed) for seed in (0, 0, 1))
    assert {name: logits.shape for name, logits in first.items()} == dict.fromkeys(
        ["teacher", "branch1", "branch2", "branch3"], (size, 5)
    )
    assert not changed(before, objective) and not any(module.training for module in objective.modules())
    assert all(norm.track_running_stats for norm in objective.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    assert torch.equal(first["teacher"], objective.teacher(images))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    objective.train()
    branches = {name for name in before if name.startswith(("branches.", "gates."))}
    objective.predict(images if size > 1 else batch().images, 0)
    assert not changed(before, objective) & branches
    assert all(module.training for module in objective.modules())


def test_the_trained_model_is_the_plain_teacher():
    objective = make()
    assert objective.trained_model() is objective.teacher
    assert not any("branches" in name or "gates" in name for name in objective.trained_model().state_dict())
    assert objective.gates.phi not in set(objective.weight_parameters())
    adam = objective.phases[0].optimizer
    (group,) = adam.param_groups
    assert [id(p) for p in group["params"]] == [id(objective.gates.phi)]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.0, 0.999), 0.0)


def test_record_is_json_and_follows_phi():
    objective = make()
    with torch.no_grad():
        objective.gates.phi[0] = torch.tensor([0.0, 0.0, 0.0, 20.0])
    objective.gates._on_host = None
    record = objective.record()
    assert json.loads(json.dumps(record)) == record
    assert record["gates"]["branch1"]["L2"] == pytest.approx({"res3x2": 0, "res5x2": 0, "identity": 0, "zero": 1})
    assert record["gate_entropy"]["branch1"]["L2"] == pytest.approx(0, abs=1e-4)
    assert record["gate_entropy"]["branch1"]["L3"] == pytest.approx(1, abs=1e-4)
    assert "zero" not in record["gates"]["branch1"]["L5"]  # it halves the map
    assert list(record["gate_entropy"]["branch2"]) == ["L4", "L5", "L6"]


@pytest.mark.parametrize(
    ("kl", "warned"),
    [
        ([0.5, 0.5, 0.5, 0.5], False),  # too early to tell
        ([0.5, 0.5, 0.5, 0.5, 0.5], True),
        ([0.1, 0.5, 0.5, 0.5, 0.46], True),
        ([0.1, 0.5, 0.5, 0.5, 0.44], False),
        ([0.5, 0.4, 0.3, 0.2, 0.1], False),
    ],
)
def test_the_kl_warning_is_given_where_it_stays_near_its_peak(kl, warned):
    objective = make()
    assert bool(objective.warnings(history(objective, kl))) == warned


def test_every_collapsed_gate_is_named_and_no_other():
    objective = make()
    with torch.no_grad():
        objective.gates.phi[1, 2] += 20  # branch 1, L3
        objective.gates.phi[8, 0] += 20  # branch 3, L6
        objective.gates.phi[3, 0] += 2  # branch 1, L5: leaning, not collapsed
    objective.gates._on_host = None
    found = list(objective.warnings(history(objective, [0.5, 0.1])).values())
    assert len(found) == 2
    assert "branch1 L3" in found[0] and "'identity'" in found[0]
    assert "branch3 L6" in found[1] and "'res3x2'" in found[1]
