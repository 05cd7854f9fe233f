"""A JPEG is kept as it came, less all that its picture does not need."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lifelong_ray.config import ImageConfig
from lifelong_ray.feedback import CleanImage, SentImage, content_hash, decode_image, encode_png
from lifelong_ray.feedback.images import decode_jpeg
from lifelong_ray.feedback.jpeg import picture_alone
from lifelong_ray.types import BadImageError, Pixels

LIMITS = ImageConfig()
SECRET = b"52.5163 N 13.3777 E, taken at home"


def picture(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def after_start(data: bytes, more: bytes) -> bytes:
    return data[:2] + more + data[2:]


def before_each_scan(data: bytes, more: bytes) -> bytes:
    return data.replace(b"\xff\xda\x00", more + b"\xff\xda\x00")


def without_jfif(data: bytes) -> bytes:
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET.decode()
    return saved(exif=exif)


def xmp(orientation: int) -> bytes:
    text = f'<rdf:Description tiff:Orientation="{orientation}" about="{SECRET.decode()}"/>'
    return saved(xmp=text.encode())


def adobe(transform: int) -> bytes:
    """Three components that are RGB (0) or YCbCr (1), as only Adobe's segment says."""
    more = segment(0xEE, b"Adobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + SECRET)
    return after_start(without_jfif(saved()), more)


def components_named(names: bytes) -> bytes:
    data = without_jfif(saved(quality=90))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    found = bytearray(data)
    for i, name in enumerate(names):
        found[frame + 10 + 3 * i] = found[scan + 5 + 2 * i] = name
    return bytes(found)


def grey_as_colour() -> Image.Image:
    return Image.merge("RGB", [picture("L")] * 3)


def mpo() -> bytes:
    return saved(format="MPO", save_all=True, append_images=[picture().rotate(180)])


KEPT: dict[str, Callable[[], bytes]] = {
    "baseline": saved,
    "optimised": lambda: saved(optimize=True),
    "progressive": lambda: saved(progressive=True),
    "4:4:4": lambda: saved(subsampling="4:4:4"),
    "4:2:2": lambda: saved(subsampling="4:2:2"),
    "4:2:0": lambda: saved(subsampling="4:2:0"),
    "RGB inside": lambda: saved(keep_rgb=True),
    "best quality": lambda: saved(quality=100, subsampling=0),
    "grey": lambda: saved(picture("L")),
    "progressive grey": lambda: saved(picture("L"), progressive=True),
    "colour that is grey": lambda: saved(grey_as_colour()),
    "restart intervals": lambda: saved(restart_marker_blocks=3),
    "restart rows, progressive": lambda: saved(restart_marker_rows=1, progressive=True),
    "upright by EXIF": lambda: oriented(1),
    "upright by XMP": lambda: xmp(1),
    "profile": lambda: saved(icc_profile=SECRET * 4_000),
    "comment": lambda: saved(comment=SECRET),
    "preview": lambda: after_start(saved(), segment(0xE0, b"JFXX\0\x10" + saved(picture("L")))),
    "comments between scans": lambda: before_each_scan(
        saved(progressive=True), segment(0xFE, SECRET) + segment(0xE0, b"JFIF\0" + SECRET)
    ),
    "no JFIF": lambda: without_jfif(saved()),
    "no JFIF, RGB by its components": lambda: components_named(b"RGB"),
    "no JFIF, odd components": lambda: components_named(b"\x05\x06\x07"),
    "Adobe RGB": lambda: adobe(0),
    "Adobe YCbCr": lambda: adobe(1),
    "Adobe of an unknown kind": lambda: adobe(9),
    "JFIF too short to count": lambda: after_start(adobe(0), segment(0xE0, b"JFIF\0\1\1")),
    "several pictures": mpo,
    "trailing bytes": lambda: saved() + SECRET,
    "fill bytes": lambda: before_each_scan(saved()[:-2], b"\xff" * 9) + b"\xff\xff\xff\xd9",
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_decodes_to_the_pixels_that_were_named(kind: str) -> None:
    data = KEPT[kind]()
    pixels = decode_image(data, None, LIMITS)

    clean = SentImage(data, "image/jpeg", LIMITS).clean()

    assert clean.jpeg is not None
    assert clean.content_hash == content_hash(pixels)
    np.testing.assert_array_equal(clean.pixels, pixels)


@pytest.mark.parametrize("kind", KEPT)
def test_nothing_but_the_picture_is_kept(kind: str) -> None:
    data = KEPT[kind]()

    kept = picture_alone(data)

    assert kept is not None
    assert len(kept) <= len(data)
    assert SECRET[:12] not in kept
    assert kept.count(b"\xff\xd8") == kept.count(b"\xff\xd9") == 1
    found = Image.open(io.BytesIO(kept))
    assert set(found.info) <= {
        "jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi",
        "adobe", "adobe_transform", "progressive", "progression",
    }  # fmt: skip
    assert picture_alone(kept) == kept


@pytest.mark.parametrize(
    "data",
    [
        saved(picture("CMYK")),
        before_each_scan(saved(), segment(0xCC, b"\0\0")),
        saved().replace(b"\xff\xc0", b"\xff\xc9"),
        saved().replace(b"\xff\xc0", b"\xff\xc3"),
        saved().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        before_each_scan(saved(), segment(0xDC, b"\0\x20")),
        before_each_scan(saved(), b"\0"),
        before_each_scan(saved(), b"\xff\xd0"),
        before_each_scan(saved(), b"\xff\xfe\x00\x01"),
        after_start(saved(), b"\xff\xd8"),
        saved() .replace(b"\xff\xd9", b""),
        saved()[:400],
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8",
        b"\xff\xd8\xff\xda\x00",
        encode_png(np.zeros((2, 2, 1), np.uint8)),
        b"",
    ],
    ids=[
        "CMYK", "arithmetic conditioning", "arithmetic coding", "lossless", "12 bits",
        "lines later", "junk", "a restart without a scan", "a length of 1", "a second start",
        "no end", "cut short", "no picture", "only a start", "no length", "PNG", "nothing",
    ],
)  # fmt: skip
def test_unusual_jpegs_are_left_to_their_pixels(data: bytes) -> None:
    assert picture_alone(data) is None


@pytest.mark.parametrize(
    "data",
    [oriented(6), xmp(6), saved(picture("CMYK")), saved(picture(size=(4, 3)))],
    ids=["turned by EXIF", "turned by XMP", "CMYK", "smaller as pixels"],
)
def test_pixels_are_kept_where_a_jpeg_would_not_do(data: bytes) -> None:
    clean = SentImage(data, None, LIMITS).clean()

    assert clean.jpeg is None
    np.testing.assert_array_equal(clean.pixels, decode_image(data, None, LIMITS))


def test_only_the_jpeg_goes_to_another_process() -> None:
    data = saved(picture(size=(224, 224)))
    sent = SentImage(data, "image/jpeg", LIMITS)
    there = sent.model_input(32, 3)

    message = pickle.dumps(sent.clean())
    here = SentImage.of(pickle.loads(message))

    assert len(message) < len(data) + 300 < 224 * 224 * 3
    assert sent.clean().size_bytes <= len(data)
    assert not here.is_decoded
    np.testing.assert_array_equal(here.model_input(32, 3), there)


def test_a_damaged_jpeg_is_a_value_error() -> None:
    kept = picture_alone(saved())
    assert kept is not None

    for bad in (b"", kept[:300], encode_png(np.zeros((2, 2, 1), np.uint8))):
        with pytest.raises(ValueError, match="damaged"):
            _ = CleanImage("name", bad).pixels


def decoded(data: bytes) -> Pixels | None:
    try:
        return decode_image(data, None, LIMITS)
    except BadImageError:
        return None


@settings(max_examples=600, deadline=None)
@given(choice=st.data())
def test_cut_and_flipped_bytes_never_become_another_picture(choice: st.DataObject) -> None:
    noise = bytearray(KEPT[choice.draw(st.sampled_from(sorted(KEPT)))]())
    for _ in range(choice.draw(st.integers(0, 6))):
        start = choice.draw(st.integers(0, len(noise) - 1))
        change = choice.draw(st.sampled_from(["flip", "mark", "cut", "double"]))
        end = min(len(noise), start + choice.draw(st.integers(1, 40)))
        if change == "flip":
            noise[start] = choice.draw(st.integers(0, 255))
        elif change == "mark":
            noise[start : start + 2] = bytes([0xFF, choice.draw(st.integers(0xC0, 0xFF))])
        elif change == "cut" and end - start < len(noise):
            del noise[start:end]
        else:
            noise[start:start] = noise[start:end]
    data = bytes(noise)

    kept = picture_alone(data)
    pixels = decoded(data)

    if kept is not None and pixels is not None and SentImage(data, None, LIMITS).clean().jpeg:
        np.testing.assert_array_equal(decode_jpeg(kept), pixels)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_any_bytes_are_taken(head: bytes, tail: bytes) -> None:
    for data in (head, b"\xff\xd8" + head, after_start(saved(), head), saved() + tail):
        kept = picture_alone(data)
        assert kept is None or picture_alone(kept) == kept


@pytest.mark.parametrize(
    "piece",
    [b"\xff", b"\xff\xd0", b"\xff\0", b"\xff\xff\0", b"\xff\xfe\0\2", b"\xff\xda\0\2"],
)
def test_ten_million_hostile_bytes_take_no_longer_than_reading_them(piece: bytes) -> None:
    data = saved()
    scan = data.index(b"\xff\xda") + 14
    much = piece * (10_000_000 // len(piece))
    started = process_time()

    for hostile in (b"\xff\xd8" + much, data[:scan] + much, data[:scan] + much + b"\xff\xd9"):
        picture_alone(hostile)

    assert process_time() - started < 3.0
