"""Initial weights: published ones, or those of a local file. Nothing that is read can execute code."""

import argparse
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common import UserError
from models.foreign import Foreign
from models.network import Network
from models.pool import PoolNet
from models.timm_models import TimmNetwork

MAX_UNPACKED = 4  # times its own size: torch.save does not compress
LAYERS = "layers"  # in the metadata of a .safetensors: PoolNet.described of the member whose weights these are
WRAPPERS = ("model", "state_dict")  # keys under which checkpoints keep the weights beside other things


@dataclass
class Loaded:
    """What was loaded: `origin` in words, why the classifier was not, if so, and for how many `classes` it is there."""

    origin: str
    fresh_classifier: str = ""
    classes: int | None = None

    def __str__(self) -> str:
        return self.origin + (f", classifier fresh: {self.fresh_classifier}" if self.fresh_classifier else "")


def load_weights(model: Network, source: str, argument: str = "--weights") -> Loaded:
    """Load weights into `model`.

    A classifier for another number of classes keeps its fresh weights; anything else has to fit.

    Args:
        model: a network of `create_model`.
        source: "pretrained" for torchvision's default ImageNet weights, or timm's; a run folder; or a file:
            .safetensors, or .pth / .pt with a state dict in it, possibly under "model" or "state_dict".
        argument: the option that error messages name.

    Raises:
        UserError: there are no such weights, they cannot be had or read, or they do not fit.
    """
    if source == "pretrained":
        where = argument
        tensors, origin = _published(model, argument)
    else:
        where = f"{argument} {source}"
        tensors, origin = _read(Path(source), where), f"weights of {source}"
        if isinstance(model, PoolNet):
            _check_member(model, Path(source), where)
    if isinstance(model, Foreign) and not any(name.startswith("net.") for name in tensors):
        tensors = {f"net.{name}": tensor for name, tensor in tensors.items()}
    tensors, fresh, classes = _fit(model, tensors, where)
    model.load_state_dict(tensors)
    return Loaded(origin, fresh, classes)


def initial_weights(model: Network, pretrained: bool, file: str | None) -> Loaded | None:
    """What --pretrained and --weights ask for; None when neither is given."""
    if pretrained:
        return load_weights(model, "pretrained", "--pretrained")
    return load_weights(model, file, "--weights") if file else None


def _published(model: Network, argument: str) -> tuple[dict[str, Tensor], str]:
    if model.published is None:
        raise UserError(
            f"{argument}: there are no published weights of this network; resnet18 to resnet152 (--image_size "
            "above 64), mobilenet_v2, efficientnet_b0, shufflenet_v2 and networks of timm have some"
        )
    try:
        if isinstance(model, TimmNetwork):
            return model.published_tensors(), f"{model.published} weights"
        from torchvision.models import get_model_weights

        weights = get_model_weights(model.published).DEFAULT
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        return dict(tensors), f"torchvision {weights.name} weights"
    except UserError as error:
        raise UserError(f"{argument}: {error}") from None
    except Exception as error:  # no network, a full disk, a damaged download, a server's refusal
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{argument}: the weights of {model.published} cannot be downloaded ({reason})") from None


def _read(path: Path, where: str) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.name.endswith((".safetensors", ".pth", ".pt", ".pth.tar")):
        raise UserError(f"{where}: must be a .safetensors, .pth, .pt or .pth.tar file")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file")
    if (size := _unpacked_bytes(path)) > MAX_UNPACKED * path.stat().st_size + 2**20:
        raise UserError(f"{where}: unpacks to {size / 1e9:.1f} GB, far more than a file of its size can mean")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # timm's checkpoints hold their options. What torch warns of is either refused below or harmless.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes a reader raise can be anything
        # The reader's own words are left out: for files with code in them they advise to execute it.
        raise UserError(f"{where}: is damaged, or holds more than tensors ({type(error).__name__})") from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{where}: holds no state dict")
    for name, tensor in content.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            kind = f"{tensor.layout}, {tensor.dtype}"
            raise UserError(f"{where}: '{name}' is no plain tensor ({kind}); save it dense, of real numbers")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _check_member(model: PoolNet, path: Path, where: str) -> None:
    """Raise UserError for weights that say of themselves that they are another member's, as those of search.py do."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            layers = (file.metadata() or {}).get(LAYERS)
        if layers not in (None, model.described):
            raise UserError(f"{where}: these are weights of another member of the pool than this student")


def _unpacked_bytes(path: Path) -> int:
    """What the zip archive that torch.save writes unpacks to; 0 for files of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return 0  # no archive, or one that zipfile cannot read: torch.load has its own word for it


def _fit(model: Network, tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], str, int | None]:
    """`tensors` ready to be loaded, what to say of the classifier, and its classes there if they are others; UserError
    names the first misfit."""
    own, classifier = model.state_dict(), (model.fc.weight, model.fc.bias)
    head = {name for name, parameter in model.named_parameters() if any(parameter is each for each in classifier)}
    fresh, count = "", None
    classes = {len(tensors[name]) if tensors[name].ndim else 0 for name in head & tensors.keys()}
    if classes != {model.fc.weight.shape[0]} and all(
        name not in tensors or tensors[name].shape[1:] == own[name].shape[1:] for name in head
    ):
        count = classes.pop() if len(classes) == 1 else None
        fresh = f"{model.fc.weight.shape[0]} classes instead of {count or 'none'}"
        tensors = tensors | {name: own[name] for name in head}
    for name, tensor in own.items():
        if name not in tensors:
            if name.endswith("num_batches_tracked"):  # older than this counter: BatchNorm fills it in itself
                continue
            raise UserError(f"{where}: '{name}' is missing there")
        if tensors[name].shape != tensor.shape:
            there, here = ("x".join(map(str, shape)) or "a number" for shape in (tensors[name].shape, tensor.shape))
            raise UserError(f"{where}: '{name}' is {there} there, but {here} in this network")
    for name in tensors:
        if name not in own:
            raise UserError(f"{where}: '{name}' belongs to no layer of this network")
    return tensors, fresh, count
