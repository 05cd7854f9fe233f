"""A small classifier, its store, and the front's surroundings as fakes that keep real state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lifelong_ray.config import Config, config_from
from lifelong_ray.cycle import run_base
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.feedback import CleanImage
from lifelong_ray.fitting import fit_alone
from lifelong_ray.learning import Calibration, Learner, Light, build_model
from lifelong_ray.on_ray.models import VersionAnswer
from lifelong_ray.release import FrontReport, Registry, ReleaseDesk, ReleaseDocument
from lifelong_ray.storage import Store
from lifelong_ray.types import Json, Pixels
from tests.fakes import MemoryStore

CLASSES = ("low", "middle", "top")

SMALL: Json = {
    "model": {"widths": [4, 8], "image_size": 8},
    "learning": {
        "base": {"epochs": 6, "batch_size": 16, "learning_rate": 0.02, "max_shift_px": 0},
        "analytic": {"num_features": 32},
        "update": {"ewc": {"num_fisher_examples": 20}},
    },
    "feedback": {"audit_share": 0.0, "flush_interval_s": 0.05, "group_commit_s": 0.001},
    "serving": {"poll_interval_s": 0.01, "slot_timeout_s": 5.0, "cache_bytes": 0},
}


def settings(**sections: Json) -> Config:
    """The small settings with some keys of some sections changed."""
    tree = {name: dict(section) for name, section in SMALL.items()}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return config_from(tree)


def make_image(class_name: str, rng: np.random.Generator) -> Pixels:
    """A bright bar on noise; the class says where."""
    pixels = rng.integers(0, 60, (12, 12, 1), dtype=np.uint8)
    row = 4 * CLASSES[::-1].index(class_name)
    pixels[row : row + 4] += 180
    return pixels


def make_images(num_per_class: int, seed: int) -> LabelledImages:
    """As many images of every class."""
    rng = np.random.default_rng(seed)
    labels = CLASSES * num_per_class
    return LabelledImages(tuple(make_image(name, rng) for name in labels), labels)


def train_base(store: Store, config: Config) -> None:
    """Make v1, and the release document with it."""
    images = make_images(30, seed=0)
    report = run_base(config, store, fit_alone, images, run_id="base", now_s=time.time)
    assert report.released, report.gate


def add_version(
    store: Store, version: str = "v1.1", *, wrong: bool = False, gate: bool = True
) -> str:
    """Register v1's weights under another name.

    Args:
        store: Where v1 is.
        version: The new name.
        wrong: Every class gets the name of the next, so that every answer tells who gave it.
        gate: Whether it counts as having passed the gate.
    """
    registry = Registry(store)
    manifest, files = registry.load("v1")
    learner = Learner.from_files(files)
    if wrong:
        learner = replace(learner, class_names=rotated(learner.class_names))
    registry.register(
        manifest.model_copy(
            update={
                "version": version,
                "parent": "v1",
                "kind": "update",
                "class_names": learner.class_names,
                "files": {},
                "gate": manifest.gate if gate else None,
            }
        ),
        learner.to_files(),
    )
    return version


def add_light_version(store: Store, version: str = "v2") -> str:
    """Register v1 under another name, with a light model that answers everything."""
    registry = Registry(store)
    manifest, files = registry.load("v1")
    config = Learner.from_files(files).model_config
    light = Light(
        model=build_model(config, len(manifest.class_names), seed=0).eval(),
        class_names=manifest.class_names,
        temperature=1.0,
        calibration=Calibration(0.0, "it may answer everything", 1.0, 0.0, 0.0, 1, 1),
    )
    registry.register(
        manifest.model_copy(update={"version": version, "files": {}}), {**files, **light.to_files()}
    )
    return version


def rotated(names: tuple[str, ...]) -> tuple[str, ...]:
    """Every name replaced by the next one."""
    return (*names[1:], names[0])


def copy_of(store: MemoryStore) -> MemoryStore:
    """A store with the same objects."""
    copy = MemoryStore()
    copy.objects.update(store.objects)
    return copy


def move(desk: ReleaseDesk, **changes: object) -> ReleaseDocument:
    """Change the release document as a controller would."""
    before, tag = desk.read()
    after = before.changed(**changes).numbered_after(before)
    desk.swap(after, tag)
    return after


class FakeSlot:
    """Answers by a function; counts what it was asked.

    Not `open`, it lets those who ask wait; not `alive` either, it is none that does.
    """

    def __init__(self, reply: Callable[[str, CleanImage], VersionAnswer] | Exception) -> None:
        self._reply = reply
        self.alive = True
        self.num_asked = 0
        self.num_calls = 0
        self.open = asyncio.Event()
        self.open.set()

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        self.num_asked += 1
        await self.open.wait()
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply(version, image)

    async def ask_together(
        self, version: str, images: Sequence[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        self.num_calls += 1
        return await asyncio.gather(*(self.ask(version, image) for image in images))

    def was_there(self, within_s: float) -> bool:
        return self.alive


class ReportBook:
    """Keeps the heartbeats of fronts."""

    def __init__(self) -> None:
        self.reports: list[FrontReport] = []

    def report(self, report: FrontReport) -> None:
        self.reports.append(report)

    @property
    def last(self) -> FrontReport:
        return self.reports[-1]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        await asyncio.sleep(0.005)
