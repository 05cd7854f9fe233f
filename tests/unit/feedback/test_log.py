"""The log's writer and readers: bounded, durable, each row once."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lifelong_ray.config import FeedbackConfig, ImageConfig
from lifelong_ray.feedback import (
    CleanImage,
    LogTail,
    LogWriter,
    SentImage,
    Snapshot,
    content_hash,
    decode_image,
    read_comparisons,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.storage import LocalStore
from lifelong_ray.types import (
    AlreadyExistsError,
    Comparison,
    DataError,
    Feedback,
    Pixels,
    Prediction,
    StorageError,
    StorageFullError,
)
from tests.rows import a_prediction

NOON_S = 1_700_049_600.0
HOUR_S = 3_600.0
CONFIG = FeedbackConfig(group_commit_s=0.001, flush_interval_s=0.01)


class Clock:
    def __init__(self, now_s: float = NOON_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class FailingStore(LocalStore):
    """Fails writes while `error` is set; `after` lets the write happen first, unheard."""

    error: Exception | None = None
    after = False
    attempts = 0

    def put_new(self, key: str, data: bytes, *, mode: int = 0o644) -> None:
        self.attempts += 1
        if self.error is None or self.after:
            super().put_new(key, data, mode=mode)
        if self.error is not None:
            raise self.error


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return FailingStore(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def image(n: int) -> Pixels:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pixels[0, 0, 0] = n
    return pixels


def prediction(n: int, pixels: Pixels | None = None, at_s: float = NOON_S) -> Prediction:
    return a_prediction(
        f"request-{n}",
        at_s=at_s + n / 1_000,
        content_hash=content_hash(image(n) if pixels is None else pixels),
        scores=(0.1 + n / 7, 0.2),
        class_names=("cat", "Ünïcode"),
        version="v1.1",
        sampling_probability=0.5,
        audit=bool(n % 2),
        model_ms=1.5,
    )


def vote(n: int, at_s: float = NOON_S) -> Feedback:
    return Feedback(f"feedback-{n}", at_s, "feedback", "dog", f"request-{n}", "", "ada", False)


def comparison(n: int, at_s: float = NOON_S) -> Comparison:
    return Comparison(
        f"request-{n}", at_s, "r1", "v1", "cat", 0.9, "v2", "dog", 0.8, 1.0, 2.0, True
    )


def test_rows_and_images_come_back_as_they_were(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "front-1", clock)

    assert writer.log_prediction(prediction(1), CleanImage.of(image(1)))
    assert writer.log_prediction(prediction(2), None)
    assert writer.log_comparison(comparison(1))
    writer.flush()
    writer.record_feedback([vote(1)], [CleanImage.of(image(3))])

    snapshot = take_snapshot(store, NOON_S)
    assert read_predictions(store, snapshot).rows == (prediction(1), prediction(2))
    assert read_comparisons(store, snapshot).rows == (comparison(1),)
    assert read_feedback(store, snapshot).rows == (vote(1),)
    hashes = [content_hash(image(n)) for n in (1, 2, 3)]
    images = read_images(store, snapshot, hashes)
    assert images.keys() == {hashes[0], hashes[2]}
    np.testing.assert_array_equal(images[hashes[0]], image(1))


def sent_as_jpeg(seed: int) -> SentImage:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(file, "JPEG")
    return SentImage(file.getvalue(), "image/jpeg", ImageConfig())


def test_a_jpeg_waits_and_is_stored_in_the_bytes_that_came(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    sent, labelled = sent_as_jpeg(1), sent_as_jpeg(2)
    pixels = decode_image(sent.data, None, ImageConfig())

    writer.log_prediction(prediction(1, pixels), sent.clean())
    queued = writer.stats.queued_bytes
    writer.flush()
    writer.record_feedback([vote(1)], [labelled.clean()])

    assert queued < len(sent.data) + 1_000 < pixels.nbytes
    stored = b"".join(store.read(key) for key in store.list("log/images/"))
    assert sent.data in stored
    assert labelled.data in stored
    images = read_images(store, take_snapshot(store, NOON_S), [content_hash(pixels)])
    np.testing.assert_array_equal(images[content_hash(pixels)], pixels)


def test_a_jpeg_that_cannot_be_decoded_costs_only_itself(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    good, bad = sent_as_jpeg(1).clean(), CleanImage("0" * 64, b"no JPEG")
    for n, image in enumerate((bad, good)):
        writer.log_prediction(replace(prediction(n), content_hash=image.content_hash), image)
    writer.flush()

    images = read_images(store, take_snapshot(store, NOON_S), [good.content_hash, bad.content_hash])

    assert images.keys() == {good.content_hash}
    with pytest.raises(ValueError, match="damaged"):
        writer.record_feedback([vote(1)], [bad])


def test_a_jpeg_of_another_decoder_is_read_under_its_name_and_told_of(
    store: FailingStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    image = sent_as_jpeg(1).clean()
    a_step_away = CleanImage.of(image.pixels ^ 1).content_hash
    named = CleanImage(a_step_away, image.kept)
    writer.log_prediction(replace(prediction(1), content_hash=a_step_away), named)
    writer.flush()

    images = read_images(store, take_snapshot(store, NOON_S), [a_step_away])

    np.testing.assert_array_equal(images[a_step_away], image.pixels)
    assert "1 JPEGs" in caplog.text
    with pytest.raises(ValueError, match="another content hash"):
        writer.record_feedback([vote(1)], [named])


def test_pixels_under_another_name_are_damaged(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    named = CleanImage("0" * 64, image(1))
    writer.log_prediction(replace(prediction(1), content_hash="0" * 64), named)
    writer.flush()

    assert read_images(store, take_snapshot(store, NOON_S), ["0" * 64]) == {}


def test_files_are_filed_by_the_hour_of_writing(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "front-1", clock)

    writer.record_feedback([vote(1, at_s=0.0)], ())

    (key,) = store.list("log/")
    assert key.startswith("log/feedback/dt=2023-11-15/hour=12/front-1-")
    assert key.endswith(".parquet")


def test_images_are_written_before_the_labels_that_refer_to_them(
    store: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = store.put_new

    def noted(key: str, data: bytes) -> None:
        written.append(key)
        real(key, data)

    monkeypatch.setattr(store, "put_new", noted)
    writer = LogWriter(store, CONFIG, "w", clock)

    writer.record_feedback([vote(1)], [CleanImage.of(image(1))])
    writer.log_prediction(prediction(2), CleanImage.of(image(2)))
    writer.flush()

    assert [key.split("/")[1] for key in written] == [
        "images",
        "feedback",
        "images",
        "predictions",
    ]


def test_an_image_is_stored_once_per_writer(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)

    for n in (1, 2):
        writer.log_prediction(prediction(n, pixels=image(9)), CleanImage.of(image(9)))
    writer.flush()
    writer.log_prediction(prediction(3, pixels=image(9)), CleanImage.of(image(9)))
    writer.record_feedback([vote(1)], [CleanImage.of(image(9))])
    writer.flush()

    assert len(store.list("log/images/")) == 1


def test_rows_that_come_while_a_file_is_written_wait_for_the_next_flush(
    store: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    coming = iter(range(2, 100))
    put_new = store.put_new

    def put_and_log_another(key: str, data: bytes) -> None:
        put_new(key, data)
        for n in [next(coming), next(coming)]:
            writer.log_prediction(prediction(n), None)

    monkeypatch.setattr(store, "put_new", put_and_log_another)
    writer.log_prediction(prediction(1), None)

    writer.flush()
    writer.flush()

    assert len(store.list("log/predictions/")) == 2
    assert writer.stats.written_rows == 3
    assert writer.stats.queued_rows == 2


def test_a_full_queue_drops_and_counts_but_never_waits(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG.model_copy(update={"max_queue_bytes": 2_000}), "w", clock)

    kept = [writer.log_prediction(prediction(n), CleanImage.of(image(n))) for n in range(10)]
    compared = [writer.log_comparison(comparison(n)) for n in range(10)]

    stats = writer.stats
    assert sum(kept) + sum(compared) == stats.queued_rows
    assert stats.dropped_predictions == 10 - sum(kept) > 0
    assert stats.dropped_comparisons == 10 - sum(compared) > 0
    assert stats.queued_bytes <= 2_000


def test_predictions_wait_out_a_full_disk(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    store.error = StorageFullError("no space")
    writer.log_prediction(prediction(1), CleanImage.of(image(1)))

    with pytest.raises(StorageFullError):
        writer.flush()
    assert writer.log_prediction(prediction(2), CleanImage.of(image(2)))
    assert writer.stats.queued_rows == 2
    assert writer.stats.failed_flushes == 1
    store.error = None
    writer.flush()

    assert writer.stats.queued_rows == writer.stats.queued_bytes == 0
    assert writer.stats.written_rows == 2
    snapshot = take_snapshot(store, NOON_S)
    assert len(read_predictions(store, snapshot).rows) == 2
    assert len(read_images(store, snapshot, [content_hash(image(n)) for n in (1, 2)])) == 2


def test_the_thread_flushes_by_itself_and_outlives_failures(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    store.error = RuntimeError("something else altogether")
    writer.start()
    writer.log_prediction(prediction(1), None)
    waiting = threading.Event()
    while writer.stats.failed_flushes == 0:
        waiting.wait(0.005)

    store.error = None
    while writer.stats.written_rows == 0:
        waiting.wait(0.005)
    writer.close()

    assert len(read_predictions(store, take_snapshot(store, NOON_S)).rows) == 1


def test_a_write_whose_success_was_not_heard_of_is_not_repeated(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    store.error, store.after = StorageError("timed out"), True
    writer.log_comparison(comparison(1))
    with pytest.raises(StorageError):
        writer.flush()

    store.error = None
    writer.flush()

    assert len(store.list("log/comparisons/")) == 1
    assert writer.stats.written_rows == 1


def test_rows_that_waited_long_are_filed_where_tails_still_look(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    tail = LogTail(store, "comparisons", NOON_S, clock)
    store.error = StorageFullError("no space")
    writer.log_comparison(comparison(1))
    with pytest.raises(StorageFullError):
        writer.flush()
    clock.now_s += 5 * HOUR_S
    assert tail.poll() == []

    store.error = None
    writer.flush()

    assert tail.poll() == [comparison(1)]


def test_close_writes_what_is_queued_and_takes_no_more(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    writer.start()
    writer.log_prediction(prediction(1), None)

    writer.close()

    assert not writer.log_prediction(prediction(2), None)
    assert writer.stats.written_rows == 1
    assert writer.stats.dropped_predictions == 1


def test_close_on_a_full_disk_counts_what_is_lost(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    store.error = StorageFullError("no space")
    writer.log_prediction(prediction(1), None)
    writer.log_comparison(comparison(1))

    writer.close()

    stats = writer.stats
    assert (stats.dropped_predictions, stats.dropped_comparisons) == (1, 1)
    assert stats.queued_rows == stats.queued_bytes == 0


def test_feedback_that_could_not_be_written_is_an_error_for_its_sender(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    store.error = StorageFullError("no space")

    with pytest.raises(StorageFullError):
        writer.record_feedback([vote(1)], [CleanImage.of(image(1))])
    store.error = None
    writer.record_feedback([vote(2)], [CleanImage.of(image(1))])

    snapshot = take_snapshot(store, NOON_S)
    assert [row.feedback_id for row in read_feedback(store, snapshot).rows] == ["feedback-2"]
    assert len(read_images(store, snapshot, [content_hash(image(1))])) == 1


def test_feedback_of_many_threads_is_committed_together(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG.model_copy(update={"group_commit_s": 0.05}), "w", clock)
    threads = [
        threading.Thread(target=writer.record_feedback, args=([vote(n)], ())) for n in range(20)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(read_feedback(store, take_snapshot(store, NOON_S)).rows) == 20
    assert len(store.list("log/feedback/")) < 10


def test_a_malformed_row_fails_its_own_sender_only(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)

    with pytest.raises(ValueError, match="surrogates"):
        writer.record_feedback([replace(vote(1), label="\ud800")], ())
    with pytest.raises(ValueError, match="another content hash"):
        writer.record_feedback([vote(1)], [CleanImage("0" * 64, image(1))])

    writer.record_feedback([], ())
    assert store.attempts == 0


def test_a_malformed_prediction_does_not_stop_those_behind_it(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG.model_copy(update={"flush_rows": 1}), "w", clock)
    writer.log_prediction(replace(prediction(1), user="\ud800"), None)
    writer.log_prediction(prediction(2), None)

    writer.flush()

    assert writer.stats.dropped_predictions == 1
    assert read_predictions(store, take_snapshot(store, NOON_S)).rows == (prediction(2),)


def test_writers_names_cannot_leave_their_folder(store: FailingStore) -> None:
    with pytest.raises(ValueError, match="writer_id"):
        LogWriter(store, CONFIG, "../x")


# ---------------------------------------------------------------- snapshots


def test_a_snapshot_is_named_by_its_files_and_survives_as_json(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    writer.record_feedback([vote(1)], ())
    first = take_snapshot(store, NOON_S)
    writer.record_feedback([vote(2)], ())

    assert take_snapshot(store, 1.0).snapshot_id != first.snapshot_id
    assert Snapshot.from_bytes(first.to_bytes()) == first
    assert len(read_feedback(store, first).rows) == 1


def test_an_altered_snapshot_is_refused(store: FailingStore, clock: Clock) -> None:
    LogWriter(store, CONFIG, "w", clock).record_feedback([vote(1)], ())
    data = take_snapshot(store, NOON_S).to_bytes()

    for bad in (data.replace(b"hour=12", b"hour=13"), data[:-5], b"[]"):
        with pytest.raises(DataError, match="snapshot is damaged"):
            Snapshot.from_bytes(bad)


def test_rows_that_were_written_twice_are_read_once(store: FailingStore, clock: Clock) -> None:
    for name in ("one", "two"):
        LogWriter(store, CONFIG, name, clock).record_feedback([vote(1)], ())
    tail = LogTail(store, "feedback", NOON_S, clock)

    assert read_feedback(store, take_snapshot(store, NOON_S)).rows == (vote(1),)
    assert tail.poll() == [vote(1)]


def test_a_file_cut_anywhere_is_skipped_and_counted(store: FailingStore, clock: Clock) -> None:
    LogWriter(store, CONFIG, "w", clock).record_feedback([vote(1)], ())
    (key,) = store.list("log/feedback/")
    whole = store.read(key)
    path = Path(store.url) / key

    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        result = read_feedback(store, take_snapshot(store, NOON_S))
        assert (result.rows, result.skipped_files, result.skipped) == ((), 1, (key,))


def test_a_flipped_bit_never_becomes_another_row(store: FailingStore, clock: Clock) -> None:
    LogWriter(store, CONFIG, "w", clock).record_feedback([vote(1)], ())
    (key,) = store.list("log/feedback/")
    whole = store.read(key)
    path = Path(store.url) / key
    first_page = range(4, len(whole) // 4, 5)

    for at in first_page:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_feedback(store, take_snapshot(store, NOON_S)).rows in {(), (vote(1),)}


def test_an_erased_or_damaged_file_costs_only_its_own_rows(
    store: FailingStore, clock: Clock
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    for n in (1, 2, 3):
        writer.record_feedback([vote(n)], [CleanImage.of(image(n))])
    snapshot = take_snapshot(store, NOON_S)
    store.delete(store.list("log/feedback/")[0])
    damaged = Path(store.url) / store.list("log/images/")[0]
    damaged.write_bytes(damaged.read_bytes()[:100])

    rows = read_feedback(store, snapshot)
    images = read_images(store, snapshot, [content_hash(image(n)) for n in (1, 2, 3)])

    assert len(rows.rows) == 2
    assert rows.skipped_files == 1
    assert len(images) == 2


def test_a_store_that_cannot_be_read_is_not_an_empty_log(
    store: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    LogWriter(store, CONFIG, "w", clock).record_feedback([vote(1)], ())
    snapshot = take_snapshot(store, NOON_S)
    tail = LogTail(store, "feedback", NOON_S, clock)

    def unreachable(key: str) -> bytes:
        raise StorageError("no route to the store")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read", unreachable)
        with pytest.raises(StorageError):
            read_feedback(store, snapshot)
        with pytest.raises(StorageError):
            tail.poll()

    assert tail.poll() == [vote(1)]


# ---------------------------------------------------------------- tails


def test_a_tail_returns_every_row_once_as_it_arrives(store: FailingStore, clock: Clock) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    tail = LogTail(store, "feedback", NOON_S, clock)

    assert tail.poll() == []
    seen = []
    for n in range(6):
        clock.now_s += HOUR_S / 2
        writer.record_feedback([vote(n, at_s=clock.now_s)], ())
        seen += tail.poll()
        assert tail.poll() == []

    assert [row.feedback_id for row in seen] == [f"feedback-{n}" for n in range(6)]


@pytest.mark.parametrize("age_hours", [3, 30, 3_000])
def test_a_fresh_tail_returns_everything_since_its_start(
    store: FailingStore, clock: Clock, age_hours: int
) -> None:
    writer = LogWriter(store, CONFIG, "w", clock)
    writer.record_feedback([vote(1, at_s=NOON_S - 1)], ())
    writer.record_feedback([vote(2, at_s=NOON_S)], ())
    clock.now_s += age_hours * HOUR_S
    writer.record_feedback([vote(3, at_s=clock.now_s)], ())

    rows = LogTail(store, "feedback", NOON_S, clock).poll()

    assert [row.feedback_id for row in rows] == ["feedback-2", "feedback-3"]


def test_a_tail_sees_files_of_clocks_that_run_ahead_or_behind(
    store: FailingStore, clock: Clock
) -> None:
    tail = LogTail(store, "feedback", NOON_S - HOUR_S, clock)
    tail.poll()

    for n, skew_s in enumerate((-HOUR_S, HOUR_S)):
        writer = LogWriter(store, CONFIG, f"w{n}", Clock(NOON_S + skew_s))
        writer.record_feedback([vote(n)], ())

    assert len(tail.poll()) == 2


def test_a_tail_lists_only_the_hours_where_files_may_arrive(
    store: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = LogTail(store, "feedback", NOON_S - 48 * HOUR_S, clock)
    tail.poll()
    listed: list[str] = []
    real = store.list

    def noted(prefix: str) -> list[str]:
        listed.append(prefix)
        return real(prefix)

    monkeypatch.setattr(store, "list", noted)

    tail.poll()

    assert listed == [f"log/feedback/dt=2023-11-15/hour={hour}/" for hour in (10, 11, 12, 13)]


def test_a_tail_skips_and_counts_a_damaged_file(store: FailingStore, clock: Clock) -> None:
    LogWriter(store, CONFIG, "w", clock).record_feedback([vote(1)], ())
    (key,) = store.list("log/feedback/")
    store.delete(key)
    store.put_new(key, b"PAR1 but not much more")
    tail = LogTail(store, "feedback", NOON_S, clock)

    assert tail.poll() == []
    assert tail.poll() == []
    assert tail.skipped_files == 1


def test_create_only_is_what_the_fake_keeps(store: FailingStore) -> None:
    store.put_new("a", b"")

    with pytest.raises(AlreadyExistsError):
        store.put_new("a", b"")
