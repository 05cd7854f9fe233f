"""One trained base version that the tests of serving share."""

from __future__ import annotations

import pytest

from tests.fakes import MemoryStore
from tests.unit.on_ray.world import copy_of, settings, train_base


@pytest.fixture(scope="package")
def trained() -> MemoryStore:
    store = MemoryStore()
    train_base(store, settings())
    return store


@pytest.fixture
def store(trained: MemoryStore) -> MemoryStore:
    """A store of the test's own that has v1."""
    return copy_of(trained)
