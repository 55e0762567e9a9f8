"""One encoded picture -> one RGB image, or an error that names it."""

import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common import UserError

# Pillow goes by a file's content, not by its name, and runs Ghostscript for some formats that nobody trains on.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000")
warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata, in images that can be read
UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)
TURNS = {  # EXIF orientation, what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(open_image: Callable[[], Image.Image], where: str, side: int | None = None) -> Image.Image:
    """The image as 8-bit RGB, upright, resized to `side` x `side` where one is given.

    Grey images get three equal channels, transparency is dropped, 16-bit grey is scaled by 255 / 65535; of an
    animation or of several pages it is the first.

    Raises:
        UserError: an image that cannot be read, naming `where` it is.
    """
    try:
        opened = open_image()
        image = _to_rgb(opened)
    except UNREADABLE as error:
        # Pillow's own words would name an object in memory.
        reason = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"--dataset: cannot read the image {where}: {reason}") from None
    turn = _turn(opened)
    if turn is not None:
        image = image.transpose(turn)
    if side and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return image


def open_file(path: str) -> Image.Image:
    """Open an image file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
        raise ValueError("it is no regular file")
    return Image.open(path, formats=FORMATS)


def from_cell(cell: object, folder: str | None = None) -> Image.Image:
    """Open a cell of an image column: the encoded bytes, or a struct of `bytes` and `path`.

    A path is followed only into `folder`, where the user said that the images are: a fetched data set could name
    any file of this machine.
    """
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path is not None and folder is not None:
        if Path(folder).resolve() in Path(path).resolve().parents:
            return open_file(path)
        raise ValueError(f"the cell's path ({path}) leads out of {folder}")
    if data is None:
        raise ValueError("the cell holds no image" if path is None else f"the cell holds a path ({path}), not an image")
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255 to white
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels do not fit 16 bits")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # x 255 / 65535, rounded
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a decoded image upright; None where nothing says that it lies. (Pillow turns TIFF itself.)"""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many kinds: where metadata cannot be read, the pixels still could
        return None
