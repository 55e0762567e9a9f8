"""The zoo: models by name, and trained models as `model.safetensors` + `model.json` in a run folder."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from common import UserError, check_name, read_text, write_atomically
from models.densenet import DenseNet
from models.foreign import Foreign
from models.imagenet import CUTS, ImageNetFeatures, ImageNetResNet, torchvision_network
from models.imagenet import RESNETS as IMAGENET_RESNETS
from models.mobilenet import MobileNetV2
from models.network import Network, cost
from models.own import build_own, check_trusted, is_own
from models.pool import NAS_STUDENTS, Pool, PoolNet
from models.pool.specs import read_spec
from models.resnet import ResNet
from models.shufflenet import ShuffleNetV1, ShuffleNetV2
from models.timm_models import HUB, TimmNetwork, check_architecture
from models.vgg import LAYERS, VGG
from models.weights import load_weights as load_weights
from models.wrn import WideResNet

NARROW, WIDE_X2, WIDE_X4 = (16, 16, 32, 64), (16, 32, 64, 128), (32, 64, 128, 256)
SMALL_IMAGE: dict[str, Callable[[int], Network]] = {
    **{f"resnet{depth}": partial(ResNet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x2": partial(ResNet, depth, WIDE_X2) for depth in (8, 14, 20, 32)},
    **{f"resnet{depth}x4": partial(ResNet, depth, WIDE_X4) for depth in (8, 32)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in LAYERS},
    "mobilenetv2": partial(MobileNetV2, 0.5),
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}
IMAGENET: dict[str, Callable[[int], Network]] = {
    **{name: partial(ImageNetFeatures, name) for name in CUTS},
    "shufflenet_v2": partial(ShuffleNetV2, small=False),
}
WRN_NAME = re.compile(r"wrn(\d{1,9})_(\d{1,9})")
WRNS = ["16_1", "16_2", "16_3", "16_4", "16_6", "16_8", "16_11", *(f"28_{width}" for width in range(1, 9))]
WRNS += ["40_1", "40_2", "52_2", "64_2", "76_2", "88_2", "100_2", "154_2", "250_2"]
DENSENET_NAME = re.compile(r"densenet(bc)?(\d{1,9})_(\d{1,9})")
FOREIGN = ("timm:NAME", "hf-hub:ORG/NAME", "torchvision:NAME", "FILE.py:FUNCTION")
MAX_DEPTH, MAX_WIDTH = 2000, 256
MOST_OF_A_PIXEL = 1e6  # mean and deviation of pixels from 0 to 1
MAX_CLASSES, MAX_SIDE = 10**6, 2**14  # of what a model.json may ask for: more would fill any memory
DENSENETS = ["40_12", "40_24", "40_48", "100_12", "100_24", "bc40_12", "bc100_12"]


def list_models() -> list[str]:
    """The names that `create_model` takes; besides these any wrn{depth}_{width}, densenet{depth}_{growth} and
    densenetbc{depth}_{growth}, pool:SEED, spec files, and those of `FOREIGN`."""
    wrns, densenets = [f"wrn{size}" for size in WRNS], [f"densenet{size}" for size in DENSENETS]
    return [*SMALL_IMAGE, *wrns, *densenets, *NAS_STUDENTS, *IMAGENET_RESNETS, *IMAGENET]


def is_model(name: str) -> bool:
    """Whether `create_model` takes this name (for other libraries', whether it would ask them)."""
    patterns = (WRN_NAME, DENSENET_NAME)
    if name in list_models() or is_foreign(name) or name.startswith("pool:"):
        return True
    return any(pattern.fullmatch(name) for pattern in patterns)


def is_foreign(name: str) -> bool:
    """Whether this is the name of a network that was not written for this project."""
    return is_own(name) or name.startswith(("timm:", HUB, "torchvision:"))


def create_model(
    name: str,
    num_classes: int,
    pool: Pool | None = None,
    argument: str = "model",
    image_size: int = 32,
    stages: Sequence[str] = (),
    architecture: dict | None = None,
) -> Network:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a zoo name, `pool:SEED` (a random member of `pool`), the path of a student's spec (.json), `timm:NAME`,
            `hf-hub:ORG/NAME` (timm's of the hub), `torchvision:NAME`, or `FILE.py:FUNCTION`, which is executed and
            gives a torch.nn.Module.
        num_classes: width of the classifier, at least 2.
        pool: the pool that `pool:SEED` draws from; the paper's when None.
        argument: what error messages call `name`, for example "--student".
        image_size: side of the images it is for. ResNets 18 to 152 have a form for sides up to 64, and members of a
            pool a stem that suits it (Pool.stem_stride).
        stages: of a network that is not the zoo's: names of submodules whose outputs are its feature maps.
        architecture: of one of the hub: what the hub says of it (models.timm_models.TimmNetwork).

    Raises:
        UserError: unknown name, a bad seed or spec, or a depth that the family does not have.
    """
    if is_foreign(name):
        return _foreign(name, num_classes, argument, image_size, stages, architecture)
    if stages:
        raise UserError(f"{argument} {name}: has stages of its own; they are named for networks of other libraries")
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2; got {num_classes}")
    if builder := (SMALL_IMAGE | IMAGENET).get(name):
        return builder(num_classes)
    if name in IMAGENET_RESNETS:
        return ImageNetResNet(name, num_classes, image_size)
    if match := WRN_NAME.fullmatch(name):
        if int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1:
            raise UserError(
                f"{argument} {name}: a WRN's depth is 6n + 4 (10, 16, 22, 28, 40, ...), its width 1 or more"
            )
        check_size(argument, name, int(match[1]), int(match[2]))
        return WideResNet(int(match[1]), int(match[2]), num_classes)
    if match := DENSENET_NAME.fullmatch(name):
        bc, depth, growth = bool(match[1]), int(match[2]), int(match[3])
        check_size(argument, name, depth, growth)
        step = 6 if bc else 3
        if depth < step + 4 or (depth - 4) % step or growth < 1:
            raise UserError(
                f"{argument} {name}: a DenseNet{'-BC' if bc else ''}'s depth is {step}n + 4 "
                f"({step + 4}, {2 * step + 4}, ..., 40, 100), its growth 1 or more"
            )
        return DenseNet(depth, growth, num_classes, bc)
    if (spec := find_spec(name, pool, argument, image_size)) is not None:
        return PoolNet(spec, num_classes)
    check_name(argument, name, [*list_models(), "pool:SEED", *FOREIGN])
    raise AssertionError(f"'{name}' is listed but cannot be built")


def _foreign(
    name: str, num_classes: int, argument: str, image_size: int, stages: Sequence[str], architecture: dict | None
) -> Foreign:
    if name.startswith(("timm:", HUB)):
        return TimmNetwork(name, num_classes, image_size, argument, stages, architecture)
    if name.startswith("torchvision:"):
        return torchvision_network(name, num_classes, image_size, argument, stages)
    return Foreign(name, build_own(name, num_classes, image_size, argument), image_size, argument, stages)


def check_size(argument: str, name: str, depth: int, width: int) -> None:
    """Raise UserError for a depth or width that is a slip of the keyboard: it would fill any memory."""
    if depth > MAX_DEPTH or width > MAX_WIDTH:
        raise UserError(f"{argument} {name[:60]}: depths go up to {MAX_DEPTH}, widths and growths up to {MAX_WIDTH}")


def describe_models() -> Iterator[str]:
    """A table of the listed models, a row for each of their sizes, header first; rows come as they are found.

    Parameters at 100 classes and images of 32 for networks for small images, at 1000 and 224 for ImageNet's;
    2 floating-point operations a multiply-accumulate of convolutions and linear layers, for one image; the
    maps C x H x W at the ends of the blocks that SFTN and GTN cut at. Nothing is computed: all is on `meta`.
    """
    sizes = [(name, 32) for name in list_models() if name not in IMAGENET]
    sizes += [(name, 224) for name in (*IMAGENET_RESNETS, *IMAGENET)]
    width = max(len(name) for name, _ in sizes)
    yield f"{'name':<{width}}  {'parameters':>11}  {'MFLOPs':>8}  image  block outputs"
    for name, size in sizes:
        with torch.device("meta"):
            model = create_model(name, 100 if size == 32 else 1000, image_size=size).eval()
            parameters, flops, maps = cost(model, size)
        shapes = "  ".join("x".join(map(str, shape)) for shape in maps[-len(model.blocks) :])
        yield f"{name:<{width}}  {parameters:>11,}  {flops / 1e6:>8,.1f}  {size:>5}  {shapes}"


def find_spec(name: str, pool: Pool | None = None, argument: str = "model", image_size: int = 32) -> dict | None:
    """The JSON spec behind `nas_*`, `pool:SEED` (for images of this side) or a .json path; None for other names."""
    if name in NAS_STUDENTS:
        return NAS_STUDENTS[name]
    if name.startswith("pool:"):
        if not name[5:].isdecimal() or len(name) > 23:
            raise UserError(
                f"{argument} {name}: write pool:SEED with a whole number of at most 18 digits, for example pool:7"
            )
        return (pool or Pool()).for_images(image_size).sample(int(name[5:]))
    return read_spec(Path(name), argument) if name.endswith(".json") else None


@dataclass
class ModelInfo:
    """What `model.json` says besides the weights: enough to rebuild the network and to feed it.

    `dataset` is the name of the data set it was trained on, as --dataset takes it.
    `mean` and `std` normalise RGB in [0, 1]; `spec` is set for students of a pool, `pool` for a GTN teacher:
    the students it was trained for; `sha256` is that of model.safetensors; `class_names` in the order of the outputs,
    where the data set has any; `stages` and `architecture` are those of `create_model`.
    """

    name: str
    dataset: str
    num_classes: int
    image_size: int
    mean: list[float]
    std: list[float]
    spec: dict | None = None
    pool: dict | None = None
    sha256: str = ""
    class_names: list[str] | None = None
    stages: list[str] = field(default_factory=list)
    architecture: dict | None = None

    def check(self) -> None:
        """Raise UserError, naming the field, for values that no run writes."""

        def numbers(values: object) -> bool:
            plain = isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)
            return plain and all(-MOST_OF_A_PIXEL < value < MOST_OF_A_PIXEL for value in values)  # nan is not

        fine = {
            "name": isinstance(self.name, str) and (self.spec is not None or not self.name.endswith(".json")),
            "dataset": isinstance(self.dataset, str),
            "num_classes": type(self.num_classes) is int and 2 <= self.num_classes <= MAX_CLASSES,
            "image_size": type(self.image_size) is int and 1 <= self.image_size <= MAX_SIDE,
            "mean": numbers(self.mean),
            "std": numbers(self.std) and min(self.std) > 0,
            "pool": self.pool is None or isinstance(self.pool, dict),
            "class_names": self.class_names is None or self._names_each_class(),
            "stages": isinstance(self.stages, list) and all(isinstance(each, str) for each in self.stages),
        }
        for name, good in fine.items():
            if not good:
                raise UserError(f"model.json: '{name}' cannot be {getattr(self, name)!r}")
        if self.pool is not None:
            Pool(**self.pool).check()
        if self.architecture is not None or self.name.startswith(HUB):
            check_architecture(self.architecture, "model.json")

    def _names_each_class(self) -> bool:
        names = self.class_names
        return isinstance(names, list) and len(names) == self.num_classes and all(isinstance(n, str) for n in names)


def serialised(model: Network, metadata: dict[str, str] | None = None) -> bytes:
    """The content of `model.safetensors`."""
    tensors = {name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()}
    return safetensors.torch.save(tensors, metadata)


def rebuilt_by(network: Network) -> dict:
    """The fields of ModelInfo that say how a network of another library is built."""
    return {"stages": [*network.named_stages], "architecture": network.architecture}


def save_pretrained(model: Network, info: ModelInfo, folder: Path) -> ModelInfo:
    """Write `model.safetensors` and `model.json`, each atomically; return the info with its checksum."""
    data = serialised(model)
    info.sha256 = hashlib.sha256(data).hexdigest()
    write_atomically(folder / "model.safetensors", data)
    write_atomically(folder / "model.json", json.dumps(asdict(info), indent=1) + "\n")
    return info


def load_pretrained(folder: str | Path, stages: Sequence[str] = ()) -> Network:
    """The trained model of a run folder, in eval mode on the CPU, its ModelInfo as `model.info`.

    `stages` take the place of those that it was trained with (`create_model`).

    Raises:
        UserError: no model there, or files that are damaged, tampered with or not what they claim to be.
            Nothing that is read can execute code.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(f"'{folder}' holds no trained model (model.json and model.safetensors)")
    try:
        info = ModelInfo(**json.loads(read_text(folder / "model.json")))
        info.check()
        info.stages = list(stages) or info.stages
        data = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise UserError(f"'{folder / 'model.safetensors'}' is not the file that model.json describes: damaged?")
        tensors = safetensors.torch.load(data)
        if is_own(info.name):
            check_trusted(info.name)
        if info.spec:
            model = PoolNet(info.spec, info.num_classes)
        else:
            built = {"image_size": info.image_size, "stages": info.stages, "architecture": info.architecture}
            model = create_model(info.name, info.num_classes, **built)
        model.load_state_dict(tensors)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{folder}' holds a model that cannot be loaded: {reason}") from None
    model.info = info
    return model.eval()
