"""From the log to arrays, and the record of what was learned."""

import numpy as np
import pytest

from lifelong_ray.config import FeedbackConfig, ModelConfig, config_from
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.examples import (
    arrays_of,
    curate_snapshot,
    import_examples,
    put_once,
    snapshot_of,
    split_validation,
    thinned,
    used_by,
    without_thin_classes,
    write_examples,
)
from lifelong_ray.feedback import Curation, content_hash, is_holdout, take_snapshot
from lifelong_ray.release import Manifest, Registry
from lifelong_ray.types import Example
from tests.fakes import MemoryStore

CONFIG = config_from({"feedback": {"group_commit_s": 0.001, "holdout_share": 0.3}})


def clock() -> float:
    return 1_700_000_000.0


def images_of(labels: list[str], seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (4, 4, 1), np.uint8) for _ in labels]
    return LabelledImages(tuple(images), tuple(labels))


def examples_of(labels: list[str], seed: int = 0) -> list[Example]:
    images = images_of(labels, seed)
    return [
        Example(content_hash(image), label, image, "import", audit=False)
        for image, label in zip(images.images, images.labels, strict=True)
    ]


def test_imported_images_come_back_as_training_and_hold_out() -> None:
    store = MemoryStore()
    images = images_of(["a", "b"] * 30)

    num_new = import_examples(store, images, CONFIG, now_s=clock)

    snapshot = take_snapshot(store, 0.0)
    found = curate_snapshot(store, snapshot, CONFIG, used=frozenset())
    assert num_new == 60
    assert len(found.training) + len(found.holdout) == 60
    assert all(is_holdout(e.content_hash, 0.3) for e in found.holdout)
    by_hash = dict(zip(map(content_hash, images.images), images.labels, strict=True))
    assert {e.content_hash: e.label for e in (*found.training, *found.holdout)} == by_hash


def test_more_images_than_one_write_takes_are_imported_in_parts() -> None:
    store = MemoryStore()
    images = images_of(["a"] * 1_001)

    num_new = import_examples(store, images, CONFIG, now_s=clock)

    assert num_new == 1_001
    assert len(store.list("log/feedback/")) == 2


def test_an_image_given_twice_is_imported_once() -> None:
    images = images_of(["a", "b"])
    twice = LabelledImages(images.images * 2, images.labels * 2)

    assert import_examples(MemoryStore(), twice, CONFIG, now_s=clock) == 2


def test_arrays_are_what_a_model_takes() -> None:
    examples = examples_of(["b", "a"])

    arrays = arrays_of(examples, ("a", "b"), ModelConfig(image_size=8, channels=3))

    assert arrays.images.shape == (2, 3, 8, 8)
    assert arrays.images.dtype == np.uint8
    assert arrays.labels.tolist() == [1, 0]
    assert arrays.labels.dtype == np.int64


def test_no_examples_are_empty_arrays() -> None:
    arrays = arrays_of([], ("a",), ModelConfig(image_size=8))

    assert arrays.images.shape == (0, 1, 8, 8)
    assert len(arrays) == 0


def test_validation_is_a_share_and_every_example_stays_where_it_is() -> None:
    examples = examples_of(["a"] * 400)

    training, validation = split_validation(examples, 0.25)
    fewer_training, fewer_validation = split_validation(examples[:50], 0.25)

    assert len(training) + len(validation) == 400
    assert 70 < len(validation) < 130
    hashes = {e.content_hash for e in validation}
    assert {e.content_hash for e in fewer_validation} <= hashes
    assert not {e.content_hash for e in fewer_training} & hashes


def test_validation_and_hold_out_are_chosen_independently() -> None:
    examples = examples_of(["a"] * 1_000)
    held = [e for e in examples if is_holdout(e.content_hash, 0.2)]

    _, validation = split_validation(held, 0.2)

    assert 0.1 * len(held) < len(validation) < 0.35 * len(held)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 9)])
def test_a_share_of_none_or_all_leaves_one_to_learn_from(share: float, kept: int) -> None:
    assert len(split_validation(examples_of(["a"] * 10), share)[1]) == kept


@pytest.mark.parametrize("seed", range(5))
def test_the_last_example_of_a_class_is_never_set_aside(seed: int) -> None:
    examples = examples_of(["a"] * 30 + ["b"] * 2 + ["c"], seed)

    training, validation = split_validation(examples, 0.9)

    assert {e.label for e in training} == {"a", "b", "c"}
    assert len(validation) > 15
    again = split_validation(examples[::-1], 0.9)[1]
    assert {e.content_hash for e in again} == {e.content_hash for e in validation}


def test_only_new_classes_may_be_too_thin() -> None:
    examples = examples_of(["old", *["new"] * 4, *["many"] * 5])
    curation = Curation(tuple(examples), (), {"merged": 2})

    kept = without_thin_classes(curation, ("old",))

    assert [e.label for e in kept.training] == ["old", *["many"] * 5]
    assert kept.dropped == {"merged": 2, "new_class_too_thin": 4}


def test_a_snapshot_of_a_run_is_taken_once() -> None:
    store = MemoryStore()
    import_examples(store, images_of(["a"]), CONFIG, now_s=clock)
    first = snapshot_of(store, "run-1", clock)
    import_examples(store, images_of(["a"], seed=1), CONFIG, now_s=clock)

    assert snapshot_of(store, "run-1", clock) == first
    assert snapshot_of(store, "run-2", clock) != first


def test_the_first_word_stays() -> None:
    store = MemoryStore()

    put_once(store, "a", b"1")
    put_once(store, "a", b"2")

    assert store.read("a") == b"1"


def test_what_a_version_and_its_ancestors_learned_is_used() -> None:
    store = MemoryStore()
    registry = Registry(store)
    examples = examples_of(["a", "b", "c", "d"])
    write_examples(store, "run-1", examples[:1], examples[1:2], examples[2:3])
    write_examples(store, "run-2", examples[3:], [], [])
    for version, parent, run in (("v1", None, "run-1"), ("v1.1", "v1", "run-2")):
        manifest = Manifest(
            version=version,
            parent=parent,
            kind="update" if parent else "base",
            path="x",
            class_names=(),
            created_at_s=0.0,
            run_id=run,
        )
        registry.register(manifest, {"f": b""})

    used = used_by(registry, store, registry.manifest("v1.1"))

    assert used == {(e.content_hash, e.label) for e in (examples[0], examples[1], examples[3])}


def test_a_hold_out_share_of_everything_leaves_nothing_to_train() -> None:
    store = MemoryStore()
    import_examples(store, images_of(["a"] * 5), CONFIG, now_s=clock)
    config = CONFIG.model_copy(update={"feedback": FeedbackConfig(holdout_share=1.0)})

    found = curate_snapshot(store, take_snapshot(store, 0.0), config, used=frozenset())

    assert found.training == ()
    assert len(found.holdout) == 5


def test_a_dry_run_takes_a_share_of_every_class_whatever_the_order() -> None:
    rows = examples_of(["a"] * 9 + ["b"] * 2 + ["c"])

    some = thinned(rows, 0.5)

    labels = sorted(example.label for example in some)
    assert labels == ["a"] * 5 + ["b", "c"]
    hashes = [example.content_hash for example in some]
    again = [example.content_hash for example in thinned(rows[::-1], 0.5)]
    assert sorted(again) == sorted(hashes)
    assert thinned(rows, 1.0) == rows
