"""Untrusted bytes become clean pixels or a coded error."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lifelong_ray.config import ImageConfig
from lifelong_ray.feedback import (
    content_hash,
    decode_image,
    decode_png,
    encode_png,
    to_model_input,
)
from lifelong_ray.types import BadImageError, ConfigError, Pixels

LIMITS = ImageConfig()
RNG = np.random.default_rng(0)
COLOUR: Pixels = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY: Pixels = RNG.integers(0, 256, (9, 7, 1), dtype=np.uint8)
ANY_PIXELS = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))
)


def saved(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def refused(data: bytes, content_type: str | None = None, **limits: Any) -> tuple[str, int]:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, content_type, ImageConfig(**limits))
    return caught.value.code, caught.value.status


@pytest.mark.parametrize("pixels", [COLOUR, GREY])
def test_a_png_keeps_its_pixels(pixels: Pixels) -> None:
    decoded = decode_image(encode_png(pixels), "image/png", LIMITS)

    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
    ("file_format", "content_type"),
    [("JPEG", "image/jpeg"), ("JPEG", "image/jpg"), ("WEBP", "image/webp; q=1"), ("BMP", "")],
)
def test_every_accepted_format_decodes(file_format: str, content_type: str) -> None:
    data = saved(Image.fromarray(COLOUR), file_format)

    assert decode_image(data, content_type, LIMITS).shape == COLOUR.shape


def test_each_refusal_has_its_code() -> None:
    png = encode_png(COLOUR)

    assert refused(b"") == ("empty_body", 400)
    assert refused(png, max_bytes=10) == ("body_too_large", 413)
    assert refused(png, "text/html") == ("unsupported_media_type", 415)
    assert refused(saved(Image.fromarray(COLOUR), "GIF"), "image/gif") == (
        "unsupported_media_type",
        415,
    )
    assert refused(b"hello, world") == ("not_an_image", 400)
    assert refused(saved(Image.fromarray(COLOUR), "GIF")) == ("not_an_image", 400)
    assert refused(png[:-30]) == ("truncated_image", 400)
    assert refused(png, max_pixels=62) == ("too_many_pixels", 413)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (5_000, 5_000), (2**31 - 1, 1)])
def test_ten_gigapixels_are_refused_from_the_header_alone(width: int, height: int) -> None:
    assert refused(png_header(width, height)) == ("too_many_pixels", 413)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_cut_anywhere_is_refused_with_a_code(file_format: str) -> None:
    data = saved(Image.fromarray(COLOUR), file_format)

    codes = {refused(data[:end])[0] for end in range(1, len(data) - 20, 3)}

    assert codes <= {"not_an_image", "truncated_image"}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
    noise = bytearray(saved(Image.fromarray(COLOUR), file_format))
    for _ in range(data.draw(st.integers(1, 8))):
        noise[data.draw(st.integers(0, len(noise) - 1))] = data.draw(st.integers(0, 255))

    try:
        decoded = decode_image(bytes(noise), None, LIMITS)
    except BadImageError:
        return

    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3


def test_metadata_turns_the_picture_and_stays_behind() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "taken at home"
    data = saved(Image.fromarray(COLOUR), exif=exif) + b"trailing"

    decoded = decode_image(data, None, LIMITS)

    np.testing.assert_array_equal(decoded, np.rot90(COLOUR, -1))
    assert b"home" not in encode_png(decoded)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(COLOUR), exif=exif)

    decoded = decode_image(data, None, LIMITS)

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decoded, np.asarray(upright))


def test_the_same_grey_picture_has_one_hash_in_colour_and_in_grey() -> None:
    as_colour = saved(Image.fromarray(np.repeat(GREY, 3, axis=2)))

    decoded = decode_image(as_colour, None, LIMITS)

    assert content_hash(decoded) == content_hash(GREY)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_grey_or_colour(mode: str) -> None:
    data = saved(Image.fromarray(COLOUR).convert(mode))

    assert decode_image(data, None, LIMITS).shape in {(9, 7, 1), (9, 7, 3)}


def test_transparent_parts_are_white() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[0, 0] = (255, 0, 0, 255)

    decoded = decode_image(saved(Image.fromarray(clear)), None, LIMITS)

    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[1, 1].tolist() == [255, 255, 255]


def test_sixteen_bits_become_eight() -> None:
    wide = np.array([[0, 255], [256, 65_535]], np.uint16)

    decoded = decode_image(saved(Image.fromarray(wide)), None, LIMITS)

    assert decoded[:, :, 0].tolist() == [[0, 0], [1, 255]]


def test_an_unknown_format_in_the_settings_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="NOPE"):
        decode_image(b"x", None, ImageConfig(formats=("NOPE",)))


@given(pixels=ANY_PIXELS)
@settings(max_examples=40, deadline=None)
def test_stored_images_come_back_exactly(pixels: Pixels) -> None:
    back = decode_png(encode_png(pixels))

    np.testing.assert_array_equal(back, pixels)
    assert content_hash(back) == content_hash(pixels)


@given(pixels=ANY_PIXELS, size=st.integers(1, 12), channels=st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_models_get_one_shape_whatever_came(pixels: Pixels, size: int, channels: int) -> None:
    first = to_model_input(pixels, size, channels)
    second = to_model_input(pixels, size, channels)

    assert first.shape == (channels, size, size)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    np.testing.assert_array_equal(first, second)


def test_an_image_of_the_right_size_reaches_the_model_untouched() -> None:
    square: Pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)

    np.testing.assert_array_equal(to_model_input(square, 8, 3), square.transpose(2, 0, 1))
    np.testing.assert_array_equal(to_model_input(square[..., :1], 8, 3)[2], square[..., 0])


@pytest.mark.parametrize("bad", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1), np.float32)])
def test_arrays_that_are_no_pixels_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="uint8 is wanted"):
        content_hash(bad)
    with pytest.raises(ValueError, match="channels is 2"):
        to_model_input(GREY, 4, 2)
