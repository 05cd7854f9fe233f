"""The log's writer: what was answered, what was said about it, and the images.

Feedback is durable when `LogWriter.record_feedback` returns; predictions wait in a bounded
queue and may lose the last `flush_interval_s`. Knows nothing of HTTP, nothing of reading
(`snapshot`), and nothing of what labels are worth (`curation`).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from lifelong_ray.config import FeedbackConfig
from lifelong_ray.feedback.files import Row, Stream, file_key, images_to_bytes, rows_to_bytes
from lifelong_ray.feedback.images import CleanImage, content_hash
from lifelong_ray.storage import Store
from lifelong_ray.types import (
    AlreadyExistsError,
    Comparison,
    Feedback,
    Prediction,
    StorageError,
)

_logger = logging.getLogger(__name__)

_ROW_BYTES = 512  # of a queued row beside its scores and image, about
_FILE_BYTES = 16_000_000  # of queued rows that one file may hold
_REMEMBERED_HASHES = 100_000
_REKEY_S = 600.0  # a file that waited longer goes to the present hour, where tails look


@dataclass(frozen=True)
class LogStats:
    """Counters of one writer since it was made.

    Attributes:
        queued_rows: Predictions and comparisons waiting, those being written included.
        queued_bytes: Their size in memory, about.
        dropped_predictions: Not logged, because the queue was full or the writer closed.
        dropped_comparisons: The same for comparisons.
        written_rows: Rows made durable, of any stream but images.
        failed_flushes: Writes that the store refused; their rows were kept.
    """

    queued_rows: int
    queued_bytes: int
    dropped_predictions: int
    dropped_comparisons: int
    written_rows: int
    failed_flushes: int


@dataclass(frozen=True)
class _Queued:
    row: Prediction | Comparison
    image: CleanImage | None
    size_bytes: int


@dataclass
class _Chunk:
    """Rows on their way to files whose keys stay the same over retries.

    So a write that succeeded without our hearing of it is not repeated under another name.
    """

    at_s: float
    rows: list[_Queued]
    files: list[tuple[Stream, str, bytes]]
    hashes: list[str]


@dataclass
class _Batch:
    rows: tuple[Feedback, ...]
    images: tuple[CleanImage, ...]
    done: Future[None] = field(default_factory=Future)


class LogWriter:
    """Writes the log of one process. Every method may be called from any thread.

    Images handed over must not be changed afterwards.

    Args:
        store: Where the log lives.
        config: Intervals and bounds.
        writer_id: Names this process in file names: letters, digits, ``-`` and ``_``.
        clock: Unix time; files are named by it.
    """

    def __init__(
        self,
        store: Store,
        config: FeedbackConfig,
        writer_id: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", writer_id):
            raise ValueError(f"writer_id is {writer_id!r}; letters, digits, - and _ are allowed")
        self._store = store
        self._config = config
        self._writer_id = writer_id
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows; never held during I/O
        self._queue: deque[_Queued] = deque()
        self._queued_rows = 0
        self._queued_bytes = 0
        self._dropped = {"predictions": 0, "comparisons": 0}
        self._written_rows = 0
        self._failed_flushes = 0
        self._stored_hashes: OrderedDict[str, None] = OrderedDict()
        self._waiting: list[_Batch] = []
        self._closed = False
        self._commit_lock = threading.Lock()  # one feedback commit at a time
        self._flush_lock = threading.Lock()  # one flush at a time; guards _prepared
        self._prepared: _Chunk | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread that flushes predictions and comparisons."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
            self._thread.start()

    def log_prediction(self, prediction: Prediction, image: CleanImage | None) -> bool:
        """Queue an answer, with its image unless that is None; never waits for I/O.

        Returns:
            False if it was dropped, because the queue is full.
        """
        with self._lock:
            if prediction.content_hash in self._stored_hashes:
                self._stored_hashes.move_to_end(prediction.content_hash)
                image = None
        size = _ROW_BYTES + 16 * len(prediction.scores) + (image.size_bytes if image else 0)
        return self._enqueue("predictions", _Queued(prediction, image, size))

    def log_comparison(self, comparison: Comparison) -> bool:
        """Queue a pair of answers; never waits for I/O, False if it was dropped."""
        return self._enqueue("comparisons", _Queued(comparison, None, _ROW_BYTES))

    def record_feedback(self, rows: Sequence[Feedback], images: Iterable[CleanImage]) -> None:
        """Make labels durable, together with those of other threads.

        Images are written before the rows that refer to them.

        Args:
            rows: The labels.
            images: Those that came with them.

        Raises:
            StorageFullError: If there is no space. As with every error, the rows count as
                not recorded, and the sender should try again.
            StorageError: If the store refused them for another reason.
            ValueError: If an image is not the one its content hash names, or a row holds
                what no file can (such as half of a surrogate pair).
        """
        if not rows:
            return
        rows_to_bytes(rows)  # so that a malformed row fails its own sender, not the group
        batch = _Batch(tuple(rows), tuple(images))
        for image in batch.images:
            if content_hash(image.pixels) != image.content_hash:
                raise ValueError(f"the image named {image.content_hash!r} has another content hash")
        with self._lock:
            leading = not self._waiting
            self._waiting.append(batch)
        if leading:  # the first of a group commits for all that arrive meanwhile
            try:
                self._closing.wait(self._config.group_commit_s)
            finally:
                with self._commit_lock:
                    with self._lock:
                        group, self._waiting = self._waiting, []
                    self._commit(group)
        batch.done.result()

    def flush(self) -> None:
        """Write everything queued now.

        Raises:
            StorageError: If the store refused; rows stay queued and are tried again.
        """
        with self._flush_lock:
            self._write_prepared()
            # What comes meanwhile waits for the next flush: each round would find a little more,
            # and write ever smaller files without end.
            with self._lock:
                left = len(self._queue)
            while left > 0:
                rows = self._take(left)
                left -= len(rows)
                self._prepared = self._serialised(rows)
                self._write_prepared()

    def close(self) -> None:
        """Write what is queued and stop. What the store refuses now is dropped and counted."""
        with self._lock:
            self._closed = True
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            self.flush()
        except StorageError:
            with self._flush_lock, self._lock:
                lost = [*(self._prepared.rows if self._prepared else ()), *self._queue]
                self._prepared = None
                self._queue.clear()
                self._forget(lost, dropped=True)
            _logger.exception("log writer %s lost %d rows at its end", self._writer_id, len(lost))

    @property
    def stats(self) -> LogStats:
        """The counters as they are now."""
        with self._lock:
            return LogStats(
                queued_rows=self._queued_rows,
                queued_bytes=self._queued_bytes,
                dropped_predictions=self._dropped["predictions"],
                dropped_comparisons=self._dropped["comparisons"],
                written_rows=self._written_rows,
                failed_flushes=self._failed_flushes,
            )

    def _enqueue(self, stream: str, item: _Queued) -> bool:
        with self._lock:
            full = self._queued_bytes + item.size_bytes > self._config.max_queue_bytes
            if full or self._closed:
                self._dropped[stream] += 1
                return False
            self._queue.append(item)
            self._queued_rows += 1
            self._queued_bytes += item.size_bytes
            due = len(self._queue) >= self._config.flush_rows
        if due:
            self._wake.set()
        return True

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._config.flush_interval_s)
            self._wake.clear()
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - the thread outlives whatever a store does
                _logger.warning("log writer %s keeps its rows: %s", self._writer_id, error)
                self._closing.wait(self._config.flush_interval_s)

    def _take(self, most: int) -> list[_Queued]:
        """Take the rows of one file off the queue, at most so many."""
        most = min(most, self._config.flush_rows)
        rows: list[_Queued] = []
        size = 0
        with self._lock:
            while self._queue and len(rows) < most and size < _FILE_BYTES:
                rows.append(self._queue.popleft())
                size += rows[-1].size_bytes
        return rows

    def _serialised(self, rows: list[_Queued]) -> _Chunk | None:
        """Return rows as files; None if one is malformed, and all of them are dropped."""
        images = {item.image.content_hash: item.image for item in rows if item.image is not None}
        with self._lock:
            fresh = {n: image for n, image in images.items() if n not in self._stored_hashes}
        now_s = self._clock()
        try:
            files = self._files(
                now_s,
                fresh,
                {
                    "predictions": [i.row for i in rows if isinstance(i.row, Prediction)],
                    "comparisons": [i.row for i in rows if isinstance(i.row, Comparison)],
                },
            )
        except (ValueError, TypeError):
            # A row that no file can hold would otherwise stop all rows behind it.
            _logger.exception("log writer %s dropped %d malformed rows", self._writer_id, len(rows))
            with self._lock:
                self._forget(rows, dropped=True)
            return None
        return _Chunk(now_s, rows, files, list(fresh))

    def _write_prepared(self) -> None:
        if self._prepared is not None:
            self._write(self._prepared)
            self._prepared = None

    def _write(self, chunk: _Chunk) -> None:
        now_s = self._clock()
        if now_s - chunk.at_s > _REKEY_S:
            chunk.files = [
                (stream, file_key(stream, self._writer_id, now_s), data)
                for stream, _, data in chunk.files
            ]
            chunk.at_s = now_s
        try:
            while chunk.files:
                _, key, data = chunk.files[0]
                self._put(key, data)
                del chunk.files[0]
        except Exception:
            with self._lock:
                self._failed_flushes += 1
            raise
        with self._lock:
            self._remember(chunk.hashes)
            self._forget(chunk.rows, dropped=False)
            self._written_rows += len(chunk.rows)

    def _commit(self, group: list[_Batch]) -> None:
        """Write a group of feedback and tell everyone who waits for it."""
        try:
            rows = [row for batch in group for row in batch.rows]
            images = {image.content_hash: image for batch in group for image in batch.images}
            with self._lock:
                fresh = {n: image for n, image in images.items() if n not in self._stored_hashes}
            for _, key, data in self._files(self._clock(), fresh, {"feedback": rows}):
                self._put(key, data)
            with self._lock:
                self._remember(fresh)
                self._written_rows += len(rows)
        except BaseException as error:  # noqa: BLE001 - belongs to everyone who waits
            with self._lock:
                self._failed_flushes += 1
            for batch in group:
                batch.done.set_exception(error)
        else:
            for batch in group:
                batch.done.set_result(None)

    def _files(
        self, now_s: float, images: Mapping[str, CleanImage], rows: Mapping[Stream, Sequence[Row]]
    ) -> list[tuple[Stream, str, bytes]]:
        """Stream, key and content of the files to write, images first."""
        contents: list[tuple[Stream, bytes]] = []
        if images:
            contents.append(("images", images_to_bytes(tuple(images.values()))))
        contents += [(stream, rows_to_bytes(items)) for stream, items in rows.items() if items]
        return [(s, file_key(s, self._writer_id, now_s), data) for s, data in contents]

    def _put(self, key: str, data: bytes) -> None:
        try:
            self._store.put_new(key, data)
        except AlreadyExistsError:
            _logger.info("%s is ours from an attempt whose success we did not hear of", key)

    def _remember(self, hashes: Iterable[str]) -> None:
        for name in hashes:
            self._stored_hashes[name] = None
            self._stored_hashes.move_to_end(name)
        while len(self._stored_hashes) > _REMEMBERED_HASHES:
            self._stored_hashes.popitem(last=False)

    def _forget(self, rows: Iterable[_Queued], *, dropped: bool) -> None:
        for item in rows:
            self._queued_rows -= 1
            self._queued_bytes -= item.size_bytes
            if dropped:
                stream = "predictions" if isinstance(item.row, Prediction) else "comparisons"
                self._dropped[stream] += 1
