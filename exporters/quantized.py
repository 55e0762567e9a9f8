"""Networks that compute as an int8 file of theirs will: weights and activations rounded in the forward pass.

The places are those of exporters/onnx.py's quantisation after training: whatever goes into and comes out of
convolutions, linear layers, sums, activations, pools and concatenations, but neither what a ReLU takes from the layer
before it, which int8 runtimes compute as one, nor the logits. Weights are symmetric int8 with a scale for each output
channel, activations uint8 with one range each. BatchNorms are folded into the convolutions before them.
"""

import operator
import warnings

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models import ModelInfo
from models.network import Network

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
WEIGHTED = CONVOLUTIONS | {aten.linear.default}
SUMS = {aten.add.Tensor, aten.add_.Tensor}
ACTIVATIONS = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default}
OTHERS = {aten.cat.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
ROUNDED = WEIGHTED | SUMS | ACTIVATIONS | OTHERS | {aten.mean.dim}
MOMENTUM = 0.01  # of a range that follows the batches of training
SMALLEST = 1e-6  # a range: scales are divided by


class Activation(nn.Module):
    """A tensor rounded to 256 steps from `low` to `high`, a range with 0 in it; gradients go straight through inside.

    While `calibrating` tensors stay as they are and the range grows to hold them; in training it follows the batches'.
    """

    def __init__(self):
        super().__init__()
        self.calibrating = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating or self.training:
            low, high = x.detach().aminmax()
            if self.calibrating:
                self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
                return x
            self.low = self.low.lerp(low, MOMENTUM).clamp(max=0)
            self.high = self.high.lerp(high, MOMENTUM).clamp(min=0)
        # Numbers, not tensors: in an exported graph they are constants.
        scale = max(float(self.high - self.low), SMALLEST) / 255
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-float(self.low) / scale), 0, 255)


class Weight(nn.Module):
    """A weight [out, ...] in up to 127 steps of its output channel's scale, both ways; gradients pass."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=SMALLEST) / 127
        if torch.jit.is_tracing():
            scale = torch.tensor(scale.tolist())  # a constant
        return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale).int(), 0, -128, 127)


class Quantized(nn.Module):
    """`network` in evaluation mode as its int8 file computes it: images [N, 3, H, W] to logits [N, C].

    Its parameters are copies, with BatchNorms folded in.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.info: ModelInfo = network.info
        side = network.info.image_size
        batch = torch.export.Dim("batch", min=1, max=2**16)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            example = torch.zeros(2, 3, side, side)
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
            source = program.module(check_guards=False)
        _fold_batch_norms(source)
        _insert(source)
        self.graph = fx.GraphModule(source, source.graph)
        for name, parameter in self.graph.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(self.graph.get_submodule(owner), last, nn.Parameter(parameter.detach().clone()))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.graph(images)

    @torch.no_grad()
    def calibrate(self, batches) -> None:
        """Take the activations' ranges from batches of images [n, 3, H, W]."""
        ranges = [module for module in self.modules() if isinstance(module, Activation)]
        for each in ranges:
            each.calibrating = True
        for images in batches:
            self(images)
        for each in ranges:
            each.calibrating = False


def _value(module: nn.Module, node: fx.Node | None) -> Tensor | None:
    return None if node is None else operator.attrgetter(node.target)(module)


def _fold_batch_norms(module: fx.GraphModule) -> None:
    """Make convolutions whose output a BatchNorm alone takes compute what both do."""
    graph = module.graph
    for number, norm in enumerate([node for node in graph.nodes if node.target is aten.batch_norm.default]):
        conv, gamma, beta, mean, variance, *_, eps, _ = norm.args
        if conv.target not in CONVOLUTIONS or len(conv.users) > 1:
            continue
        images, weight, *rest = conv.args
        bias = rest[0] if rest else None
        values = [_value(module, each) for each in (weight, bias, mean, variance)]
        folded = fuse_conv_bn_weights(*values, eps, *(_value(module, each) for each in (gamma, beta)))
        nodes = []
        for kind, value in zip(("weight", "bias"), folded, strict=True):
            module.register_parameter(f"folded{number}_{kind}", nn.Parameter(value.detach().clone()))
            with graph.inserting_before(conv):
                nodes.append(graph.get_attr(f"folded{number}_{kind}"))
        conv.args = (images, *nodes, *rest[1:])
        norm.replace_all_uses_with(conv)
        graph.erase_node(norm)
    graph.eliminate_dead_code()


def _insert(module: fx.GraphModule) -> None:
    """Round weights, and activations where they are wanted, once each."""
    graph, wanted = module.graph, {}
    for node in graph.nodes:
        if node.target not in ROUNDED:
            continue
        tensors = [each for each in node.all_input_nodes if each.op != "get_attr"]
        wanted |= {each: None for each in (*tensors, node) if not (_joins_its_relu(each) or _is_result(each))}
    for number, node in enumerate(wanted):
        module.add_module(f"activation{number}", Activation())
        with graph.inserting_after(node):
            rounded = graph.call_module(f"activation{number}", (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, new=rounded: user is not new)
    module.add_module("weight", Weight())
    for node in [node for node in graph.nodes if node.target in WEIGHTED]:
        with graph.inserting_before(node):
            rounded = graph.call_module("weight", (node.args[1],))
        node.update_arg(1, rounded)


def _joins_its_relu(node: fx.Node) -> bool:
    """Whether an int8 runtime computes a layer and the activation behind it as one."""
    users = list(node.users)
    return node.target in WEIGHTED | SUMS and len(users) == 1 and users[0].target in ACTIVATIONS


def _is_result(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
