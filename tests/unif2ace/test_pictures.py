"""Pictures as they come from phones, scanners and the web: one array of colours, the right way up."""

import io

import numpy as np
import pytest
from PIL import Image

from unif2ace.errors import UserError
from unif2ace.pictures import decode, read_png, sheet

HALVES = np.zeros((8, 16, 3), np.uint8)
HALVES[:, :8, 0] = 255


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_every_format_that_is_promised(kind):
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    assert np.abs(decode(file_of(Image.fromarray(HALVES), kind, **exact)).astype(int) - HALVES).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_turned_as_it_was_held(kind):
    turned = Image.Exif()
    turned[0x112] = 6
    picture = decode(file_of(Image.fromarray(HALVES), kind, exif=turned))
    assert picture.shape == (16, 8, 3) and picture[0, 0, 0] > 240 and picture[15, 0, 0] < 15


def test_transparent_parts_are_white_whatever_lies_under_them():
    hidden = np.dstack([HALVES, np.full((8, 16), 255, np.uint8)])
    hidden[:, 8:] = [0, 255, 0, 0]
    palette = Image.fromarray(HALVES).quantize(2)
    black = palette.getpixel((15, 0))
    for content in (file_of(Image.fromarray(hidden)), file_of(palette, transparency=black)):
        seen = decode(content)
        assert (seen[:, 8:] == 255).all() and (seen[:, :8, 0] == 255).all() and (seen[:, :8, 1:] == 0).all()
    half = hidden.copy()
    half[..., 3] = 128
    assert np.abs(decode(file_of(Image.fromarray(half)))[0, 0].astype(int) - [255, 127, 127]).max() <= 1


def test_other_modes():
    grey = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    assert np.array_equal(decode(file_of(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, axis=2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.abs(decode(file_of(deep))[..., 0].astype(int) - grey).max() <= 1
    assert decode(file_of(Image.fromarray(grey).convert("1"))).max() == 255
    assert decode(file_of(Image.fromarray(HALVES).convert("CMYK"), "JPEG"))[0, 0, 0] > 250
    assert decode(file_of(Image.fromarray(grey[:1, :1]))).shape == (1, 1, 3)


@pytest.mark.parametrize("shape", [(1, 101), (3000, 29)])
def test_a_line_is_no_picture_of_a_face(shape):
    with pytest.raises(ValueError, match=rf"of {shape[1]} x {shape[0]} pixels, too thin to show a face"):
        decode(file_of(Image.fromarray(np.zeros(shape, np.uint8))))
    assert decode(file_of(Image.fromarray(np.zeros((1, 100), np.uint8)))).shape == (1, 100, 3)


@pytest.mark.parametrize("cut", [0, 10, 40])
def test_damaged(cut):
    transparent = np.random.default_rng(0).integers(0, 255, (40, 40, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="not a picture"):
        decode(file_of(Image.fromarray(transparent))[:cut] if cut else b"\x89PNG no")


def test_a_painting_is_read_or_named(tmp_path):
    path, pixels = tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_png(path), pixels)
    whole = path.read_bytes()
    huge = whole[:16] + (2**20).to_bytes(4, "big") * 2 + whole[24:]
    for content in (whole[:60], whole[:40] + b"?" * 40, b"words", b"", huge, file_of(Image.fromarray(pixels), "JPEG")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.png is damaged or no picture.*: delete it"):
            read_png(path)
    path.unlink()
    with pytest.raises(UserError, match=r"x\.png is missing"):
        read_png(path)


def test_a_sheet_keeps_the_order_and_fills_up_with_white():
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    whole = sheet(images, 3)
    assert whole.shape == (8, 12, 3)
    assert whole[::4, ::4, 0].tolist() == [[10, 20, 30], [40, 50, 255]]
