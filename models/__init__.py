"""The zoo: models by name, and trained models as `model.safetensors` + `model.json` in a run folder."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from common import UserError, check_name, write_atomically
from models.network import Network
from models.pool import NAS_STUDENTS, Pool, PoolNet, read_spec
from models.resnet import ResNet
from models.wrn import WideResNet

NARROW, WIDE_X2, WIDE_X4 = (16, 16, 32, 64), (16, 32, 64, 128), (32, 64, 128, 256)
RESNETS = {f"resnet{depth}": (depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)}
RESNETS |= {"resnet8x2": (8, WIDE_X2), "resnet8x4": (8, WIDE_X4), "resnet32x4": (32, WIDE_X4)}
WRN_NAME = re.compile(r"wrn(\d+)_(\d+)")
WRNS = [f"wrn{depth}_{width}" for depth, width in ((16, 1), (16, 2), (28, 2), (28, 4), (40, 1), (40, 2))]


def list_models() -> list[str]:
    """Every name that `create_model` takes; besides these any wrn{depth}_{width}, pool:SEED and spec files."""
    return [*RESNETS, *WRNS, *NAS_STUDENTS]


def create_model(name: str, num_classes: int, pool: Pool | None = None, argument: str = "model") -> Network:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a zoo name, `pool:SEED` (a random member of `pool`) or the path of a student's spec (.json).
        num_classes: width of the classifier, at least 2.
        pool: the pool that `pool:SEED` draws from; the paper's when None.
        argument: what error messages call `name`, for example "--student".

    Raises:
        UserError: unknown name, a bad seed or spec, or a depth that the family does not have.
    """
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2; got {num_classes}")
    if name in RESNETS:
        return ResNet(*RESNETS[name], num_classes)
    if match := WRN_NAME.fullmatch(name):
        if int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1:
            raise UserError(
                f"{argument} {name}: a WRN's depth is 6n + 4 (10, 16, 22, 28, 40, ...), its width 1 or more"
            )
        return WideResNet(int(match[1]), int(match[2]), num_classes)
    if (spec := find_spec(name, pool, argument)) is not None:
        return PoolNet(spec, num_classes)
    check_name(argument, name, [*list_models(), "pool:SEED"])
    raise AssertionError(f"'{name}' is listed but cannot be built")


def find_spec(name: str, pool: Pool | None = None, argument: str = "model") -> dict | None:
    """The JSON spec behind `nas_*`, `pool:SEED` or a .json path; None for names of other kinds."""
    if name in NAS_STUDENTS:
        return NAS_STUDENTS[name]
    if name.startswith("pool:"):
        if not name[5:].isdecimal():
            raise UserError(f"{argument} {name}: write pool:SEED with a whole number, for example pool:7")
        return (pool or Pool()).sample(int(name[5:]))
    return read_spec(Path(name), argument) if name.endswith(".json") else None


@dataclass
class ModelInfo:
    """What `model.json` says besides the weights: enough to rebuild the network and to feed it.

    `dataset` is the name of the data set it was trained on, as --dataset takes it.
    `mean` and `std` normalise RGB in [0, 1]; `spec` is set for students of a pool, `pool` for a GTN teacher:
    the students it was trained for; `sha256` is that of model.safetensors.
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

    def check(self) -> None:
        """Raise UserError, naming the field, for values that no run of ours writes."""

        def numbers(values: object) -> bool:
            return isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)

        fine = {
            "name": isinstance(self.name, str),
            "dataset": isinstance(self.dataset, str),
            "num_classes": type(self.num_classes) is int and self.num_classes >= 2,
            "image_size": type(self.image_size) is int and self.image_size >= 1,
            "mean": numbers(self.mean),
            "std": numbers(self.std) and min(self.std) > 0,
            "pool": self.pool is None or isinstance(self.pool, dict),
        }
        for field, good in fine.items():
            if not good:
                raise UserError(f"model.json: '{field}' cannot be {getattr(self, field)!r}")
        if self.pool is not None:
            Pool(**self.pool).check()


def save_pretrained(model: Network, info: ModelInfo, folder: Path) -> ModelInfo:
    """Write `model.safetensors` and `model.json`, each atomically; return the info with its checksum."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors)
    info.sha256 = hashlib.sha256(data).hexdigest()
    write_atomically(folder / "model.safetensors", data)
    write_atomically(folder / "model.json", json.dumps(asdict(info), indent=1) + "\n")
    return info


def load_pretrained(folder: str | Path) -> Network:
    """The trained model of a run folder, in eval mode on the CPU, its ModelInfo as `model.info`.

    Raises:
        UserError: no model there, or files that are damaged, tampered with or not what they claim to be.
            Nothing that is read can execute code.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(f"'{folder}' holds no trained model (model.json and model.safetensors)")
    try:
        info = ModelInfo(**json.loads((folder / "model.json").read_text()))
        info.check()
        data = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise UserError(f"'{folder / 'model.safetensors'}' is not the file that model.json describes: damaged?")
        tensors = safetensors.torch.load(data)
        model = PoolNet(info.spec, info.num_classes) if info.spec else create_model(info.name, info.num_classes)
        model.load_state_dict(tensors)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{folder}' holds a model that cannot be loaded: {reason}") from None
    model.info = info
    return model.eval()
