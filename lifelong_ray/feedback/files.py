"""How the log lies in the store: names, columns, Parquet in and out.

Files are immutable micro-batches under ``log/<stream>/dt=YYYY-MM-DD/hour=HH/``, filed by the
time of writing. Each is serialised in memory and put in one piece, because streaming writers
publish what they have when they fail. Knows nothing of queues, snapshots or threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lifelong_ray.feedback.identity import uuid7
from lifelong_ray.feedback.images import decode_png
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
    ]
)
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


def images_to_bytes(images: Mapping[str, Pixels]) -> bytes:
    """Serialise images by content hash.

    Every row of pixels is stored less the row above it, which is mostly near zero, and compressed
    with the file: about as small as PNG, in less than a tenth of the time to write it
    (benchmarks/image_log.py).
    """
    columns: dict[str, list[Any]] = {"content_hash": list(images), "less_above": []}
    for pixels in images.values():
        less_above = pixels.copy()
        less_above[1:] -= pixels[:-1]  # modulo 256
        columns["less_above"].append(less_above.tobytes())
    shapes = [pixels.shape for pixels in images.values()]
    columns |= {side: [shape[i] for shape in shapes] for i, side in enumerate(_SIDES)}
    return _to_bytes(pa.table(columns, schema=_IMAGES), dictionary=False)


def images_from_bytes(data: bytes, wanted: set[str]) -> dict[str, Pixels]:
    """Read the wanted images among what `images_to_bytes` wrote.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        if "png" in _column_names(data):  # as files of version 0.1 have them
            hashes, pngs = _from_bytes(data, _IMAGES_AS_PNG)
            found = zip(hashes, pngs, strict=True)
            return {str(name): decode_png(bytes(png)) for name, png in found if name in wanted}
        rows = zip(*_from_bytes(data, _IMAGES), strict=True)
        return {str(name): _pixels(*row) for name, *row in rows if name in wanted}
    except (OSError, ValueError) as error:
        raise DataError(f"an image of the file is damaged: {error}") from None


def _pixels(height: int, width: int, channels: int, less_above: bytes) -> Pixels:
    rows = np.frombuffer(less_above, np.uint8).reshape(height, width, channels)
    return np.add.accumulate(rows, axis=0, dtype=np.uint8)


def _to_bytes(table: pa.Table, *, dictionary: bool = True) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", write_page_checksum=True, use_dictionary=dictionary
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
