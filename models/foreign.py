"""Networks that were not written for this project in its contract: of timm, of torchvision, of the user's own."""

import difflib
from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from common import UserError
from models.network import Network


class Foreign(Network):
    """The module `net`, from images [N, 3, H, W] to logits [N, C], in our contract; parameter names come after "net.".

    Feature maps are the outputs of the submodules named by `stages`, in the order in which they run, as [N, C, H, W]
    (`as_map`). The images stand before them, where the zoo's networks have their stem's map. Branches of SFTN and GTN
    are grafted behind every one of `stages`. The embedding is what the classifier takes: the last linear layer, or 1x1
    convolution, whose output are the logits.

    Args:
        name: as `create_model` takes it.
        net: the module.
        image_size: side of the images that it is tried on.
        argument: what error messages call it.
        stages: names of submodules.

    Raises:
        UserError: a name that no submodule has (with the nearest ones), a submodule that gives no maps, a module that
            fails on these images, or whose logits come out of no linear layer.
    """

    sparse_gradients = True  # parameters may take no part in its forward pass

    def __init__(self, name: str, net: nn.Module, image_size: int, argument: str = "model", stages: Sequence[str] = ()):
        super().__init__()
        self.name, self.net, self.image_size, self.argument = name, net, image_size, argument
        for part in net.modules():  # what is computed stays the same, and maps stay as they were
            if getattr(part, "inplace", False) is True:
                part.inplace = False
        self.named_stages = self.stage_names = check_stages(net, stages, f"{argument} {name}")
        self._relus: tuple[str, ...] | None = None  # see _ends
        self._classifier = self._find_classifier()
        if self.stage_names:
            self.stage_shapes()

    @property
    def fc(self) -> nn.Linear:
        return self.net.get_submodule(self._classifier)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        raise UserError(f"{self.name}: cannot be cut into blocks, as the zoo's own networks can")

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        raise UserError(
            f"{self.name}: the layers between its maps are not known, as those of the zoo's own networks are"
        )

    preact = stages

    @property
    def last_block(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor, features=False):
        if not features:
            return self._checked(self.net(x))
        if features is True:
            return self._trace(x)
        before: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda _relu, inputs: before.update({name: inputs[0]})

        ends = self._ends()
        hooks = [self.net.get_submodule(name).register_forward_pre_hook(keep(name)) for name in {*ends} - {""}]
        try:
            logits, maps, embedding = self._trace(x)
        finally:
            for hook in hooks:
                hook.remove()
        preact = [as_map(before[end], self.name) if end else each for end, each in zip(ends, maps, strict=True)]
        return (logits, preact, embedding) if features == "preact" else (logits, maps, preact, embedding)

    def run_blocks(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        logits, maps, _ = self._trace(images)
        if not (chosen := self._branching(maps)):
            raise UserError(f"{self.argument} {self.name}: has no known stages; name submodules with --teacher_stages")
        return chosen, logits

    def stage_shapes(self) -> dict[str, tuple[int, ...]]:
        """C x H x W of the maps that branches can be grafted on, by name, found by a dry run."""
        _, maps, _ = self._try(self._trace)
        names = self._branching(self._map_names())
        return {name: tuple(each.shape[1:]) for name, each in zip(names, self._branching(maps), strict=True)}

    def _map_names(self) -> list[str]:
        return ["images", *self.stage_names]

    def _branching(self, maps: list) -> list:
        """Those of the maps, or of their names, that branches are grafted on."""
        return maps[1:]

    def _trace(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """(logits, maps with the images in front, embedding) in one pass."""
        where = f"{self.argument} {self.name}"
        seen: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        embeddings: list[Tensor] = []

        def keep(name: str):
            def hook(_module, _inputs, output) -> None:
                seen[name] = as_map(output, f"{where}: stage '{name}'")
                versions[name] = seen[name]._version

            return hook

        hooks = [self.net.get_submodule(name).register_forward_hook(keep(name)) for name in self.stage_names]
        hooks.append(self.fc.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0].flatten(1))))
        try:
            logits = self._checked(self.net(x))
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.stage_names:
            if name not in seen:
                raise UserError(f"{where}: stage '{name}' takes no part in its forward pass")
            if seen[name]._version != versions[name]:
                raise UserError(f"{where}: what follows stage '{name}' changes its output in place")
        if (ran := tuple(seen)) != self.stage_names:
            raise UserError(f"{where}: its stages run in another order: {' '.join(ran)}")
        return logits, [x, *seen.values()], embeddings[-1]

    def _checked(self, logits: object) -> Tensor:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            what = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.argument} {self.name}: gives {what} instead of logits [N, C]")
        return logits

    def _ends(self) -> tuple[str, ...]:
        """For each map the name of the ReLU that it comes out of, "" where it comes out of none; found by a dry run.

        Raises:
            UserError: a map that nothing is below 0 in, though it is no nn.ReLU's: what came before is not known.
        """
        if self._relus is None:
            outputs: dict[str, object] = {}
            names = self._map_names()
            relus = [name for name, module in self.net.named_modules() if isinstance(module, nn.ReLU)]
            hooks = [
                self.net.get_submodule(name).register_forward_hook(
                    lambda _module, _inputs, output, name=name: outputs.update({name: output})
                )
                for name in {*relus, *names} - {"images"}
            ]
            try:
                _, maps, _ = self._try(self._trace)
            finally:
                for hook in hooks:
                    hook.remove()
            found = []
            for name, each in zip(names, maps, strict=True):
                end = next((relu for relu in relus if name in outputs and outputs[relu] is outputs[name]), "")
                if not end and bool(each.min() >= 0):
                    raise UserError(f"{self.name}: what is before the last ReLU of its stage '{name}' is not known")
                found.append(end)
            self._relus = tuple(found)
        return self._relus

    def _find_classifier(self) -> str:
        """The name of the linear layer that the logits come out of."""
        outputs: list[tuple[str, Tensor]] = []

        def keep(name: str):
            return lambda _module, _inputs, output: outputs.append((name, output))

        hooks = [
            module.register_forward_hook(keep(name))
            for name, module in self.net.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
        try:
            logits = self._try(lambda images: self._checked(self.net(images)))
        finally:
            for hook in hooks:
                hook.remove()
        name, last = outputs[-1] if outputs else ("", logits[:, :0])
        if last.flatten(1).shape != logits.shape or not (logits.is_meta or torch.equal(last.flatten(1), logits)):
            raise UserError(f"{self.argument} {self.name}: its logits come out of no linear layer of its own")
        return name

    @torch.no_grad()
    def _try(self, function):
        """`function` of two random images, in eval mode. Whatever it raises is the module's, and a UserError."""
        weight = next(self.net.parameters(), torch.empty(0))
        shape = (2, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        training = self.training
        self.eval()
        try:
            return function(images.to(weight))
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            side = self.image_size
            raise UserError(f"{self.argument} {self.name}: fails on images of {side}x{side}: {reason}") from None
        finally:
            self.train(training)


def describe_stages(network: Network) -> str | None:
    """A line on where a network of another library is cut, with the shapes of its maps; None for the zoo's."""
    network = getattr(network, "network", network)  # a teacher's, behind its preprocessing
    if not isinstance(network, Foreign) or not (shapes := network.stage_shapes()):
        return None
    told = (f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return f"stages of {network.name}: {', '.join(told)}"


def check_classes(network: Network, num_classes: int, argument: str) -> None:
    """Raise UserError for a network of the user's own that is to be trained and has a classifier of another width."""
    if isinstance(network, Foreign) and (there := len(network.fc.weight)) != num_classes:
        where = f"{argument} {network.name}"
        raise UserError(f"{where}: gives {there} logits for {num_classes} classes; have its function take num_classes")


def as_map(output: object, where: str) -> Tensor:
    """A submodule's output for square images as [N, C, H, W].

    Maps stay, channels that stand last come forward, and tokens [N, L, C] are put on their grid: the largest square
    number of them, the others, class tokens and the like, stand in front and are dropped.

    Raises:
        UserError: anything else; `where` names the submodule.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 4:
        last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.permute(0, 3, 1, 2).contiguous() if last else output
    if isinstance(output, Tensor) and output.ndim == 3:
        side = isqrt(output.shape[1])
        grid = output[:, output.shape[1] - side * side :]
        return grid.transpose(1, 2).reshape(len(output), output.shape[2], side, side)
    what = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise UserError(f"{where} gives {what}: neither maps [N, C, H, W] nor tokens [N, L, C]")


def check_stages(net: nn.Module, stages: Sequence[str], where: str) -> tuple[str, ...]:
    """`stages` if they are names of submodules. Raises UserError for others, with the nearest names."""
    known = [name for name, _ in net.named_modules() if name]
    if len(set(stages)) < len(stages):
        raise UserError(f"{where}: its stages {' '.join(stages)} name one twice")
    for name in stages:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:12])}, ..."
            raise UserError(f"{where}: there is no submodule '{name}' for a stage; {hint}")
    return tuple(stages)
