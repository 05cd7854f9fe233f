"""The log's readers: an exact set of files (`Snapshot`), or files as they arrive (`LogTail`).

A file that is missing (erased, expired), cut short or damaged is skipped and counted; a store
that cannot be read is an error, so that an outage never looks like a shorter log. Rows are
returned once, whichever way their writer repeated itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

from lifelong_ray.feedback.files import (
    RowStream,
    T,
    hour_prefix,
    images_from_bytes,
    row_id,
    rows_from_bytes,
)
from lifelong_ray.feedback.images import CleanImage, content_hash
from lifelong_ray.storage import Store
from lifelong_ray.types import Comparison, DataError, Feedback, NotFoundError, Pixels, Prediction

_logger = logging.getLogger(__name__)

_HOUR_S = 3_600.0
_LATE_S = 2 * _HOUR_S  # how far back a tail still looks for new files
_MANY_HOURS = 72  # more are found with one long listing instead of one each
_READERS = 8
_RECORDS: dict[str, type] = {
    "predictions": Prediction,
    "feedback": Feedback,
    "comparisons": Comparison,
}
Content = TypeVar("Content")


@dataclass(frozen=True)
class Snapshot:
    """An exact set of log files: the same id gives the same rows, for ever.

    Attributes:
        snapshot_id: SHA-256 (hex) of the sorted file list.
        at_s: Unix time when it was taken.
        files: Sorted keys of all streams.
    """

    snapshot_id: str
    at_s: float
    files: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        content = {"snapshot_id": self.snapshot_id, "at_s": self.at_s, "files": self.files}
        return json.dumps(content, indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Snapshot:
        """Return what `to_bytes` wrote.

        Raises:
            DataError: If it is damaged, or the id does not fit the files.
        """
        try:
            content = json.loads(data)
            snapshot = Snapshot(
                str(content["snapshot_id"]), float(content["at_s"]), tuple(content["files"])
            )
            if snapshot.snapshot_id != _snapshot_id(snapshot.files):
                raise ValueError("the id is not that of the files")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the snapshot is damaged ({error}); restore it or take another"
            ) from None
        return snapshot


def take_snapshot(store: Store, now_s: float) -> Snapshot:
    """Return the log as it is now."""
    files = tuple(key for key in store.list("log/") if key.endswith(".parquet"))
    return Snapshot(_snapshot_id(files), now_s, files)


def _snapshot_id(files: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(files)).encode()).hexdigest()


@dataclass(frozen=True)
class Rows(Generic[T]):
    """Rows of a snapshot, each once, and what could not be read.

    Attributes:
        rows: In order of time.
        skipped: Keys of files that are missing (erased, expired) or damaged.
    """

    rows: tuple[T, ...]
    skipped: tuple[str, ...]

    @property
    def skipped_files(self) -> int:
        """Number of files that could not be read."""
        return len(self.skipped)


def read_predictions(store: Store, snapshot: Snapshot) -> Rows[Prediction]:
    """Return every prediction of the snapshot once."""
    return _read(store, snapshot, "predictions", Prediction)


def read_feedback(store: Store, snapshot: Snapshot) -> Rows[Feedback]:
    """Return every label of the snapshot once."""
    return _read(store, snapshot, "feedback", Feedback)


def read_comparisons(store: Store, snapshot: Snapshot) -> Rows[Comparison]:
    """Return every comparison of the snapshot once."""
    return _read(store, snapshot, "comparisons", Comparison)


def read_images(store: Store, snapshot: Snapshot, hashes: Iterable[str]) -> dict[str, Pixels]:
    """Return the images by content hash; those that are not in the log are left out.

    A JPEG that was written beside another libjpeg may decode to pixels that differ by a step from
    those that its name stands for; it is returned, and a warning says how many did.
    """
    wanted = set(hashes)
    found: dict[str, Pixels] = {}
    differing: list[str] = []

    def missing(data: bytes) -> dict[str, Pixels | None]:
        images = images_from_bytes(data, wanted - found.keys())
        return {name: _shown(image, differing) for name, image in images.items()}

    keys = deque(key for key in reversed(snapshot.files) if key.startswith("log/images/"))
    while keys and len(found) < len(wanted):
        some = [keys.popleft() for _ in range(min(len(keys), _READERS))]
        for key, images in _contents(store, some, missing):
            for name, pixels in (images or {}).items():
                if pixels is not None:
                    found[name] = pixels
                else:
                    _logger.warning("image %s in %s is damaged", name, key)
    if differing:
        _logger.warning(
            "%d JPEGs, such as %s, do not decode here to the very pixels that were answered; "
            "their writer may have another libjpeg",
            len(differing),
            differing[0],
        )
    return found


def _shown(image: CleanImage, differing: list[str]) -> Pixels | None:
    """The pixels, unless they are damaged; `differing` gets the name of a JPEG with others."""
    try:
        pixels = image.pixels
    except ValueError:
        return None
    if content_hash(pixels) == image.content_hash:
        return pixels
    if image.jpeg is None:
        return None
    differing.append(image.content_hash)  # Its bytes are whole: the file has their checksum.
    return pixels


def _read(store: Store, snapshot: Snapshot, stream: RowStream, record: type[T]) -> Rows[T]:
    keys = [key for key in snapshot.files if key.startswith(f"log/{stream}/")]
    rows: dict[str, T] = {}
    skipped: list[str] = []
    for key, content in _contents(store, keys, lambda data: list(rows_from_bytes(data, record))):
        if content is None:
            skipped.append(key)
        for row in content or ():
            rows.setdefault(row_id(row), row)
    ordered = sorted(rows.values(), key=lambda row: (row.at_s, row_id(row)))
    return Rows(tuple(ordered), tuple(skipped))


def _contents(
    store: Store, keys: Iterable[str], parse: Callable[[bytes], Content]
) -> Iterator[tuple[str, Content | None]]:
    """Parsed files in the order of `keys`, a few at a time; None where one cannot be read."""

    def content(key: str) -> Content | None:
        try:
            return parse(store.read(key))
        except (NotFoundError, DataError) as error:
            _logger.warning("log file %s is skipped: %s", key, error)
            return None

    rest = deque(keys)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="log-reader") as pool:
        while rest:
            some = [rest.popleft() for _ in range(min(len(rest), 4 * _READERS))]
            yield from zip(some, pool.map(content, some), strict=True)


class LogTail(Generic[T]):
    """Follows one stream of the log as files arrive.

    It keeps no state outside the process: a fresh tail returns everything since `since_s`
    again. Files may arrive two hours late (a writer's clock, a slow disk), not later.

    Args:
        store: Where the log lives.
        stream: ``predictions``, ``feedback`` or ``comparisons``.
        since_s: Unix time; earlier rows are left out.
        clock: Unix time.

    Attributes:
        skipped_files: Files that were missing or damaged.
    """

    @overload
    def __init__(
        self: LogTail[Prediction],
        store: Store,
        stream: Literal["predictions"],
        since_s: float,
        clock: Callable[[], float] = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: LogTail[Feedback],
        store: Store,
        stream: Literal["feedback"],
        since_s: float,
        clock: Callable[[], float] = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: LogTail[Comparison],
        store: Store,
        stream: Literal["comparisons"],
        since_s: float,
        clock: Callable[[], float] = ...,
    ) -> None: ...

    def __init__(
        self,
        store: Store,
        stream: RowStream,
        since_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._stream = stream
        self._record: type[T] = _RECORDS[stream]
        self._since_s = since_s
        self._clock = clock
        self._floor_s = since_s
        self._seen_files: set[str] = set()
        self._folder_of_seen: dict[str, str] = {}
        self.skipped_files = 0

    def poll(self) -> list[T]:
        """Return the rows of files not seen before; those of an unreadable file are skipped.

        Raises:
            StorageError: If the store cannot be read; nothing is lost, poll again.
        """
        now_s = self._clock()
        keys = [key for key in self._list(now_s) if key not in self._seen_files]

        def parse(data: bytes) -> list[T]:
            return list(rows_from_bytes(data, self._record))

        rows: list[T] = []
        for key, content in list(_contents(self._store, keys, parse)):
            self._seen_files.add(key)
            self.skipped_files += content is None
            for row in content or ():
                if row_id(row) not in self._folder_of_seen and row.at_s >= self._since_s:
                    rows.append(row)
                self._folder_of_seen.setdefault(row_id(row), key.rpartition("/")[0] + "/")
        self._raise_floor(now_s - _LATE_S)
        return rows

    def _list(self, now_s: float) -> list[str]:
        ahead_s = now_s + _HOUR_S  # a writer's clock may be ahead
        first, last = hour_prefix(self._stream, self._floor_s), hour_prefix(self._stream, ahead_s)
        hours = int((ahead_s - self._floor_s) // _HOUR_S)
        if hours > _MANY_HOURS:
            keys = self._store.list(f"log/{self._stream}/")
        else:
            starts = [self._floor_s + n * _HOUR_S for n in range(hours + 1)]
            prefixes = {hour_prefix(self._stream, start_s) for start_s in starts} | {last}
            keys = [key for prefix in sorted(prefixes) for key in self._store.list(prefix)]
        return [key for key in keys if key >= first and key.endswith(".parquet")]

    def _raise_floor(self, floor_s: float) -> None:
        """Forget hours that no writer files into any more."""
        if floor_s <= self._floor_s:
            return
        self._floor_s = floor_s
        floor = hour_prefix(self._stream, floor_s)
        self._seen_files = {key for key in self._seen_files if key >= floor}
        self._folder_of_seen = {
            name: folder for name, folder in self._folder_of_seen.items() if folder >= floor
        }
