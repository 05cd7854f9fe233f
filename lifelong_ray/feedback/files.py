"""How the log lies in the store: names, columns, Parquet in and out.

Files are immutable micro-batches under ``log/<stream>/dt=YYYY-MM-DD/hour=HH/``, filed by the
time of writing. Each is serialised in memory and put in one piece, because streaming writers
publish what they have when they fail. Knows nothing of queues, snapshots or threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lifelong_ray.feedback.identity import uuid7
from lifelong_ray.feedback.images import CleanImage, decode_png
from lifelong_ray.types import Comparison, DataError, Feedback, Pixels, Prediction

RowStream = Literal["predictions", "feedback", "comparisons"]
Stream = RowStream | Literal["images"]
Row = Prediction | Feedback | Comparison
T = TypeVar("T", Prediction, Feedback, Comparison)

_ARROW = {
    "str": pa.string(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "FeedbackKind": pa.string(),
    "tuple[float, ...]": pa.list_(pa.float64()),
    "tuple[str, ...]": pa.list_(pa.string()),
}
_SCHEMAS = {
    record: pa.schema([(f.name, _ARROW[str(f.type)]) for f in fields(record)])
    for record in (Prediction, Feedback, Comparison)
}
_SIDES = ("height", "width", "channels")
_IMAGES = pa.schema(
    [
        ("content_hash", pa.string()),
        *((side, pa.int32()) for side in _SIDES),
        ("less_above", pa.binary()),
        ("jpeg", pa.binary()),
    ]
)
_IMAGES_COMPRESSION = {name: "none" if name == "jpeg" else "zstd" for name in _IMAGES.names}
_IMAGES_AS_PNG = pa.schema([("content_hash", pa.string()), ("png", pa.binary())])


def hour_prefix(stream: Stream, at_s: float) -> str:
    """Return the folder of an hour.

    >>> hour_prefix("feedback", 1_645_557_742.0)
    'log/feedback/dt=2022-02-22/hour=19/'
    """
    return datetime.fromtimestamp(at_s, UTC).strftime(f"log/{stream}/dt=%Y-%m-%d/hour=%H/")


def file_key(stream: Stream, writer_id: str, at_s: float) -> str:
    """Return a fresh key, later ones of a writer sorting later within an hour."""
    return f"{hour_prefix(stream, at_s)}{writer_id}-{uuid7(at_s)}.parquet"


def row_id(row: Row) -> str:
    """Return what tells a row from every other of its stream."""
    return row.feedback_id if isinstance(row, Feedback) else row.request_id


def rows_to_bytes(rows: Sequence[Row]) -> bytes:
    """Serialise rows of one kind.

    Raises:
        ValueError, TypeError: If a field does not hold what its type says.
    """
    schema = _SCHEMAS[type(rows[0])]
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return _to_bytes(pa.table(columns, schema=schema))


def rows_from_bytes(data: bytes, record: type[T]) -> Iterator[T]:
    """Read what `rows_to_bytes` wrote; raises `DataError` before the first row if damaged."""
    schema = _SCHEMAS[record]
    columns = [
        [tuple(value) for value in column] if pa.types.is_list(kind) else column
        for column, kind in zip(_from_bytes(data, schema), schema.types, strict=True)
    ]
    return (record(*values) for values in zip(*columns, strict=True))


def images_to_bytes(images: Sequence[CleanImage]) -> bytes:
    """Serialise images.

    A JPEG is stored as it is kept (benchmarks/kept_jpegs.py). Of other images every row of pixels
    is stored less the row above it, which is mostly near zero, and compressed with the file: about
    as small as PNG, in less than a tenth of the time to write it (benchmarks/image_log.py).
    """
    pixels = [image.pixels if image.jpeg is None else None for image in images]
    columns: dict[str, list[Any]] = {
        "content_hash": [image.content_hash for image in images],
        "less_above": [None if one is None else _less_above(one) for one in pixels],
        "jpeg": [image.jpeg for image in images],
    }
    for i, side in enumerate(_SIDES):
        columns[side] = [None if one is None else one.shape[i] for one in pixels]
    table = pa.table(columns, schema=_IMAGES)
    return _to_bytes(table, dictionary=False, compression=_IMAGES_COMPRESSION)


def images_from_bytes(data: bytes, wanted: set[str]) -> dict[str, CleanImage]:
    """Read the wanted images among what `images_to_bytes` wrote; JPEGs are not decoded.

    Raises:
        DataError: If the file is damaged.
    """
    columns = _column_names(data)
    as_png = "png" in columns  # as files of version 0.1 have them
    schema = _IMAGES_AS_PNG if as_png else pa.schema([f for f in _IMAGES if f.name in columns])
    kept = decode_png if as_png else _kept
    try:
        rows = zip(*_from_bytes(data, schema), strict=True)
        return {name: CleanImage(name, kept(*row)) for name, *row in rows if name in wanted}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"an image of the file is damaged: {error}") from None


def _less_above(pixels: Pixels) -> bytes:
    less_above = pixels.copy()
    less_above[1:] -= pixels[:-1]  # modulo 256
    return less_above.tobytes()


def _kept(
    height: int, width: int, channels: int, less_above: bytes, jpeg: bytes | None = None
) -> Pixels | bytes:
    if jpeg is not None:
        return jpeg
    rows = np.frombuffer(less_above, np.uint8).reshape(height, width, channels)
    return np.add.accumulate(rows, axis=0, dtype=np.uint8)


def _to_bytes(
    table: pa.Table, *, dictionary: bool = True, compression: str | dict[str, str] = "zstd"
) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=compression,
        write_page_checksum=True,
        use_dictionary=dictionary,
    )
    return bytes(sink.getvalue().to_pybytes())


def _column_names(data: bytes) -> list[str]:
    try:
        return list(pq.read_schema(pa.BufferReader(data)).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a whole Parquet file of the log: {error}") from None


def _from_bytes(data: bytes, schema: pa.Schema) -> list[list[Any]]:
    """Columns in the order of the schema."""
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(columns=schema.names).select(schema.names).cast(schema)
        return [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"not a whole Parquet file of the log: {error}") from None
