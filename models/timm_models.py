"""Networks of timm (PyTorch Image Models, Wightman 2019), as `timm:NAME`, where timm is installed."""

import difflib
from itertools import pairwise

import torch
from torch import Tensor, nn

from common import UserError
from models.network import Network

BLOCKS = 4


class TimmNetwork(Network):
    """timm's network `name` in our contract; its parameter names come after "net.".

    The feature maps [N, C, H, W] are those that timm offers (for vision transformers the tokens on their
    grid), the embedding is what its classifier takes. `blocks` exists where the network can be cut: where
    running its modules one after the other is its forward pass, with maps between them.

    Raises:
        UserError: timm is not installed, has no such network, cannot build it for this image size, or it
            has no single classifier.
    """

    def __init__(self, name: str, num_classes: int, image_size: int = 224, argument: str = "model"):
        super().__init__()
        self.name, self.image_size = f"timm:{name}", image_size
        self.net = build(name, image_size, argument, num_classes=num_classes)
        classifier = self.net.get_classifier()
        if not isinstance(classifier, (nn.Linear, nn.Conv2d)):
            raise UserError(f"{argument} timm:{name}: has no single linear classifier")
        self.published = self.name
        self._blocks: tuple[nn.Module, ...] = ()

    @property
    def fc(self) -> nn.Linear:
        return self.net.get_classifier()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The cut, verified on a random image the first time it is asked for.

        Raises:
            UserError: the network cannot be cut.
        """
        if not self._blocks:
            self._blocks = self._cut()
        return self._blocks

    def forward(self, x: Tensor, features=False):
        if features in ("preact", "both"):
            raise UserError(f"{self.name}: maps before the last ReLU are known for the zoo's own networks only")
        if not features:
            return self.net(x)
        final, maps = self._features(x)
        embeddings: list[Tensor] = []
        hook = self.fc.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0].flatten(1)))
        try:
            logits = self.net.forward_head(final)
            return logits, maps, embeddings[0]
        finally:
            hook.remove()

    def published_tensors(self) -> dict[str, Tensor]:
        """timm's trained weights, under our names. Raises whatever timm does when it cannot get them."""
        from timm import is_model_pretrained

        if not is_model_pretrained(self.name[5:]):
            raise UserError(f"timm has no trained weights of {self.name[5:]}")
        source = build(self.name[5:], self.image_size, "--pretrained", pretrained=True)
        return {f"net.{name}": tensor for name, tensor in source.state_dict().items()}

    def _feature_info(self) -> list[dict]:
        info = getattr(self.net, "feature_info", None) or []
        return info if isinstance(info, list) else info.get_dicts()

    def _features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(what forward_head takes, the feature maps)."""
        if hasattr(self.net, "forward_intermediates"):
            return self.net.forward_intermediates(x, output_fmt="NCHW")
        if not (names := [info["module"] for info in self._feature_info()]):
            raise UserError(f"{self.name}: timm knows no feature maps of it")
        maps: list[Tensor] = []
        parts = [self.net.get_submodule(name) for name in names]
        hooks = [part.register_forward_hook(lambda *call: maps.append(call[-1])) for part in parts]
        try:
            return self.net.forward_features(x), maps
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _cut(self) -> tuple[nn.Module, ...]:
        refused = UserError(f"{self.name}: cannot be cut into {BLOCKS} blocks, which SFTN and GTN need")
        info = self._feature_info()
        if len(info) < BLOCKS or not isinstance(self.fc, nn.Linear):
            raise refused
        ends, channels = [row["module"] for row in info], [row["num_chs"] for row in info[-BLOCKS:-1]]
        names, parts = zip(*unrolled(self.net, ends), strict=True)
        if not set(ends) <= set(names):
            raise refused
        edges = [0, *(names.index(end) + 1 for end in ends[-BLOCKS:-1]), len(parts)]
        blocks = tuple(nn.Sequential(*parts[a:b]) for a, b in pairwise(edges))

        training, weight = self.training, self.fc.weight
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(2, 3, self.image_size, self.image_size, generator=generator).to(weight)
        self.eval()
        try:
            logits, x = self.net(image), image
            for block, width in zip(blocks, [*channels, None], strict=True):
                x = block(x)
                if width and (x.ndim != 4 or x.shape[1] != width):
                    raise refused
            if x.shape != logits.shape or not torch.allclose(x, logits, rtol=1e-4, atol=1e-5):
                raise refused
        except UserError:
            raise
        except Exception:  # a wrong guess may fail in any way
            raise refused from None
        finally:
            self.train(training)
        return blocks


def build(name: str, image_size: int, argument: str, **options) -> nn.Module:
    """timm.create_model, with the image size where the network depends on it."""
    try:
        import timm
    except ImportError:
        raise UserError(f"{argument} timm:{name}: needs timm; pip install -r requirements-timm.txt") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'timm:{each}' for each in near)}?" if near else "see timm.list_models()"
        raise UserError(f"{argument}: unknown name 'timm:{name}'; {hint}")
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    if options.get("pretrained"):
        return timm.create_model(name, **options)
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # timm's networks refuse sizes and tags in ways of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{argument} timm:{name}: timm cannot build it for images of {image_size}: {reason}") from None


def unrolled(net: nn.Module, ends: list[str], prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(name, module) of the children in order, with those that hold one of `ends` replaced by their own."""
    parts = []
    for name, child in net.named_children():
        full = f"{prefix}{name}"
        if any(end.startswith(f"{full}.") for end in ends):
            parts += unrolled(child, ends, f"{full}.")
        else:
            parts.append((full, child))
    return parts
