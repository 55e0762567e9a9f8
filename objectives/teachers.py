"""The teachers of distill.py: loaded or built, each with its own preprocessing and the images' classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common import UserError
from data.splits import ImageSet
from losses.options import TeacherOptions
from models import ModelInfo, create_model, is_foreign, is_model, load_pretrained, serialised
from models.network import Network
from models.own import is_own
from models.preprocessing import (
    Preprocessed,
    class_order,
    fitted,
    published_classes,
    published_preprocessing,
    read_mapping,
)
from models.weights import load_weights

OF_NAMED = ("teacher_weights", "teacher_mean", "teacher_std", "teacher_image_size")


def load_teachers(config: TeacherOptions, needed: bool) -> list[Network | str]:
    """Trained teachers of run folders, and the names of those that can be built only when the data is known."""
    if not needed:
        return []
    if not config.teacher:
        raise UserError(f"--teacher: --method {config.method} needs the run folder of a trained teacher")
    teachers: list[Network | str] = []
    for source in config.teacher:
        if is_model(source) and not Path(source).is_dir():
            teachers.append(source)
            continue
        try:
            teachers.append(load_pretrained(source, config.teacher_stages))
        except UserError as error:
            raise UserError(f"--teacher {source}: {error}") from None
    if config.teacher_stages and len(teachers) != 1:
        raise UserError(f"--teacher_stages {' '.join(config.teacher_stages)}: needs one teacher")
    named = sum(isinstance(teacher, str) for teacher in teachers)
    for option in OF_NAMED:
        value = getattr(config, option)
        if value and named != 1:
            said = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{option} {said}: needs one teacher that is given by its name")
    return teachers


def build_teacher(name: str, data: ImageSet, config: TeacherOptions) -> Network:
    """A teacher by name: with published weights, those of a file, or those that a function of the user's gives it."""
    own = published_preprocessing(name) if is_foreign(name) and not is_own(name) else None
    size = config.teacher_image_size or (own.image_size if own else data.image_size)
    built = {"pool": config.pool, "argument": "--teacher", "image_size": size, "stages": config.teacher_stages}
    teacher, file = create_model(name, data.num_classes, **built), config.teacher_weights
    if file or not is_own(name):
        source, argument = file or "pretrained", "--teacher_weights" if file else f"--teacher {name}"
        loaded = load_weights(teacher, source, argument)
        if loaded.classes:
            teacher = create_model(name, loaded.classes, **built)
            load_weights(teacher, source, argument)
        elif loaded.fresh_classifier:
            raise UserError(f"--teacher {name}: cannot teach {data.num_classes} classes: {loaded}")
    if teacher.published and not file:  # of a network of the zoo, which is built for the images' size
        own = own or published_preprocessing(name)
    mean, std = config.teacher_mean or (own or data).mean, config.teacher_std or (own or data).std
    teacher.info = ModelInfo(name, data.name, len(teacher.fc.weight), size, mean, std)
    teacher.info.sha256 = hashlib.sha256(serialised(teacher)).hexdigest()
    teacher.info.class_names = None if file or is_own(name) else _names_of(teacher, data.class_names or ())
    teacher.interpolation = own.interpolation if own else None
    return teacher.eval()


def _names_of(teacher: Network, wanted: Sequence[str]) -> list[str] | None:
    """What its classes are called, in the way that has most in common with the images' names."""
    return max(published_classes(teacher), key=lambda names: len({*names} & {*wanted}), default=None)


def image_size(config: TeacherOptions, known: Sequence[ModelInfo]) -> int | None:
    """Of the student's images: what the user asks for, else what the first teacher was trained on."""
    return config.image_size or (known[0].image_size if known else None)


def fit_to_teachers(data: ImageSet, teachers: list[Network]) -> ImageSet:
    """The data normalised as the first teacher knows it: nothing is left to do for those that agree with it."""
    return replace(data, mean=teachers[0].info.mean, std=teachers[0].info.std) if teachers else data


def preprocessed(teachers: list[Network], data: ImageSet, config: TeacherOptions) -> list[Network | Preprocessed]:
    """The teachers, those behind a wrapper whose images or classes are not the data's.

    Raises:
        UserError: classes whose order cannot be told.
    """
    mapping = read_mapping(config.teacher_classes) if config.teacher_classes else None
    if mapping is not None and not teachers:
        raise UserError(f"--teacher_classes {config.teacher_classes}: there is no teacher")
    found = []
    for teacher, place in zip(teachers, config.teacher, strict=False):
        info = teacher.info
        names = (info.class_names, info.num_classes, data.class_names, data.num_classes)
        order = class_order(*names, mapping, f"--teacher {place}")
        interpolation = config.teacher_interpolation or getattr(teacher, "interpolation", None)
        found.append(fitted(teacher, data.mean, data.std, data.image_size, order, interpolation))
    return found


def describe_preprocessing(teacher: Network | Preprocessed) -> str | None:
    """A line on what a teacher sees, if that is not the student's batch."""
    if not isinstance(teacher, Preprocessed):
        return None
    info = teacher.info
    told = [f"images of {info.image_size}x{info.image_size} ({teacher.interpolation})"]
    told += [] if teacher.same else ["normalised its own way"]
    told += [] if teacher.order is None else [f"{len(teacher.order)} of its {info.num_classes} outputs"]
    return f"teacher {info.name}: {', '.join(told)}"


def read_anchors(sources: list[str], teacher: Network) -> list[dict[str, torch.Tensor]]:
    """The weights of a teacher on its way, from its run folder, in the order of its epochs."""
    folders = sorted((Path(sources[0]) / "anchors").glob("*/model.json")) if len(sources) == 1 else []
    if not folders:
        raise UserError(f"--teacher {' '.join(sources)}: --method rco needs one teacher trained with --anchors K")
    states = [load_pretrained(place.parent).state_dict() for place in folders]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (teacher.state_dict(), *states)]
    if any(each != shapes[0] for each in shapes):
        raise UserError(f"--teacher {sources[0]}: its anchors are of another network than its model")
    return states
