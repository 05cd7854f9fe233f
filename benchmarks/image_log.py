"""Size and time of an image in the log: rows less the row above, PNG, and the pixels as they are.

    python benchmarks/image_log.py --data fashion_mnist.npz --data cifar100.npz \
        --out benchmarks/results/image_log.json

Each way makes one Parquet file, compressed with zstd, of the same images, and reads it again; the
ways take turns. `rows` is what the log writes, `png` what files of version 0.1 have, `plain` the
control without either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from common import data_config, load_arrays, set_up, table, write

from lifelong_ray.feedback import CleanImage, content_hash, decode_png, encode_png
from lifelong_ray.feedback.files import images_from_bytes, images_to_bytes
from lifelong_ray.types import Pixels

_COLUMNS = ("data", "way", "bytes", "writing, us", "reading, us")
Images = Mapping[str, Pixels]


@dataclass(frozen=True)
class Way:
    """A way to keep images in a file.

    Attributes:
        to_bytes: Makes the file.
        from_bytes: Reads it; is told the images, for their shapes.
    """

    to_bytes: Callable[[Images], bytes]
    from_bytes: Callable[[bytes, Images], dict[str, Pixels]]


def main(
    data: Annotated[list[str], typer.Option(help="An .npz, or what else data.source takes.")],
    num_images: Annotated[int, typer.Option(help="In a file.")] = 1_000,
    rounds: Annotated[int, typer.Option(help="Turns of every way.")] = 15,
    seed: Annotated[int, typer.Option(help="Chooses the images.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every way on every data set."""
    results: dict[str, Any] = {}
    for source in data:
        images = chosen(source, num_images, seed)
        results[Path(source).name] = {
            "images": len(images),
            "pixel_bytes": next(iter(images.values())).nbytes,
            "ways": measure(images, rounds),
        }
    rows = [
        (name, way, its["bytes_per_image"], its["write_us_median"], its["read_us_median"])
        for name, found in results.items()
        for way, its in found["ways"].items()
    ]
    print(table(_COLUMNS, rows))
    write(out, {"setup": set_up(num_images=num_images, rounds=rounds), "data": results})


def chosen(source: str, number: int, seed: int) -> dict[str, Pixels]:
    """Some images, by content hash."""
    images = load_arrays(data_config(source, 1.0)).train_images
    order = np.random.default_rng(seed).permutation(len(images))[:number]
    return {content_hash(image): image for image in np.ascontiguousarray(images[order])}


def measure(images: Images, rounds: int) -> dict[str, dict[str, float]]:
    """Bytes and median microseconds of an image, by way.

    Raises:
        RuntimeError: If a way does not give the images back.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    sizes = {}
    for _ in range(rounds):
        for name, way in WAYS.items():
            began_s = time.perf_counter()
            file = way.to_bytes(images)
            written_s = time.perf_counter()
            found = way.from_bytes(file, images)
            read_s = time.perf_counter()
            taken[name].append((written_s - began_s, read_s - written_s))
            sizes[name] = len(file)
            if any(not np.array_equal(found[key], image) for key, image in images.items()):
                raise RuntimeError(f"{name} does not give every image back")
    return {
        name: {
            "bytes_per_image": sizes[name] / len(images),
            "write_us_median": 1e6 * statistics.median(w for w, _ in times) / len(images),
            "read_us_median": 1e6 * statistics.median(r for _, r in times) / len(images),
        }
        for name, times in taken.items()
    }


def _rows_to_bytes(images: Images) -> bytes:
    return images_to_bytes([CleanImage(name, image) for name, image in images.items()])


def _rows_from_bytes(file: bytes, images: Images) -> dict[str, Pixels]:
    return {name: one.pixels for name, one in images_from_bytes(file, set(images)).items()}


def _png_to_bytes(images: Images) -> bytes:
    return _to_parquet(images, [encode_png(image) for image in images.values()])


def _png_from_bytes(file: bytes, _: Images) -> dict[str, Pixels]:
    return {name: decode_png(data) for name, data in _from_parquet(file)}


def _plain_to_bytes(images: Images) -> bytes:
    return _to_parquet(images, [image.tobytes() for image in images.values()])


def _plain_from_bytes(file: bytes, images: Images) -> dict[str, Pixels]:
    return {
        name: np.frombuffer(data, np.uint8).reshape(images[name].shape)
        for name, data in _from_parquet(file)
    }


def _to_parquet(images: Images, contents: list[bytes]) -> bytes:
    columns = pa.table({"content_hash": list(images), "image": contents})
    sink = pa.BufferOutputStream()
    pq.write_table(
        columns, sink, compression="zstd", write_page_checksum=True, use_dictionary=False
    )
    return bytes(sink.getvalue().to_pybytes())


def _from_parquet(file: bytes) -> list[tuple[str, bytes]]:
    columns = pq.read_table(pa.BufferReader(file), page_checksum_verification=True)
    names, contents = (columns[name].to_pylist() for name in ("content_hash", "image"))
    return list(zip(names, contents, strict=True))


WAYS = {
    "rows": Way(_rows_to_bytes, _rows_from_bytes),
    "png": Way(_png_to_bytes, _png_from_bytes),
    "plain": Way(_plain_to_bytes, _plain_from_bytes),
}


if __name__ == "__main__":
    typer.run(main)
