"""Networks of timm (PyTorch Image Models, Wightman 2019), where it is installed: `timm:NAME` and `hf-hub:ORG/NAME`."""

import difflib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from common import UserError
from models.foreign import Foreign

BLOCKS = 4
HUB = "hf-hub:"
# Arguments of timm.create_model that are not the network's: they would fetch or read files.
NOT_THE_NETWORKS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class TimmNetwork(Foreign):
    """timm's network in our contract; its parameter names come after "net.".

    The feature maps [N, C, H, W] are those that timm offers. Of a network that keeps one size throughout, as vision
    transformers do, they are the ones behind a quarter, a half, three quarters and all of its blocks: tokens on their
    grid, without prefix tokens. The images stand in front of four maps; networks with more begin with a stem's. The
    branches of SFTN and GTN come behind the first three of the last four. Named `stages` take the place of all that.
    The embedding is what the classifier takes. `blocks` exists where the network can be cut: where running its modules
    one after the other is its forward pass, with maps between them.

    Args:
        name: with timm: or hf-hub: in front.
        num_classes: width of the classifier.
        image_size, argument, stages: see Foreign.
        architecture: of a network of the hub, if it is known: timm's name of it and its arguments (`on_hub`).

    Raises:
        UserError: timm is not installed, has no such network, cannot build it for this image size, or it
            has no single classifier.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_size: int = 224,
        argument: str = "model",
        stages: Sequence[str] = (),
        architecture: dict | None = None,
    ):
        if name.startswith(HUB) and architecture is None:
            architecture = on_hub(name, argument)["architecture"]
        net = build(name, image_size, argument, architecture, num_classes=num_classes)
        super().__init__(name, net, image_size, argument, stages)
        self.architecture, self.published = architecture, name
        self._blocks: tuple[nn.Module, ...] = ()
        if not stages and not hasattr(net, "forward_intermediates"):
            self.stage_names = tuple(row["module"] for row in self._feature_info())

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

    def published_tensors(self) -> dict[str, Tensor]:
        """timm's trained weights, under our names. Raises whatever timm does when it cannot get them."""
        from timm import is_model_pretrained

        if not self.name.startswith(HUB) and not is_model_pretrained(self.name[5:]):
            raise UserError(f"timm has no trained weights of {self.name[5:]}")
        source = build(self.name, self.image_size, "--pretrained", self.architecture, pretrained=True)
        return {f"net.{name}": tensor for name, tensor in source.state_dict().items()}

    def _find_classifier(self) -> str:
        if not isinstance(self.fc, (nn.Linear, nn.Conv2d)):
            raise UserError(f"{self.argument} {self.name}: has no single linear classifier")
        return ""

    def _feature_info(self) -> list[dict]:
        info = getattr(self.net, "feature_info", None) or []
        return info if isinstance(info, list) else info.get_dicts()

    def _levels(self) -> list[int] | None:
        """Which of timm's maps are ours; None: all."""
        info = self._feature_info()
        if len(info) < BLOCKS or len({row["reduction"] for row in info}) > 1:
            return None
        return [(len(info) * quarter + 2) // BLOCKS - 1 for quarter in range(1, BLOCKS + 1)]

    def _branching(self, maps: list) -> list:
        return super()._branching(maps) if self.named_stages else maps[-BLOCKS:-1]

    def _map_names(self) -> list[str]:
        names = list(self.stage_names)
        if not names:
            names, levels = [row["module"] for row in self._feature_info()], self._levels()
            names = names if levels is None else [names[level] for level in levels]
        return names if self._has_stem(len(names)) else ["images", *names]

    def _has_stem(self, maps: int) -> bool:
        return maps > BLOCKS and not self.named_stages

    def _trace(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        if self.stage_names:
            logits, maps, embedding = super()._trace(x)
        else:
            final, maps = self.net.forward_intermediates(x, indices=self._levels(), output_fmt="NCHW")
            embeddings: list[Tensor] = []
            hook = self.fc.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0].flatten(1)))
            try:
                logits, embedding = self.net.forward_head(final), embeddings[0]
            finally:
                hook.remove()
            maps = [x, *maps]
        return logits, maps[1:] if self._has_stem(len(maps) - 1) else maps, embedding

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


def build(name: str, image_size: int, argument: str, architecture: dict | None = None, **options) -> nn.Module:
    """timm.create_model, with the image size where the network depends on it."""
    timm = import_timm(f"{argument} {name}")
    known = architecture["name"] if architecture else name.removeprefix("timm:")
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'timm:{each}' for each in near)}?" if near else "see timm.list_models()"
        raise UserError(f"{argument}: unknown name '{name}'; {hint}")
    published = timm.get_pretrained_cfg(known, allow_unregistered=True)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    if options.get("pretrained"):
        return timm.create_model(name.removeprefix("timm:"), **options)
    try:
        return timm.create_model(known, **((architecture or {}).get("arguments", {}) | options))
    except Exception as error:  # timm's networks refuse sizes and tags in ways of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{argument} {name}: timm cannot build it for images of {image_size}: {reason}") from None


def on_hub(name: str, argument: str) -> dict:
    """What the hub's config.json says of `hf-hub:ORG/NAME`: its `architecture`, and timm's `pretrained_cfg`.

    Raises:
        UserError: it cannot be had, or is no network of timm's.
    """
    import_timm(f"{argument} {name}")
    from timm.models import load_model_config_from_hf

    try:
        config, known, arguments = load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # no network, no such repository, a config of another library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{argument} {name}: no network of timm can be had from the hub under this name ({reason})"
        ) from None
    architecture = {"name": known, "arguments": dict(arguments or {})}
    check_architecture(architecture, f"{argument} {name}")
    return {"architecture": architecture, "pretrained_cfg": config}


def check_architecture(architecture: object, where: str) -> None:
    """Raise UserError unless it is timm's name of a network and arguments of the network's own, as JSON has them."""
    plain = isinstance(architecture, dict) and architecture.keys() == {"name", "arguments"}
    plain = plain and isinstance(architecture["name"], str) and isinstance(architecture["arguments"], dict)
    if not plain or ":" in architecture["name"] or NOT_THE_NETWORKS & architecture["arguments"].keys():
        raise UserError(f"{where}: cannot be of the architecture {str(architecture)[:200]}")


def import_timm(where: str):
    """The package. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError(f"{where}: needs timm; pip install -r requirements-timm.txt") from None
    return timm


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
