"""What a network expects of its images and says of its classes; a wrapper for teachers that differ from the batch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, read_text
from models.network import Network
from models.timm_models import HUB, TimmNetwork, import_timm, on_hub

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """How a network knows its images: `mean` and `std` normalise RGB in [0, 1], resized to `image_size`."""

    mean: list[float]
    std: list[float]
    image_size: int
    interpolation: str = "bilinear"


def published_preprocessing(name: str, argument: str = "--teacher") -> Preprocessing | None:
    """That of the published weights of a network of timm's or torchvision's, by its name; None for other networks."""
    if name.startswith(("timm:", HUB)):
        timm = import_timm(f"{argument} {name}")
        if name.startswith(HUB):
            known = on_hub(name, argument)["pretrained_cfg"]
        elif (known := timm.get_pretrained_cfg(name.removeprefix("timm:"), allow_unregistered=True)) is not None:
            known = known.to_dict()
        if not known:
            return None
        found = timm.data.resolve_data_config(pretrained_cfg=known)
        return _preprocessing(found["mean"], found["std"], found["input_size"][-1], found["interpolation"])
    if (weights := _torchvision_weights(name)) is None:
        return None
    known = weights.transforms()
    return _preprocessing(known.mean, known.std, known.crop_size[0], known.interpolation.value)


def published_classes(network: Network) -> list[list[str]]:
    """What the classes of a network's published weights are called, in the order of its outputs, in each known way."""
    if isinstance(network, TimmNetwork):
        from timm.data import ImageNetInfo, infer_imagenet_subset

        known = network.net.pretrained_cfg
        if known.get("label_names"):
            return [list(known["label_names"])]
        subset = infer_imagenet_subset(known)
        info = ImageNetInfo(subset) if subset else None
        return [info.label_names(), info.label_descriptions()] if info else []
    weights = _torchvision_weights(network.published) if network.published else None
    return [list(weights.meta["categories"])] if weights else []


def _preprocessing(mean: Sequence[float], std: Sequence[float], size: int, interpolation: str) -> Preprocessing:
    fitting = interpolation if interpolation in INTERPOLATIONS else "bicubic"
    return Preprocessing(list(map(float, mean)), list(map(float, std)), int(size), fitting)


def _torchvision_weights(name: str):
    """torchvision's best weights of a network; None where it has none of this name."""
    from torchvision.models import get_model_weights, list_models  # here, because torchvision is slow to import

    plain = name.removeprefix("torchvision:")
    return get_model_weights(plain).DEFAULT if plain in list_models() else None


class Preprocessed(nn.Module):
    """A network behind what its images need: x of a batch that was normalised otherwise becomes

        (x std_b + mean_b - mean_n) / std_n = x scale + shift,

    resized to the network's own side as Pillow does it, and its logits are put in the order of the batch's
    classes. What it is saved as is the network's.

    Args:
        network: the network.
        own: how it knows its images.
        mean, std: how the batch is normalised.
        order: of the network's outputs, the one for each class of the batch; None: they are the same.
    """

    def __init__(
        self,
        network: Network,
        own: Preprocessing,
        mean: Sequence[float],
        std: Sequence[float],
        order: Sequence[int] | None = None,
    ):
        super().__init__()
        self.network, self.image_size, self.interpolation = network, own.image_size, own.interpolation
        self.same = (list(mean), list(std)) == (own.mean, own.std)
        moments = (mean, std, own.mean, own.std)
        before, spread, wanted, unit = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in moments)
        for name, value in (("scale", spread / unit), ("shift", (before - wanted) / unit)):
            self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)

    @property
    def info(self):
        return self.network.info

    @property
    def fc(self) -> nn.Linear:
        return self.network.fc

    @property
    def preact(self) -> tuple[nn.Module, ...]:
        return self.network.preact

    def state_dict(self, *args, **options) -> dict:
        return self.network.state_dict(*args, **options)

    def load_state_dict(self, *args, **options):
        return self.network.load_state_dict(*args, **options)

    def forward(self, images: Tensor, features=False):
        outputs = self.network(self.prepared(images), features=features)
        if self.order is None:
            return outputs
        logits, *rest = outputs if features else (outputs,)
        logits = logits.index_select(1, self.order)
        return (logits, *rest) if features else logits

    def prepared(self, images: Tensor) -> Tensor:
        """The images [N, 3, H, W] as the network knows them."""
        if not self.same:
            images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[-1] == self.image_size:
            return images
        smooth = self.interpolation != "nearest"
        options = {"align_corners": False, "antialias": True} if smooth else {}
        return F.interpolate(images, self.image_size, mode=self.interpolation, **options)


def fitted(
    network: Network,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
    order: Sequence[int] | None = None,
    interpolation: str | None = None,
) -> Network | Preprocessed:
    """A network with its `info`, behind a wrapper unless images [N, 3, size, size] normalised by `mean` and `std` and
    their classes are as it knows them; see Preprocessed."""
    info = network.info
    if (info.mean, info.std, info.image_size, order) == (list(mean), list(std), size, None):
        return network
    own = Preprocessing(info.mean, info.std, info.image_size, interpolation or "bilinear")
    return Preprocessed(network, own, mean, std, order)


def fitted_to(
    teacher: Network, student: Network, where: str, mapping: dict | None = None, interpolation: str | None = None
) -> Network | Preprocessed:
    """A teacher for the images and classes of a student, by the `info` of both; see `fitted` and `class_order`."""
    own, theirs = student.info, teacher.info
    order = class_order(theirs.class_names, theirs.num_classes, own.class_names, own.num_classes, mapping, where)
    return fitted(teacher, own.mean, own.std, own.image_size, order, interpolation)


def class_order(
    names: Sequence[str] | None,
    count: int,
    wanted: Sequence[str] | None,
    classes: int,
    mapping: dict | None,
    where: str,
) -> list[int] | None:
    """Which of a teacher's `count` outputs is for each of the data's `classes`; None: they are the same, in order.

    By names where both sides have them and all of the data's are the teacher's. Otherwise by `mapping`, from names or
    numbers of the data's classes to names or numbers of the teacher's outputs. Otherwise equal numbers of classes are
    taken to be in the same order, unless a name that both sides have stands at another place.

    Raises:
        UserError: an order that cannot be told; `where` names the teacher.
    """
    places = _places(names)
    found = [_place(name, places) for name in wanted or ()]
    if found and None not in found and len({*found}) == classes:
        return None if found == list(range(count)) else found
    if mapping is not None:
        return [_mapped(mapping, place, wanted, places, count, where) for place in range(classes)]
    if count == classes and all(there in (here, None) for here, there in enumerate(found)):
        return None
    if places and wanted:
        unknown = [name for name, there in zip(wanted, found, strict=True) if there is None or found.count(there) > 1]
        why = f"{len(unknown)} of the {classes} classes' names are not the teacher's, as '{unknown[0]}'"
    else:
        why = f"has {count} classes, the images {classes}, and names are not known on both sides"
    raise UserError(f"{where}: {why}; --teacher_classes FILE of distill.py and evaluate.py says which is which")


def _ways(name: str) -> tuple[str, ...]:
    """A name, and the first of several in it: "tench, Tinca tinca" is also "tench"."""
    plain = name.casefold().replace("_", " ")
    return (plain, plain.partition(",")[0])


def _places(names: Sequence[str] | None) -> dict[str, int]:
    """The output of each name, those left out that stand for several."""
    found: dict[str, set[int]] = {}
    for place, name in enumerate(names or ()):
        for way in _ways(name):
            found.setdefault(way, set()).add(place)
    return {name: place for name, (place, *others) in found.items() if not others}


def _place(name: str, places: dict[str, int]) -> int | None:
    return next((places[way] for way in _ways(name) if way in places), None)


def _mapped(mapping: dict, place: int, wanted: Sequence[str] | None, places: dict, count: int, where: str) -> int:
    keys = [str(place), *([wanted[place]] if wanted else [])]
    known = {_ways(key)[0]: output for key, output in mapping.items()}
    found = next((known[_ways(key)[0]] for key in reversed(keys) if _ways(key)[0] in known), None)
    output = _place(found, places) if isinstance(found, str) else found
    if type(output) is not int or not 0 <= output < count:
        said = "is not there" if found is None else f"cannot be {str(found)[:60]!r}"
        named = " and names for them" if places else ", without names"
        raise UserError(f"--teacher_classes: class '{keys[-1]}' {said}; {where} has outputs 0 to {count - 1}{named}")
    return output


def read_mapping(path: str) -> dict:
    """--teacher_classes: a JSON object from the data's classes to the teacher's. Raises UserError for anything else."""
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"--teacher_classes {path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--teacher_classes {path}: cannot be read as JSON ({reason})") from None
    if not isinstance(found, dict):
        raise UserError(f"--teacher_classes {path}: is no JSON object from the images' classes to the teacher's")
    return found
