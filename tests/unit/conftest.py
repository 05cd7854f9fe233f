"""Unit tests never start Ray: under this fixture `ray.init` raises."""

from typing import NoReturn

import pytest
import ray


@pytest.fixture(autouse=True)
def _ray_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("a unit test started Ray; it belongs into tests/cluster")

    monkeypatch.setattr(ray, "init", refuse)
