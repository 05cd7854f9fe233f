"""What keeping a JPEG as it came saves beside keeping its pixels: bytes, and processor time.

    python benchmarks/kept_jpegs.py --images 1000 --side 224 --quality 75 --rounds 5

Images are pieces of the two photographs that come with scikit-learn, all different. Each way of
keeping them does what a front does with an answered image: it comes from the process of the models
pickled, waits, and is written with others into a file of the log. Reading is what an update does.
"""

from __future__ import annotations

import io
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from common import set_up, table, write
from PIL import Image
from sklearn.datasets import load_sample_images

from lifelong_ray.config import ImageConfig
from lifelong_ray.feedback import CleanImage, SentImage
from lifelong_ray.feedback.files import images_from_bytes, images_to_bytes
from lifelong_ray.feedback.jpeg import picture_alone

WAYS = ("pixels", "jpeg")
_PER_FILE = 100


def main(
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 1_000,
    side: Annotated[int, typer.Option(min=8, max=427, help="Of their squares, pixels.")] = 224,
    quality: Annotated[int, typer.Option(min=1, max=95, help="Of the JPEGs.")] = 75,
    rounds: Annotated[int, typer.Option(min=1, help="The median counts.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure both ways of keeping the same images."""
    found = measured(photographs(images, side, quality), rounds)
    print(
        table(
            ("per image", *WAYS),
            [(what, *(f"{value:,.0f}" for value in values)) for what, values in found.items()],
        )
    )
    report = {what: dict(zip(WAYS, values, strict=True)) for what, values in found.items()}
    setup = set_up(num_images=images, side_px=side, quality=quality, rounds=rounds)
    write(out, {"setup": setup, "per_image": report})


def photographs(number: int, side: int, quality: int) -> list[bytes]:
    """Pieces of two photographs, each as a JPEG."""
    rng = np.random.default_rng(0)
    whole = load_sample_images().images
    jpegs = []
    for i in range(number):
        photograph = whole[i % len(whole)]
        top, left = (rng.integers(0, size - side + 1) for size in photograph.shape[:2])
        buffer = io.BytesIO()
        piece = Image.fromarray(photograph[top : top + side, left : left + side])
        piece.save(buffer, "JPEG", quality=quality)
        jpegs.append(buffer.getvalue())
    return jpegs


def measured(jpegs: Sequence[bytes], rounds: int) -> dict[str, tuple[float, float]]:
    """By what it is, the figure for pixels and for JPEGs, per image."""
    as_jpeg = [SentImage(jpeg, None, ImageConfig()).clean() for jpeg in jpegs]
    as_pixels = [CleanImage.of(image.pixels) for image in as_jpeg]
    ways = as_pixels, as_jpeg

    def each(figure: Callable[[Sequence[CleanImage]], float]) -> tuple[float, float]:
        rows = [[figure(images) / len(jpegs) for images in ways] for _ in range(rounds)]
        pixels, jpeg = (statistics.median(column) for column in zip(*rows, strict=True))
        return pixels, jpeg

    files = [_files(images) for images in ways]
    sent = float(np.mean([len(jpeg) for jpeg in jpegs]))
    cut_us = each(lambda _: _us(lambda: [picture_alone(jpeg) for jpeg in jpegs]))[1]
    return {
        "sent_bytes": (sent, sent),
        "cut_us": (0.0, cut_us),
        "between_processes_bytes": each(lambda images: sum(len(_pickled(i)) for i in images)),
        "between_processes_us": each(lambda images: _us(lambda: [_there(i) for i in images])),
        "log_bytes": each(lambda images: sum(map(len, files[ways.index(images)]))),
        "log_write_us": each(lambda images: _us(lambda: _files(images))),
        "log_read_us": each(lambda images: _us(lambda: _read(files[ways.index(images)]))),
    }


def _us(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e6


def _pickled(image: CleanImage) -> bytes:
    return pickle.dumps(image, pickle.HIGHEST_PROTOCOL)


def _there(image: CleanImage) -> CleanImage:
    there: CleanImage = pickle.loads(_pickled(image))
    return there


def _files(images: Sequence[CleanImage]) -> list[bytes]:
    starts = range(0, len(images), _PER_FILE)
    return [images_to_bytes(images[start : start + _PER_FILE]) for start in starts]


def _read(files: Sequence[bytes]) -> None:
    for file in files:
        names = set(pq.read_table(pa.BufferReader(file), columns=["content_hash"])[0].to_pylist())
        for image in images_from_bytes(file, names).values():
            assert image.pixels.size


if __name__ == "__main__":
    typer.run(main)
