"""Whether the teachers of a run are asked before its training, and what is then kept of their logits."""

from pathlib import Path

from common import UserError
from data.digest import digest_of
from data.pipeline import augmentation_of
from data.splits import ImageSet, Split, StreamSplit
from engine.objective import Objective
from models.network import Network
from models.preprocessing import Preprocessed
from objectives.distillation import Distillation
from objectives.stored_logits import StoredLogits

PLACE = "runs/logits"  # the default of --cache_folder


def cache_logits(config, objective: Objective, data: ImageSet) -> str | None:
    """Have the teachers' logits cached, if that is possible and wanted; what the user should know of it.

    Raises:
        UserError: `config` (distill.py's options) wants what is not possible.
    """
    if config.cache_teacher == "disk":
        return store_logits(config, objective, data)
    views = augmentation_of(data, config).views if isinstance(data.train, Split) else None
    reason = objective.cannot_cache(views) if isinstance(objective, Distillation) else "there is no teacher"
    if config.cache_teacher == "memory" and reason:
        raise UserError(f"--cache_teacher memory: {reason}")
    images = len(data.train)
    if config.cache_teacher is None and not reason:
        halved = 2 * views <= config.last_epoch and 4 * images * views * data.num_classes <= 2**30
        reason = None if halved else "it would not halve the teacher's work"
    if config.cache_teacher == "no" or reason:
        return None
    objective.cache_logits = True
    return f"teacher logits: cached before training, of {images:,} images x {views} crops and mirrors"


def store_logits(config, objective: Objective, data: ImageSet) -> str:
    """Have the teachers' logits taken from disk; what the user should know of it."""
    numbered = not isinstance(data.train, StreamSplit)
    reason = objective.cannot_store(numbered) if isinstance(objective, Distillation) else "there is no teacher"
    if reason:
        raise UserError(f"--cache_teacher disk: {reason}")
    if config.cache_top_k is not None and config.cache_top_k >= data.num_classes:
        raise UserError(f"--cache_top_k {config.cache_top_k}: must be below the {data.num_classes} classes")
    teachers = [facts_of(teacher) for teacher in objective.frozen]
    key = {"teachers": teachers, "data": data.fingerprint(), "pixels": digest_of(data.train, data.image_size)}
    key |= {"mean": data.mean, "std": data.std}
    views, place = min(config.cache_views or config.last_epoch, config.last_epoch), Path(config.cache_folder or PLACE)
    stored = StoredLogits(place, key, data.num_classes, views, config.gradient_accumulation_steps, config.cache_top_k)
    objective.store_logits(stored)
    size = views * stored.bytes_for(len(data.train)) / 1e6
    return f"teacher logits: of {views} view(s) of {len(data.train):,} images, on disk in {place} ({size:,.1f} MB)"


def facts_of(teacher: Network | Preprocessed) -> list:
    """What decides on a teacher's logits for a batch: its weights, and what it makes of images and classes."""
    info = teacher.info
    if not isinstance(teacher, Preprocessed):
        return [info.sha256]
    order = None if teacher.order is None else teacher.order.tolist()
    return [info.sha256, info.mean, info.std, teacher.image_size, teacher.interpolation, order]
