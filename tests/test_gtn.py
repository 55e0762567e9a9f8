"""GTN's two phases: what each may touch, what reaches the teacher, what is reported."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from common import UserError, derive_seed
from models import create_model
from models.network import run_blocks
from models.pool import Pool
from teachers.gtn import GTN, GTNOptions

POOL = {"stem": 4, "widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 1], "head": 8}
POOL["candidates"] = ["res3x2", "res5x2", "identity", "zero"]


@dataclass
class Options(GTNOptions):
    seed: int = 0


def make(**options) -> GTN:
    torch.manual_seed(0)
    return GTN(create_model("resnet8", 5), Options(pool=Pool(**POOL), **options), 16)


def batch(size: int = 8):
    source = torch.Generator().manual_seed(4)
    images = torch.randn(size, 3, 16, 16, generator=source)
    return images, torch.randint(0, 5, (size,), generator=source)


def step(objective: GTN, optimizers: dict, iteration: int) -> dict:
    phase = objective.phase(iteration)
    terms = objective(*batch(), iteration)
    loss = sum(objective.term_weights[name] * term for name, term in terms.items())
    loss.backward(inputs=objective.leaves(phase))
    objective.before_update(phase, lambda gradient: gradient)
    optimizers[phase].step()
    optimizers[phase].zero_grad()
    objective.after_update(phase)
    return terms


def optimizers_of(objective: GTN) -> dict:
    sgd = torch.optim.SGD(objective.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return {"weights": sgd, **objective.extra_optimizers()}


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
    phases = {every: [make(gate_every=every).phase(i) == "gates" for i in range(8)] for every in (0, 2, 4)}
    assert phases == {0: [False] * 8, 2: [False, True] * 4, 4: [False, False, False, True] * 2}


def test_terms_are_those_of_the_paper_recomputed_from_the_logits():
    objective = make(temperature=2.0)
    images, labels = batch()
    terms = copy.deepcopy(objective)(images, labels, 0)
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
    objective(*batch(), 0)[term].backward()
    assert objective.teacher.conv1.weight.grad.abs().sum() > 0  # through the features
    through_logits = objective.teacher.fc.weight.grad
    assert (through_logits is not None and through_logits.abs().sum() > 0) == (term == "branch_kl")


def test_gate_gradient_equals_autograd_through_explicit_gates():
    """All candidates run and multiplied by their gates, against the selection that training uses."""
    objective = make(full_gates=True)
    images, labels = batch()
    terms = objective(images, labels, 1)
    loss = sum(objective.term_weights[name] * term for name, term in terms.items())
    found = torch.autograd.grad(loss, objective.gates.leaf())[0]
    source = torch.Generator().manual_seed(derive_seed(0, "paths", 1))
    draws = objective.gates.draw_gate_step(source)
    gates = objective.gates.leaf().detach().clone().requires_grad_()
    with torch.no_grad():
        features, teacher = run_blocks(objective.teacher, images)
    row, logits = 0, []
    for branch, feature in zip(objective.branches, features, strict=True):
        x = branch.transform(feature)
        for layer in branch.supernet.layers:
            y = x if layer.shortcut else 0
            for j in draws[row].candidates:
                output = layer.candidates[layer.names[j]](x)
                y = y if output is None else y + gates[row, j] * output
            x, row = y, row + 1
        logits.append(branch.supernet.fc(branch.supernet.head(x)))
    ce, kl = objective._compare(torch.stack(logits), teacher, labels)
    expected = torch.autograd.grad(ce - 3.0 * kl, gates)[0]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_same_iteration_same_terms_other_iteration_other_path():
    objective = make()
    terms = [copy.deepcopy(objective)(*batch(), iteration)["branch_ce"].item() for iteration in (2, 2, 4)]
    assert terms[0] == terms[1] != terms[2]


def test_predict_changes_nothing():
    objective = make()
    objective.eval()
    before = snapshot(objective)
    answers = objective.predict(batch()[0], seed=0)
    assert list(answers) == ["teacher", "branch1", "branch2", "branch3"]
    assert {logits.shape for logits in answers.values()} == {(8, 5)}
    assert not changed(before, objective)
    assert not any(module.training for module in objective.modules())


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
    assert objective.warnings(history(objective, [0.1, 0.5, 0.4, 0.3, 0.2])) == []
    (rising,) = objective.warnings(history(objective, [0.1, 0.2, 0.3, 0.4, 0.5]))
    assert "not falling" in rising
    with torch.no_grad():
        objective.gates.phi[0, 1] += 20
    objective.gates._on_host = None
    (collapsed,) = objective.warnings(history(objective, [0.5, 0.1]))
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
        Options(**options).check_gtn()
