"""The options of data sets."""

from dataclasses import dataclass, field
from shlex import quote
from typing import Literal

OF_THE_HUB = ("data_dir", "image_column", "label_column", "split_train", "split_test")


@dataclass
class DataOptions:
    """Which images are trained on, and where they come from.

    Args:
        dataset: digits, a data set by name (cifar10, cifar100, stl10, tiny_imagenet, imagenet, imagenet200),
            hf:ORG/NAME, parquet:GLOB or folder:PATH; default: the teacher's, else digits.
        data_dir: a local copy of the hub's data set (a clone of its repository, or a saved one).
        image_column: of a set of the hub; default: its only column of images, else `image` or `img`.
        label_column: of a set of the hub; default: its only column of classes, else `label`, `fine_label` or `labels`.
        split_train: the split of a set of the hub to train on; default: train.
        split_test: the split to test on; default: test, else validation.
        cache_dir: where Hugging Face datasets keeps what it fetches; default: its own place.
        offline: fetch nothing, take data sets of the hub from the cache.
        streaming: read while fetching instead of fetching first (sets of the hub, parquet:GLOB).
        train_fraction: part of the training split that is used, the same share of every class.
        exclude_classes: classes (numbers) whose training images are left out; the test keeps them.
        binary: classes (numbers) that become class 1, and all others class 0: a set of two classes out of any.
        val_fraction: part of the training split kept apart to choose the best epoch on; 0: none.
        image_size: side of the images that networks see; default: the data set's own.
        augment: crop (zero padding, random crop) or resized_crop (random size and shape, for photographs);
            default: what suits the data set.
        crop_padding: padding of the random crop; default: an eighth of the side.
        flip: random horizontal flips; default: what suits the data set (none for digits).
        cutout: side of a square that is blanked at a random place; 0: none.
        aa: torchvision's policy for training images, after crop and flip (arXiv 1909.13719, 2103.10158).
        reprob: probability of random erasing (arXiv 1708.04896), a box in the mean colour.
        pipeline: device (the whole set as uint8 on the device), workers (images are decoded as they are
            needed) or auto: device if the set fits.
        data_workers: processes that decode images for the workers pipeline; default: one for each core but one.
    """

    title = "data"

    dataset: str | None = None
    data_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_train: str | None = None
    split_test: str | None = None
    cache_dir: str | None = None
    offline: bool = False
    streaming: bool = False
    train_fraction: float = 1.0
    exclude_classes: list[int] = field(default_factory=list)
    binary: list[int] = field(default_factory=list)
    val_fraction: float = 0.0
    image_size: int | None = None
    augment: Literal["crop", "resized_crop"] | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    cutout: int = 0
    aa: Literal["none", "randaugment", "trivialaugment"] = "none"
    reprob: float = 0.0
    pipeline: Literal["auto", "device", "workers"] = "auto"
    data_workers: int | None = None

    def flags(self) -> str:
        """The flags that say which images and classes there are, beside --dataset, for a command that goes on from a
        run; a space before each."""
        given = {name: [quote(getattr(self, name))] for name in OF_THE_HUB if getattr(self, name) is not None}
        given |= {"exclude_classes": self.exclude_classes, "binary": self.binary}
        return "".join(f" --{name} {' '.join(map(str, words))}" for name, words in given.items() if words)
