"""Models in a process of their own: the same answers, and what happens when it dies."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lifelong_ray.config import Config
from lifelong_ray.feedback import SentImage, encode_png, load_secrets
from lifelong_ray.on_ray.front import Front
from lifelong_ray.on_ray.model_process import ModelProcess
from lifelong_ray.on_ray.models import Models, VersionAnswer
from lifelong_ray.release import Registry
from lifelong_ray.storage import open_store
from lifelong_ray.types import BadImageError, ModelHostGoneError, StorageError, VersionError
from tests.unit.on_ray.world import (
    CLASSES,
    FakeSlot,
    ReportBook,
    make_image,
    settings,
    train_base,
    until,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = settings(
        store={"url": str(tmp_path_factory.mktemp("store"))},
        serving={"cache_bytes": 100_000, "max_batch": 8},
    )
    train_base(open_store(made.store), made)
    return made


@pytest.fixture(scope="module")
def host(config: Config) -> Iterator[ModelProcess]:
    """A process that others may kill; `load` starts it again."""
    process = ModelProcess(config, "fp32")
    yield process
    process.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """The event loop from which the process is asked: one, as in a replica."""
    with asyncio.Runner() as runner:
        yield runner


Answer = VersionAnswer | Exception
Ask = Callable[[ModelProcess, Sequence[SentImage]], list[Answer]]


@pytest.fixture
def ask(loop: asyncio.Runner) -> Ask:
    return lambda host, images: loop.run(host.answer("v1", list(images)))


def sent(name: str, config: Config, seed: int = 0) -> SentImage:
    png = encode_png(make_image(name, np.random.default_rng(seed)))
    return SentImage(png, "image/png", config.images)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for_the_end_of(pid: int) -> None:
    deadline_s = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} goes on"
        time.sleep(0.05)


def test_answers_are_those_of_the_same_models_in_this_process(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    here = Models(Registry(open_store(config.store)), config.serving)
    assert host.load("v1") == here.load("v1")

    images = [sent(name, config) for name in CLASSES]
    pixels = SentImage.of(make_image("top", np.random.default_rng(9)))
    answers = ask(host, [*images, pixels])

    expected = here.answer("v1", [*(sent(name, config) for name in CLASSES), pixels])
    for answer, alike in zip(answers, expected, strict=True):
        assert isinstance(answer, VersionAnswer)
        assert isinstance(alike, VersionAnswer)
        assert answer.class_name == alike.class_name
        assert answer.probabilities == pytest.approx(alike.probabilities, abs=1e-6)
        assert answer.model_ms > 0
    # What was decoded over there need not be decoded again.
    assert all(image.is_clean for image in images)
    assert [i.clean().content_hash for i in images] == [
        sent(name, config).clean().content_hash for name in CLASSES
    ]
    [again] = ask(host, [sent("top", config)])
    assert isinstance(again, VersionAnswer)
    assert again.cached


def test_what_is_wrong_with_one_image_is_told_about_it_alone(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    bad = SentImage(b"no image", None, config.images)

    first, second = ask(host, [bad, sent("low", config, seed=4)])

    assert isinstance(first, BadImageError)
    assert (first.code, first.status) == ("not_an_image", 400)
    assert isinstance(second, VersionAnswer)
    assert second.class_name == "low"


def test_an_unknown_version_cannot_be_loaded_and_harms_nothing(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    with pytest.raises(VersionError, match="v9"):
        host.load("v9")
    [answer] = ask(host, [sent("low", config)])
    assert isinstance(answer, VersionAnswer)


def test_a_killed_process_says_so_and_the_next_load_starts_another(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    killed = host.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)

    with pytest.raises(ModelHostGoneError):
        ask(host, [sent("low", config)])
    with pytest.raises(ModelHostGoneError):
        ask(host, [sent("low", config)])

    host.load("v1")
    assert host.pid not in (None, killed)
    [answer] = ask(host, [sent("low", config)])
    assert isinstance(answer, VersionAnswer)


def test_a_front_whose_models_are_killed_answers_again_by_itself(
    config: Config, host: ModelProcess, loop: asyncio.Runner
) -> None:
    store = open_store(config.store)

    async def play() -> None:
        front = Front(
            config,
            store,
            load_secrets(store, {}),
            host,
            FakeSlot(RuntimeError("not asked")),
            ReportBook(),
            now_s=time.time,
            rng=random.Random(0),
        )
        await front.start()
        try:
            assert (await front.answer(sent("low", config), key="k")).answer.class_name == "low"
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            began_s = time.monotonic()
            with pytest.raises(ModelHostGoneError):
                await front.answer(sent("low", config, seed=2), key="k")
            # Not so quickly that a balancer would take it for the least busy one.
            assert time.monotonic() - began_s >= 0.2

            async def answers() -> bool:
                try:
                    await front.answer(sent("low", config, seed=3), key="k")
                except ModelHostGoneError:
                    return False
                return True

            deadline_s = time.monotonic() + 30
            while not await answers():
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.05)
            await until(lambda: front.status()["warm_versions"] == ["v1"])
        finally:
            front.close()

    loop.run(play())


def test_the_process_ends_with_the_one_that_started_it(config: Config) -> None:
    program = f"""
import sys, time
from lifelong_ray.config import config_from
from lifelong_ray.on_ray.model_process import ModelProcess
host = ModelProcess(config_from({config.model_dump(mode="json")!r}), "fp32")
host.load("v1")
print(host.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_the_end_of(child)


def test_closing_ends_the_process_and_may_be_done_twice(config: Config, ask: Ask) -> None:
    host = ModelProcess(config, "fp32")
    host.close()
    host.load("v1")
    pid = host.pid
    assert pid is not None

    host.close()
    host.close()

    assert not is_alive(pid)
    with pytest.raises(ModelHostGoneError):
        ask(host, [sent("low", config)])


def test_a_process_that_cannot_start_says_so_and_leaves_nothing_behind(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelProcess(config, "fp32")
    monkeypatch.setattr(sys, "executable", "/bin/false")

    with pytest.raises(ModelHostGoneError, match="exit code 1"):
        host.load("v1")
    assert host.pid is None
    host.forget("v1")
    monkeypatch.undo()

    host.load("v1")
    host.close()


@pytest.mark.parametrize("moment", ["load", "forget"])
def test_a_process_that_is_killed_at_any_moment_is_started_again(
    config: Config, host: ModelProcess, ask: Ask, moment: str
) -> None:
    for _ in range(2):
        host.load("v1")
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(ModelHostGoneError):
            getattr(host, moment)("v1")

    host.load("v1")
    [answer] = ask(host, [sent("low", config)])
    assert isinstance(answer, VersionAnswer)


def test_a_process_that_was_started_by_another_load_does_not_pretend_to_hold_the_rest(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    for raised in (ModelHostGoneError, VersionError):
        with pytest.raises(raised):
            host.load("v9")

    with pytest.raises(ModelHostGoneError, match="v1 is not held"):
        ask(host, [sent("low", config)])


def test_batches_that_are_asked_ahead_are_answered_in_their_order(
    config: Config, host: ModelProcess, loop: asyncio.Runner
) -> None:
    host.load("v1")

    async def play() -> list[list[Answer]]:
        asked = [host.answer("v1", [sent(name, config, seed=5)]) for name in CLASSES]
        bad = host.answer("v1", [SentImage(b"no image", None, config.images)])
        return await asyncio.gather(asked[0], bad, *asked[1:])

    first, bad, *rest = loop.run(play())
    assert isinstance(bad[0], BadImageError)
    found = [answer.class_name for [answer] in (first, *rest) if isinstance(answer, VersionAnswer)]
    assert found == list(CLASSES)


def test_whoever_waits_is_told_when_the_process_ends(
    config: Config, host: ModelProcess, loop: asyncio.Runner
) -> None:
    host.load("v1")
    assert host.pid is not None
    os.kill(host.pid, signal.SIGSTOP)

    async def play() -> list[list[Answer] | BaseException]:
        # More than the connection holds, so that part of it is still here.
        many = [SentImage.of(np.full((64, 64, 3), shade, np.uint8)) for shade in range(200)]
        asked = [asyncio.ensure_future(host.answer("v1", many)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(told) for told in loop.run(play())] == [ModelHostGoneError] * 3
    assert host.pid is None


def test_large_batches_go_there_and_back(
    config: Config, host: ModelProcess, loop: asyncio.Runner, ask: Ask
) -> None:
    host.load("v1")
    rng = np.random.default_rng(0)
    large = [rng.integers(0, 256, (700, 700, 3), dtype=np.uint8) for _ in range(8)]
    images = [SentImage(encode_png(pixels), "image/png", config.images) for pixels in large]

    answers = ask(host, images)

    assert all(isinstance(answer, VersionAnswer) for answer in answers)
    for image, pixels in zip(images, large, strict=True):
        assert np.array_equal(image.clean().pixels, pixels)


def test_a_jpeg_comes_back_as_the_jpeg_and_is_asked_about_again_without_being_decoded_here(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    sent = SentImage(file.getvalue(), "image/jpeg", config.images)
    before = SentImage(file.getvalue(), "image/jpeg", config.images)

    (first,) = ask(host, [sent])
    copy = SentImage.of(sent.clean())
    (second,) = ask(host, [copy])

    assert isinstance(first, VersionAnswer)
    assert isinstance(second, VersionAnswer)
    assert second.cached
    assert second.probabilities == first.probabilities
    assert not sent.is_decoded
    assert not copy.is_decoded
    assert sent.clean().jpeg == before.clean().jpeg == file.getvalue()
    assert sent.clean().content_hash == before.clean().content_hash


def test_a_version_whose_files_cannot_be_read_does_not_cost_the_others_their_process(
    config: Config, host: ModelProcess, ask: Ask
) -> None:
    host.load("v1")
    pid = host.pid
    registry = Registry(open_store(config.store))
    manifest, files = registry.load("v1")
    registry.register(manifest.model_copy(update={"version": "v8", "files": {}}), files)
    folder = Path(config.store.url) / "versions" / "v8"
    for file in folder.glob("*.safetensors"):
        file.unlink()
        file.symlink_to(file)

    with pytest.raises(StorageError, match="v8"):
        host.load("v8")

    assert host.pid == pid
    [answer] = ask(host, [sent("low", config, seed=6)])
    assert isinstance(answer, VersionAnswer)
