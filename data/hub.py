"""Data sets of the Hugging Face hub: fetched, from the cache, from a local copy, or streamed."""

import os
from pathlib import Path
from typing import NamedTuple

from common import UserError
from data.options import DataOptions
from data.sources import TEST_SPLITS, Stream, TableSource, datasets_library, reason_of, undecoded

# The classes of Tiny-ImageNet-200 among ImageNet's 1,000, both in the order of their WordNet ids.
IMAGENET200 = (
    *(1, 25, 30, 32, 50, 61, 69, 71, 75, 76, 79, 99, 105, 107, 109, 113, 114, 115, 122, 123, 128, 145, 146, 149, 151),
    *(187, 207, 208, 235, 267, 281, 283, 285, 286, 291, 294, 301, 308, 309, 311, 313, 314, 315, 319, 323, 325, 329),
    *(338, 341, 345, 347, 349, 353, 354, 365, 367, 372, 386, 387, 398, 400, 406, 411, 414, 421, 424, 425, 427, 430),
    *(435, 436, 437, 438, 440, 445, 447, 448, 457, 458, 462, 463, 466, 467, 470, 471, 474, 480, 485, 488, 492, 496),
    *(500, 508, 509, 511, 517, 525, 526, 532, 542, 543, 557, 562, 565, 567, 568, 570, 573, 576, 604, 605, 612, 614),
    *(619, 621, 625, 627, 635, 645, 652, 655, 675, 677, 678, 682, 683, 687, 704, 707, 716, 720, 731, 733, 734, 735),
    *(737, 739, 744, 747, 758, 760, 761, 765, 768, 774, 779, 781, 786, 801, 806, 808, 811, 815, 817, 821, 826, 837),
    *(839, 842, 845, 849, 850, 853, 862, 866, 873, 874, 877, 879, 887, 888, 890, 899, 900, 909, 910, 917, 923, 924),
    *(928, 929, 932, 935, 938, 945, 947, 950, 951, 954, 957, 962, 963, 964, 967, 970, 972, 973, 975, 978, 988),
)


class Hub(NamedTuple):
    """A data set of the Hugging Face hub; what is None is found, or the user's to say.

    `size`: the side of its images, or of what networks see of them where they differ in size: these are
    trained on as `resized_crop`. `classes`: the labels that are kept, in the order of their new numbers.
    `test`: the split to test on, where there are several. `config`: one of several sets in a repository.
    """

    path: str
    image: str | None = None
    label: str | None = None
    size: int | None = None
    resized_crop: bool = False
    classes: tuple[int, ...] | None = None
    test: str | None = None
    config: str | None = None


HUB = {  # the test split of imagenet has no labels
    "cifar10": Hub("uoft-cs/cifar10", "img", "label", 32),
    "cifar100": Hub("uoft-cs/cifar100", "img", "fine_label", 32),
    "stl10": Hub("tanganke/stl10", "image", "label", 96),
    "tiny_imagenet": Hub("zh-plus/tiny-imagenet", "image", "label", 64),
    "imagenet": Hub("ILSVRC/imagenet-1k", "image", "label", 224, resized_crop=True, test="validation"),
}
HUB["imagenet200"] = HUB["imagenet"]._replace(classes=IMAGENET200)
LABELS = ("label", "fine_label", "labels")  # what sets call the column of their classes


def hub_of(name: str) -> Hub | None:
    """The data set that `--dataset` names: a name of `HUB`, or hf:NAME or hf:ORG/NAME/CONFIG; None: it is elsewhere.

    Raises:
        UserError: hf: with no name, or with more than organisation, name and config.
    """
    kind, _, place = name.partition(":")
    if kind != "hf":
        return HUB.get(name)
    parts = place.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(f"--dataset {name}: must be hf:ORG/NAME or hf:ORG/NAME/CONFIG, as the hub spells them")
    return Hub("/".join(parts[:2]), config="/".join(parts[2:]) or None)


def hub_sources(name: str, options: DataOptions) -> list[TableSource]:
    """Training and test split of a data set, from the hub, the cache or a local copy."""
    hub = hub_of(name)
    splits = _load(name, hub, options, streaming=False)
    sources = []
    for split in _split_names(name, hub, splits, options):
        table = splits[split]
        image, label = _columns(name, hub, table.features, options)
        # The others are not looked at: the library would decode them, row by row.
        table = undecoded(table.select_columns([image, label]), image)
        sources.append(TableSource(f"{name} {split}", table, image, label, hub.classes, options.data_dir))
    return sources


def hub_streams(name: str, options: DataOptions) -> list[Stream]:
    """The same without fetching the set first."""
    import datasets

    hub = hub_of(name)
    if hub.classes is not None:
        raise UserError(f"--streaming: {name} is picked out of a larger set by index, which a stream does not have")
    splits = _load(name, hub, options, streaming=True)
    streams = []
    for split in _split_names(name, hub, splits, options):
        rows = splits[split]
        known, features = (rows.info.splits or {}).get(split), rows.features or {}
        image, label = _columns(name, hub, features, options)
        kind = features[label]
        if known is None or not known.num_examples or not isinstance(kind, datasets.ClassLabel):
            raise UserError(f"--streaming: {name} does not say how many images and classes it has")
        rows = undecoded(rows.select_columns([image, label]), image)
        counts = known.num_examples, kind.num_classes
        streams.append(Stream(f"{name} {split}", rows, image, label, *counts, kind.names))
    return streams


def _load(name: str, hub: Hub, options: DataOptions, streaming: bool):
    """The splits by name."""
    datasets = datasets_library()
    folder, cache_dir = options.data_dir, options.cache_dir
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--data_dir {folder}: is no folder")
    saved = folder is not None and (Path(folder) / "dataset_dict.json").is_file()
    if saved and streaming:
        raise UserError(f"--streaming: --data_dir {folder} is a saved set, which needs no fetching; leave it out")
    if options.offline:
        _go_offline()
    try:
        if saved:
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(folder or hub.path, hub.config, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds
        reason = reason_of(error)
        if folder is not None:
            raise UserError(f"--data_dir {folder}: cannot be read as {name} ({reason})") from None
        raise UserError(
            f"--dataset {name}: cannot fetch '{hub.path}' and no cached copy was found ({reason}). What was "
            "fetched before is kept: run again, or give a local copy with --data_dir"
        ) from None


def _go_offline() -> None:
    """As HF_HUB_OFFLINE=1 would, which the library reads only once, when it is first imported."""
    import datasets.config
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _split_names(name: str, hub: Hub, splits, options: DataOptions) -> tuple[str, str]:
    train = options.split_train or "train"
    usual = (split for split in (hub.test, *TEST_SPLITS) if split in splits and split != train)
    test = options.split_test or next(usual, None)
    for option, split, purpose in (("split_train", train, "training"), ("split_test", test, "testing")):
        if split not in splits:
            there = ", ".join(map(str, splits))
            raise UserError(f"--dataset {name}: has the splits {there}; say which is for {purpose} with --{option}")
    if train == test:
        raise UserError(f"--split_test {test}: is what is trained on")
    return train, test


def _columns(name: str, hub: Hub, features, options: DataOptions) -> tuple[str, str]:
    """The columns of images and labels: as the user says, else as the set is known, else the only one of the kind,
    else by name."""
    import datasets

    found = []
    for option, known, kind, usual in (
        ("image_column", hub.image, datasets.Image, ("image", "img")),
        ("label_column", hub.label, datasets.ClassLabel, LABELS),
    ):
        of_kind = [column for column in features if isinstance(features[column], kind)]
        guesses = [known, *(of_kind if len(of_kind) == 1 else []), *usual]
        asked = getattr(options, option)
        column = asked or next((guess for guess in guesses if guess in features), None)
        if column not in features:
            what, there = option.removesuffix("_column"), ", ".join(features)
            said = f"--{option} {asked}: {name}" if asked else f"--dataset {name}:"
            raise UserError(f"{said} has the columns {there}; say which is the {what}'s with --{option}")
        found.append(column)
    return found[0], found[1]
