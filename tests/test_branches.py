"""What the options of teachers with branches do to the loss and its gradient, against closed forms."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from common import UserError
from data.batch import Batch
from engine.objective import weighted_sum
from models import create_model
from models.network import cut, run_blocks
from models.pool import Pool, PoolNet
from objectives.grafted import scale_gradient
from objectives.gtn import GTN, GTNOptions

POOL = {"stem": 4, "widths": [4, 4, 4, 8, 8, 8], "strides": [1, 1, 1, 2, 2, 1], "head": 8}
POOL["candidates"] = ["res3x2", "res5x2", "identity", "zero"]


@dataclass
class Options(GTNOptions):
    seed: int = 0


def make(**options) -> GTN:
    torch.manual_seed(0)
    return GTN(create_model("resnet8", 5), Options(pool=Pool(**POOL), **options), 16)


def logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of 3 branches and a teacher, 6 images, 5 classes, in float64."""
    source = torch.Generator().manual_seed(seed)
    branches, teacher = (torch.randn(*shape, 5, generator=source, dtype=torch.float64) for shape in ((3, 6), (6,)))
    return branches, teacher, torch.randint(0, 5, (6,), generator=source)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_teachers_gradient_is_that_of_the_closed_form(share):
    """KL(p || q): its gradient on the teacher's logits is p (log p/q - KL), on a branch's q - p; CE's is p - y."""
    objective = make(alpha=3.0, teacher_kl_share=share, kl_direction="forward")
    branches, teacher, labels = logits()
    branches, teacher = branches.requires_grad_(), teacher.requires_grad_()
    weighted_sum(objective, objective.joint_terms(branches, teacher, Batch(teacher, labels))).backward()
    with torch.no_grad():
        p, q, y = teacher.softmax(-1), branches.softmax(-1), torch.eye(5, dtype=torch.float64)[labels]
        surprise = (p / q).log()
        pull = (p * (surprise - (p * surprise).sum(-1, keepdim=True))).mean(0)  # over branches
        assert torch.allclose(teacher.grad, (p - y + 3 * share * pull) / 6, atol=1e-6)
        # The branches' own gradients know nothing of the share.
        assert torch.allclose(branches.grad, (q - y + 3 * (q - p)) / 18, atol=1e-6)


def test_a_share_of_one_changes_no_bit_and_others_change_no_value():
    branches, teacher, labels = logits()
    assert scale_gradient(teacher, 1.0) is teacher
    assert torch.equal(scale_gradient(teacher, 0.3), teacher)
    values = [
        make(teacher_kl_share=share).joint_terms(branches, teacher, Batch(teacher, labels)) for share in (0.0, 1.0)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("share_branches", [False, True])
def test_one_path_is_run_to_its_end_by_every_branch(share_branches):
    objective = make(paths="one", share_branches=share_branches)
    assert objective.gates.counts == [4, 4, 3, 3, 4]  # layers 2 to 6, once
    images = torch.randn(4, 3, 16, 16)
    features, _ = run_blocks(objective.teacher, images)
    draws = objective.gates.draw(torch.Generator().manual_seed(1))
    found = objective._run_branches(features, draws)
    for branch, feature, logits, layers in zip(objective.branches, features, found, (5, 3, 1), strict=True):
        assert torch.equal(branch(feature, draws[-layers:]), logits)
    record = objective.record()["gates"]
    assert record["branch1"]["L6"] == record["branch2"]["L6"] == record["branch3"]["L6"]
    assert list(record["branch2"]) == ["L4", "L5", "L6"]


def test_one_paths_gates_get_the_gradient_of_all_branches():
    """The gradient of a gate step is the sum of those that each branch alone would give."""
    objective = make(paths="one", full_gates=True)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    draws = objective.gates.draw_gate_step(torch.Generator().manual_seed(2), images)
    objective._gate_draws = draws
    weighted_sum(objective, objective._gate_terms(Batch(images, labels), draws)).backward(
        inputs=[objective.gates.leaf()]
    )
    whole = objective.gates.leaf().grad.clone()
    with torch.no_grad():
        features, teacher = run_blocks(objective.teacher, images)
    parts = torch.zeros_like(whole)
    for place, layers in zip((0, 1, 2), (5, 3, 1), strict=True):
        leaf = objective.gates.leaf().detach().clone().requires_grad_()
        own = [draw._replace(gates=line) for draw, line in zip(draws, leaf.unbind(), strict=True)]
        z = objective.branches[place](features[place], own[-layers:])[None]
        ce, kl = objective._compare(z, teacher, Batch(images, labels))
        parts += torch.autograd.grad((ce - 3.0 * kl) / 3, leaf)[0]
    assert whole.abs().max() > 1e-5
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6)


def test_added_gate_steps_leave_every_batch_to_the_weights(tmp_path):
    """A gate step for every third iteration: as many weight steps as batches, and half as many gate steps or so."""
    from tests.test_loop import loop_of

    class Counting(GTN):
        def forward(self, batch: Batch, iteration: int):
            self.seen.append((self.phase(iteration), batch.images.sum().item()))
            return super().forward(batch, iteration)

    seen = {}
    for steps in ("replace", "add"):
        torch.manual_seed(0)
        options = Options(pool=Pool(**POOL), gate_every=3, gate_steps=steps)
        objective = Counting(create_model("resnet8", 10), options, 16)
        objective.seen = []
        loop = loop_of(objective, tmp_path / steps, epochs=1)
        loop.run()
        seen[steps] = (objective.seen, len(loop.train))
    for steps, (calls, batches) in seen.items():
        weights = sum(phase is None for phase, _ in calls)
        assert weights == (batches if steps == "add" else batches - batches // 3)
    calls, _ = seen["add"]
    for (phase, images), (_, following) in pairwise(calls):
        assert phase is None or images == following  # a gate step sees the batch of the step after it


@pytest.mark.parametrize("name", ["resnet20", "wrn16_2", "vgg8", "mobilenetv2", "shufflenetv1"])
def test_a_cut_by_depth_is_the_same_network_in_parts_of_like_depth(name):
    torch.manual_seed(0)
    model = create_model(name, 5).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    cut(model, "depth")
    assert len(model.blocks) == 4
    assert torch.equal(run_blocks(model, images)[1], expected)
    depths = [
        sum(isinstance(part, torch.nn.Conv2d) and part.kernel_size != (1, 1) for part in block.modules())
        for block in model.blocks
    ]
    assert max(depths) - min(depths) <= 4
    if name == "resnet20":  # 19 convolutions in a stem and nine blocks of two
        assert depths == [5, 4, 6, 4]


def test_the_plain_reading_of_identity_is_x_where_the_layer_has_a_shortcut():
    plain, doubled = Pool(**POOL, identity="plain"), Pool(**POOL)
    assert doubled.choices(1) == ["res3x2", "res5x2", "identity", "zero"]
    assert plain.choices(1) == ["res3x2", "res5x2", "zero"]  # zero there is x
    assert plain.choices(3) == doubled.choices(3) == ["res3x2", "res5x2", "identity"]  # a 1x1 convolution
    x = torch.randn(1, 3, 16, 16)
    spec = plain.spec(["zero", "zero", "zero", "identity", "identity", "identity"])
    net = PoolNet(spec, 5).eval()
    stem = net.stem(x)
    assert torch.equal(net.layers[0](stem), stem)


def test_advice_tells_the_branches_cost_and_warns_where_gtn_has_lost():
    (line, warning) = make().advice(16)
    assert "times the teacher's" in line and "--teacher_kl_share" in warning
    assert len(make(teacher_kl_share=0.1).advice(16)) == 1
    untrained, line = make(freeze_teacher_epochs=3).advice(16)
    assert "never trained" in untrained and "--weights" in untrained and "times the teacher's" in line
    objective = make(freeze_teacher_epochs=3)
    objective.options.weights = "runs/vanilla"
    assert len(objective.advice(16)) == 1


@pytest.mark.parametrize(("teacher_ce", "warned"), [(0.9, True), (0.75, True), (0.3, False)])
def test_a_capped_teacher_is_named(teacher_ce, warned):
    """With alpha 3 and branches at 1.1 nats the balance is at -log((1 + 3 exp(-1.1)) / 4) = 0.69 nats."""
    objective = make()
    balance = -math.log((1 + 3 * math.exp(-1.1)) / 4)
    assert balance == pytest.approx(0.69, abs=0.01)
    row = {"losses": {"branch_kl": 0.1, "branch_ce": 1.1, "teacher_ce": teacher_ce}, **objective.record()}
    assert ("capped" in objective.warnings([row])) == warned
    objective = copy.deepcopy(objective)
    objective.options.teacher_kl_share = 0.0
    assert "capped" not in objective.warnings([row])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_kl_share": 1.5}, "--teacher_kl_share 1.5"),
        ({"teacher_kl_share": -0.1}, "--teacher_kl_share -0.1"),
        ({"alpha": -1.0}, "--alpha -1"),
        ({"alpha_phi": 1.0}, "--alpha_phi 1"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(UserError, match=named):
        Options(**options).check()
