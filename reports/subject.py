"""What is evaluated: a trained network, where it came from, and the images for it."""

import os
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common import UserError
from data.datasets import hold_out
from data.options import DataOptions
from data.splits import AnySplit, ImageSet
from models import ModelInfo, create_model, load_pretrained, load_weights
from models.network import Network
from models.preprocessing import published_preprocessing, read_mapping

Options = TypeVar("Options")


@dataclass
class ImageOptions(DataOptions):
    """The data options of a run, as data.pipeline.Pipeline takes them.

    Args:
        seed: of the run; evaluation draws nothing.
    """

    seed: int = 0


@dataclass
class Subject:
    """A network to evaluate.

    Attributes:
        name: what the user called it by.
        folder: where it is kept.
        options: the data options of its run.
        network: None until its data set says for how many classes it is to be built.
        weights: of a network that is still to be built: a file, or "pretrained".
        output: the file that what is found goes to.
    """

    name: str
    folder: Path
    options: ImageOptions = field(default_factory=ImageOptions)
    network: Network | None = None
    weights: str = ""
    output: Path | None = None

    @property
    def info(self) -> ModelInfo | None:
        """What is known of the network before its data is loaded."""
        return self.network.info if self.network else None

    def build(self, data: ImageSet) -> ImageSet:
        """Make the network, if need be; the images are returned normalised as it knows them.

        Raises:
            UserError: weights that are not there or do not fit, a classifier that they leave untrained, or images of
                another number of classes.
        """
        if self.network is None:
            argument = "--pretrained" if self.weights == "pretrained" else "--weights"
            self.network = create_model(self.name, data.num_classes, None, "--model", data.image_size)
            loaded = load_weights(self.network, self.weights, argument)
            if loaded.fresh_classifier:
                raise UserError(f"--dataset {data.name}: is not what these weights are for: {loaded}")
            known = (published_preprocessing(self.name, "--model") if argument == "--pretrained" else None) or data
            mean, std = known.mean, known.std
            self.network.info = ModelInfo(self.name, data.name, data.num_classes, data.image_size, mean, std)
        info = self.network.info
        if info.num_classes != data.num_classes:
            raise UserError(
                f"--dataset {data.name}: has {data.num_classes} classes, but the network of {self.name} "
                f"{info.num_classes}"
            )
        return replace(data, mean=info.mean, std=info.std)


def load_subject(folder: str, argument: str = "RUN") -> Subject:
    """The trained network of a run folder, and its data options.

    Raises:
        UserError: no model there, or files that cannot be what they claim to be; `argument` is named.
    """
    try:
        network = load_pretrained(folder)
    except UserError as error:
        raise UserError(f"{argument} {folder}: {error}") from None
    return Subject(folder, Path(folder), run_options(Path(folder)), network)


def run_options(folder: Path, kind: type[Options] = ImageOptions) -> Options:
    """The options of `kind`, a dataclass, in a run folder's config.yaml; the defaults where there is none.

    Raises:
        UserError: a file that no run of ours writes.
    """
    path, hints = folder / "config.yaml", get_type_hints(kind)
    if not path.is_file():
        return kind()
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    found = {name: config[name] for name in hints if name in config} if isinstance(config, dict) else {}
    for name, value in found.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{path}: '{name}' cannot be {value!r}")
    return kind(**found)


@dataclass
class LearntFrom:
    """What a run's options say of its teachers."""

    teacher: list[str] = field(default_factory=list)
    teacher_classes: str | None = None
    teacher_interpolation: str | None = None


def learnt_from(folder: Path, teacher: str | Path, mapping: dict | None = None) -> dict:
    """How a run saw a teacher, if it is one that it learnt from: arguments of models.preprocessing.fitted_to.

    Args:
        mapping: of the user's own, instead of the run's --teacher_classes.

    Raises:
        UserError: a --teacher_classes of the run that is gone, or is no mapping.
    """
    options, seen = run_options(folder, LearntFrom), {"where": f"--teacher {teacher}", "mapping": mapping}
    if os.path.realpath(teacher) in map(os.path.realpath, options.teacher):
        seen["interpolation"] = options.teacher_interpolation
        if mapping is None and options.teacher_classes:
            seen["mapping"] = read_mapping(options.teacher_classes)
    return seen


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of a type of the options: plain ones, lists of them, literals, and unions of these."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is list:
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)


def part_of(data: ImageSet, split: str, options: DataOptions) -> AnySplit:
    """The split test, val or train of a run's images. Raises UserError for a validation split that it did not keep."""
    if split == "test":
        return data.test
    if split == "val" and not options.val_fraction:
        raise UserError("--split val: the run kept no validation split (its --val_fraction is 0)")
    data, val = hold_out(data, options.val_fraction, "validation")
    return val if split == "val" else data.train
