"""What all unit tests share: they never start Ray, and some want CIFAR-100 on disk."""

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import ray


def pytest_collection_finish() -> None:
    """Let PyTorch's sixty loggers pass their messages on to the one called ``torch``.

    Otherwise pytest listens at each of them, anew in every phase of every test, which takes it
    seconds.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(autouse=True)
def _ray_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("a unit test started Ray; it belongs into tests/cluster")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100 as it lies on disk, two images of every class in each part."""
    import torchvision  # a second, for few tests

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"c{i:02}" for i in range(100)]
    labels = [int(i) for i in rng.permutation(np.repeat(np.arange(100), 2))]

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    for part in ("train", "test"):
        pixels = rng.integers(0, 256, (200, 3 * 32 * 32), np.uint8)
        checksum = write(part, {"data": pixels, "fine_labels": labels})
        monkeypatch.setattr(
            torchvision.datasets.CIFAR100, f"{part}_list", [[part, checksum]], raising=True
        )
    meta = torchvision.datasets.CIFAR100.meta | {"md5": write("meta", {"fine_label_names": names})}
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "meta", meta)
    return tmp_path
