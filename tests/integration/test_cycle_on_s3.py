"""The loop on object storage: what holds on a disk holds there."""

import uuid

import numpy as np
import pytest
import torch

from lifelong_ray.config import Config, config_from
from lifelong_ray.cycle import read_report, run_base, run_update
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.examples import import_examples
from lifelong_ray.fitting import fit_alone
from lifelong_ray.learning import Learner
from lifelong_ray.release import Registry, ReleaseDesk
from lifelong_ray.storage import S3Store, Store, open_store
from lifelong_ray.types import VersionDamagedError
from tests.integration.conftest import BUCKET


@pytest.fixture(scope="module")
def config(endpoint_url: str) -> Config:
    return config_from(
        {
            "store": {"url": f"s3://{BUCKET}/{uuid.uuid4().hex}", "endpoint_url": endpoint_url},
            "model": {"widths": [8, 16], "image_size": 8},
            "learning": {
                "base": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "max_shift_px": 0},
                "analytic": {"num_features": 64},
                "update": {"paths": "fast"},
            },
            "feedback": {"holdout_share": 0.25, "group_commit_s": 0.001},
        }
    )


@pytest.fixture(scope="module")
def store(config: Config) -> Store:
    """A store in which v1 has learned four classes and v1.1 six."""
    torch.set_num_threads(1)
    store = open_store(config.store)
    run_base(config, store, fit_alone, rows("abcd", 1), run_id="run-base", now_s=clock)
    import_examples(store, rows("ef", 2), config, now_s=clock)
    run_update(config, store, fit_alone, run_id="run-update", now_s=clock)
    return store


def clock() -> float:
    return 1_700_000_000.0


def rows(names: str, seed: int) -> LabelledImages:
    """Bright bars on noise; the class decides where the bar is."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for name in names * 25:
        image = rng.integers(0, 90, (8, 8, 1), np.uint8)
        place = "abcdef".index(name)
        start = 2 * (place % 4)
        if place < 4:
            image[start : start + 2] += 150
        else:
            image[:, start : start + 2] += 150
        images.append(image)
        labels.append(name)
    return LabelledImages(tuple(images), tuple(labels))


def test_base_and_update_are_registered_and_offered(store: Store, config: Config) -> None:
    assert isinstance(store, S3Store)
    registry = Registry(open_store(config.store))

    manifest, files = registry.load("v1.1")

    document, _ = ReleaseDesk(store, clock).read()
    assert registry.versions() == ["v1", "v1.1"]
    assert manifest.parent == "v1"
    assert Learner.from_files(files).class_names == tuple("abcdef")
    assert document.stable == "v1"
    assert [intent.candidate for intent in document.intents] == ["v1.1"]


def test_a_repeated_run_is_read_from_the_bucket(store: Store, config: Config) -> None:
    report = run_update(config, store, fit_alone, run_id="run-update", now_s=clock)

    assert report == read_report(store, "run-update")
    assert report.gate_passed
    assert Registry(store).versions() == ["v1", "v1.1"]


def test_a_damaged_object_is_found(store: Store) -> None:
    key = "versions/v1.1/memory.parquet"
    data = store.read(key)
    store.delete(key)
    try:
        with pytest.raises(VersionDamagedError, match=r"lacks its file memory\.parquet"):
            Registry(store).load("v1.1")
    finally:
        store.put_new(key, data)
