"""Images in files of the log come back pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from lifelong_ray.config import ImageConfig
from lifelong_ray.feedback import CleanImage, SentImage, encode_png
from lifelong_ray.feedback.files import images_from_bytes, images_to_bytes
from lifelong_ray.types import DataError, Pixels

SIDES = st.integers(1, 9)
IMAGES = st.tuples(SIDES, SIDES, st.sampled_from([1, 3])).flatmap(lambda s: arrays(np.uint8, s))


@given(st.lists(IMAGES, min_size=1, max_size=5))
def test_images_of_any_size_come_back_as_they_were(images: list[Pixels]) -> None:
    named = {f"hash-{i}": image for i, image in enumerate(images)}
    clean = [CleanImage(name, image) for name, image in named.items()]

    found = images_from_bytes(images_to_bytes(clean), set(named))

    assert found.keys() == named.keys()
    for name, image in named.items():
        assert found[name].content_hash == name
        assert found[name].pixels.dtype == np.uint8
        assert np.array_equal(found[name].pixels, image)


def test_only_the_wanted_images_are_read() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    data = images_to_bytes([CleanImage(name, image) for name in "ab"])

    assert images_from_bytes(data, {"b", "c"}).keys() == {"b"}


def test_files_that_hold_png_are_read_as_ever() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    file = io.BytesIO()
    table = {"content_hash": ["a", "b"], "png": [encode_png(image), b"damaged, but not wanted"]}
    pq.write_table(pa.table(table), file)

    assert np.array_equal(images_from_bytes(file.getvalue(), {"a"})["a"].pixels, image)
    with pytest.raises(DataError, match="damaged"):
        images_from_bytes(file.getvalue(), {"b"})


def as_jpeg(pixels: Pixels) -> tuple[bytes, CleanImage]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue(), SentImage(file.getvalue(), None, ImageConfig()).clean()


def test_a_jpeg_is_stored_as_it_is_kept_beside_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    jpeg, clean = as_jpeg(noise)

    data = images_to_bytes([clean, CleanImage("pixels", noise)])
    found = images_from_bytes(data, {clean.content_hash, "pixels"})

    assert jpeg in data
    assert found[clean.content_hash].jpeg == clean.jpeg == jpeg
    assert np.array_equal(found["pixels"].pixels, noise)


def test_files_from_before_jpegs_were_kept_are_read_as_ever() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    table = pq.read_table(pa.BufferReader(images_to_bytes([CleanImage("a", image)])))
    file = io.BytesIO()
    pq.write_table(table.drop_columns(["jpeg"]), file)

    assert np.array_equal(images_from_bytes(file.getvalue(), {"a"})["a"].pixels, image)


def test_an_image_without_pixels_or_jpeg_is_damaged() -> None:
    table = pq.read_table(pa.BufferReader(images_to_bytes([CleanImage("a", b"jpeg")])))
    nothing = table.set_column(5, "jpeg", pa.nulls(1, pa.binary()))
    file = io.BytesIO()
    pq.write_table(nothing, file)

    with pytest.raises(DataError, match="damaged"):
        images_from_bytes(file.getvalue(), {"a"})


def test_a_file_cut_short_is_damaged() -> None:
    data = images_to_bytes(
        [CleanImage("a", np.zeros((4, 4, 1), np.uint8)), CleanImage("b", b"jpeg")]
    )

    for length in range(0, len(data), 7):
        with pytest.raises(DataError):
            images_from_bytes(data[:length], {"a"})


def test_pixels_that_do_not_fit_their_sides_are_damaged() -> None:
    file = io.BytesIO()
    columns = {"content_hash": ["a"], "height": [2], "width": [2], "channels": [3]}
    types = {"height": pa.int32(), "width": pa.int32(), "channels": pa.int32()}
    table = pa.table({**columns, "less_above": [b"short"]})
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, file)

    with pytest.raises(DataError, match="damaged"):
        images_from_bytes(file.getvalue(), {"a"})
