"""Real photographs: how they lie, of which depth and colours they are, what is broken."""

import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from common import UserError
from data.datasets import load_images
from data.decode import from_cell, read_rgb
from data.pipeline import Pipeline
from engine.config import RunConfig


def parquet(folder: Path, cells: list[bytes]) -> str:
    rows = [{"bytes": cell, "path": None} for cell in cells]
    table = pyarrow.table({"image": rows, "label": [index % 2 for index in range(len(rows))]})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    return f"parquet:{folder}/x.parquet"


def read(cell: bytes) -> np.ndarray:
    return np.asarray(read_rgb(lambda: from_cell(cell), "x"))


def picture(values: np.ndarray, mode: str | None = None, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


GREY = np.array([[0, 60], [120, 240]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY // 2, GREY // 3], -1)
ALPHA = np.full((2, 2, 1), 7, dtype=np.uint8)
WIDE = np.array([[0, 200], [255, 65535]], dtype=np.uint16)  # its upper halves are 0, 0, 0 and 255
PALETTE = np.array([[0, 1], [2, 3]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (picture(GREY), np.stack([GREY] * 3)),
        (picture(np.concatenate([GREY[..., None], ALPHA], -1)), np.stack([GREY] * 3)),  # grey and transparency
        (picture(COLOUR), COLOUR.transpose(2, 0, 1)),
        (picture(np.concatenate([COLOUR, ALPHA], -1)), COLOUR.transpose(2, 0, 1)),  # colour and transparency
        (picture(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3)),  # 16 bits: 257 takes 255 to 65535
        (picture(WIDE), np.stack([np.round(WIDE * (255 / 65535))] * 3)),
        (picture(WIDE, kind="tiff"), np.stack([np.round(WIDE * (255 / 65535))] * 3)),
        (picture(GREY > 100), np.stack([255 * (GREY > 100)] * 3)),  # 1 bit
    ],
    ids=["1 channel", "2 channels", "3 channels", "4 channels", "16 bits", "between", "tiff", "1 bit"],
)
def test_images_of_every_depth_become_8_bit_rgb(tmp_path, cell, expected):
    data = load_images(parquet(tmp_path, [cell] * 10))
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape == (8, 3, 2, 2)
    assert data.test.images[0].tolist() == expected.tolist()


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(PALETTE, "P")
    image.putpalette([9, 8, 7, 50, 60, 70, 0, 0, 255, 255, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=0)
    data = load_images(parquet(tmp_path, [buffer.getvalue()] * 10))
    assert data.test.images[0].permute(1, 2, 0).tolist() == [[[9, 8, 7], [50, 60, 70]], [[0, 0, 255], [255, 0, 0]]]


def test_floating_point_images_are_refused_by_name(tmp_path):
    cells = [picture(GREY)] * 4 + [picture(GREY.astype(np.float32), kind="tiff")] + [picture(GREY)] * 5
    with pytest.raises(UserError, match=r"x\.parquet row 4: its pixels are floating-point numbers"):
        load_images(parquet(tmp_path, cells))


UPRIGHT = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
STORED = {  # EXIF 2.32, tag 274: which side of the scene the first row and the first column of the file are
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: np.rot90(UPRIGHT, 1),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: np.rot90(UPRIGHT, -1),  # left, bottom
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(pixels: np.ndarray, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_picture_lies_as_its_exif_says(kind):
    for orientation, pixels in STORED.items():
        assert read(turned(pixels, orientation, kind)).tolist() == UPRIGHT.tolist(), orientation


@pytest.mark.parametrize("place", ["device", "workers"])
def test_a_lying_photograph_trains_like_the_upright_one(tmp_path, place):
    """In memory (resized to a square) and as photographs, whose crops depend on which side is the longer."""
    noise = np.random.default_rng(1).integers(0, 256, (10, 30, 20, 3), dtype=np.uint8)
    found = []
    for orientation, turns in ((1, 0), (6, 1)):
        folder = tmp_path / str(orientation)
        folder.mkdir()
        cells = [turned(np.rot90(pixels, turns), orientation, "PNG") for pixels in noise]
        augment = "crop" if place == "device" else "resized_crop"
        config = RunConfig(cache_dir=str(tmp_path / "cache"), pipeline=place, data_workers=0, augment=augment)
        data = load_images(parquet(folder, cells), 16, False, config)
        batches = Pipeline(data, config, torch.device("cpu"))
        found.append([batch.images for batch in batches.training(data.train, 4).epoch(0)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("exif", [b"Exif\0\0no header", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01", b"Exif"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_cannot_be_read_of_exif_turns_nothing(kind, exif):
    image = Image.fromarray(UPRIGHT)
    assert np.array_equal(read(saved(image, kind, exif=exif)), read(saved(image, kind)))


@pytest.mark.parametrize(("kind", "near"), [("TIFF", 1), ("JPEG", 3)])
def test_inks_become_the_light_they_leave(kind, near):
    """CMYK by (1 - ink)(1 - black). A JPEG of Adobe's holds the complement of each, and says so."""
    inks = (200, 50, 0, 40)
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    pixels = read(saved(Image.new("CMYK", (8, 8), inks), kind))
    assert pixels.shape == (8, 8, 3) and np.abs(pixels - expected).max() <= near


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_of_several_pictures_in_a_file_it_is_the_first(kind, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    cell = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(cell)).n_frames == 3
    assert np.unique(read(cell).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_alpha_is_dropped_whatever_it_hides():
    """The colours of the file count, also where nothing of them would be seen."""
    hidden = np.concatenate([UPRIGHT, np.zeros((4, 6, 1), dtype=np.uint8)], -1)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert read(saved(Image.fromarray(hidden), kind, **options)).tolist() == UPRIGHT.tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_one_line_that_names_it(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), kind)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.jpg").write_bytes(whole)
    (tmp_path / "dog" / "3.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"^--dataset: cannot read the image .*/dog/3\.jpg: [^\n]+$"):
        load_images(f"folder:{tmp_path}")
