"""From the log to what a model learns from, and the record of what it did learn from.

Knows the snapshot, the hold-out and the lineage of examples under ``runs/<id>/``.
Does not know models beyond the size of their input.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lifelong_ray.config import Config, ModelConfig
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.feedback import (
    CleanImage,
    Curation,
    LogWriter,
    Snapshot,
    curate,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
    to_model_input,
    uuid7,
)
from lifelong_ray.fitting import Arrays
from lifelong_ray.release import Manifest, Registry
from lifelong_ray.storage import Store
from lifelong_ray.types import AlreadyExistsError, Example, Feedback

Clock = Callable[[], float]
_IMPORT_ROWS = 1_000
_MIN_EXAMPLES_PER_NEW_CLASS = 5


def import_examples(store: Store, images: LabelledImages, config: Config, *, now_s: Clock) -> int:
    """Put labelled images into the log as trusted labels; those already there stay single.

    Returns:
        How many were new.
    """
    snapshot = take_snapshot(store, now_s())
    known = {(f.content_hash, f.label) for f in read_feedback(store, snapshot).rows}
    writer = LogWriter(store, config.feedback, f"import-{uuid7(now_s()).hex[-12:]}", now_s)
    writer.start()
    try:
        rows: list[Feedback] = []
        new: list[CleanImage] = []
        num_new = 0
        for image, label in zip(images.images, images.labels, strict=True):
            clean = CleanImage.of(image)
            name = clean.content_hash
            if (name, label) in known:
                continue
            known.add((name, label))
            new.append(clean)
            rows.append(
                Feedback(
                    feedback_id=str(uuid7(now_s())),
                    at_s=now_s(),
                    kind="import",
                    label=label,
                    request_id="",
                    content_hash=name,
                    user="",
                    audit=False,
                )
            )
            if len(rows) == _IMPORT_ROWS:
                writer.record_feedback(rows, new)
                num_new += len(rows)
                rows, new = [], []
        if rows:
            writer.record_feedback(rows, new)
            num_new += len(rows)
        return num_new
    finally:
        writer.close()


def curate_snapshot(
    store: Store, snapshot: Snapshot, config: Config, *, used: frozenset[tuple[str, str]]
) -> Curation:
    """Read a snapshot and clean it into examples."""
    predictions = read_predictions(store, snapshot).rows
    feedback = read_feedback(store, snapshot).rows
    by_request = {p.request_id: p.content_hash for p in predictions}
    hashes = {f.content_hash or by_request.get(f.request_id, "") for f in feedback} - {""}
    images = read_images(store, snapshot, hashes)
    return curate(predictions, feedback, images, used, config.feedback)


def arrays_of(
    examples: Sequence[Example], class_names: tuple[str, ...], model: ModelConfig
) -> Arrays:
    """Examples as inputs of a model."""
    size, channels = model.image_size, model.channels
    index = {name: i for i, name in enumerate(class_names)}
    images = np.zeros((len(examples), channels, size, size), np.uint8)
    for i, example in enumerate(examples):
        images[i] = to_model_input(example.pixels, size, channels)
    return Arrays(images, np.array([index[e.label] for e in examples], np.int64))


def thinned(examples: Sequence[Example], fraction: float) -> list[Example]:
    """Return a share of every class's examples, at least one of each, by content hash.

    The same examples whenever the same are given, in whichever order.
    """
    if fraction == 1:
        return list(examples)
    by_label: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: e.content_hash):
        by_label.setdefault(example.label, []).append(example)
    return [e for mine in by_label.values() for e in mine[: math.ceil(fraction * len(mine))]]


def split_validation(
    examples: Sequence[Example], share: float
) -> tuple[list[Example], list[Example]]:
    """Set aside a share by content hash, so that a rerun sets aside the same images.

    A class whose every example would be set aside keeps one to learn from, the one of the
    largest hash.
    """

    def place(example: Example) -> int:
        # Another salt than the hold-out's: the two splits must be independent.
        digest = hashlib.sha256(f"validation:{example.content_hash}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    last: dict[str, int] = {}
    for example in examples:
        last[example.label] = max(last.get(example.label, 0), place(example))
    training: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        at = place(example)
        chosen = at < share * 2**64 and at < last[example.label]
        (validation if chosen else training).append(example)
    return training, validation


def without_thin_classes(curation: Curation, known: tuple[str, ...]) -> Curation:
    """Leave new classes with too few examples for a later update, and count them."""
    counts: dict[str, int] = {}
    for example in curation.training:
        counts[example.label] = counts.get(example.label, 0) + 1
    thin = {
        label
        for label, count in counts.items()
        if label not in known and count < _MIN_EXAMPLES_PER_NEW_CLASS
    }
    if not thin:
        return curation
    kept = tuple(e for e in curation.training if e.label not in thin)
    dropped = {**curation.dropped, "new_class_too_thin": len(curation.training) - len(kept)}
    return Curation(kept, curation.holdout, dropped)


def snapshot_of(store: Store, run_id: str, now_s: Clock) -> Snapshot:
    """The run's snapshot: taken once, so that a resumed run sees the same log."""
    key = f"runs/{run_id}/snapshot.json"
    if not store.exists(key):
        put_once(store, key, take_snapshot(store, now_s()).to_bytes())
    return Snapshot.from_bytes(store.read(key))


def put_once(store: Store, key: str, data: bytes) -> None:
    """Write an object unless it is there already; the first word stays."""
    with suppress(AlreadyExistsError):
        store.put_new(key, data)


def write_examples(
    store: Store,
    run_id: str,
    training: Sequence[Example],
    validation: Sequence[Example],
    holdout: Sequence[Example],
) -> None:
    """Record what a run learned from, so that its descendants do not learn it again."""
    rows = [
        {"content_hash": e.content_hash, "label": e.label, "kind": e.kind, "split": split}
        for split, examples in (
            ("training", training),
            ("validation", validation),
            ("holdout", holdout),
        )
        for e in examples
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    put_once(store, f"runs/{run_id}/examples.parquet", buffer.getvalue())


def used_by(registry: Registry, store: Store, version: Manifest) -> frozenset[tuple[str, str]]:
    """Every (content hash, label) that the version or an ancestor learned from."""
    used: set[tuple[str, str]] = set()
    manifest: Manifest | None = version
    while manifest is not None:
        key = f"runs/{manifest.run_id}/examples.parquet"
        if store.exists(key):
            table = pq.read_table(io.BytesIO(store.read(key)))
            used |= {
                (row["content_hash"], row["label"])
                for row in table.to_pylist()
                if row["split"] != "holdout"
            }
        manifest = registry.manifest(manifest.parent) if manifest.parent else None
    return frozenset(used)
