"""The local store: one winner, whole objects, nothing left behind."""

import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifelong_ray.config import StoreConfig
from lifelong_ray.storage import LocalStore, Store, open_store
from lifelong_ray.types import (
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    NotFoundError,
    StorageError,
    StorageFullError,
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files_below(store: Store) -> set[str]:
    root = Path(store.url)
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_what_was_put_is_read_back(store: LocalStore) -> None:
    store.put_new("versions/v1/model", b"weights")

    assert store.read("versions/v1/model") == b"weights"
    assert store.exists("versions/v1/model")


def test_a_second_create_loses_and_changes_nothing(store: LocalStore) -> None:
    store.put_new("a", b"first")

    with pytest.raises(AlreadyExistsError, match="a exists in"):
        store.put_new("a", b"second")

    assert store.read("a") == b"first"


@pytest.mark.parametrize("key", ["missing", "folder", "file/below"])
def test_reading_what_is_not_an_object_says_so(store: LocalStore, key: str) -> None:
    store.put_new("folder/x", b"")
    store.put_new("file", b"")

    with pytest.raises(NotFoundError, match=key):
        store.read(key)
    assert not store.exists(key)


@pytest.mark.parametrize(
    "key", ["", "/a", "../a", "a/../b", "a//b", "a/", ".hidden", "a\\b", "a\0"]
)
def test_keys_that_could_mean_another_place_are_refused(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        store.put_new(key, b"")
    with pytest.raises(ValueError, match="key"):
        store.read(key)


def test_an_object_cannot_lie_below_another(store: LocalStore) -> None:
    store.put_new("a", b"")

    with pytest.raises(StorageError, match="a/b"):
        store.put_new("a/b", b"")


def test_a_prefix_is_a_plain_string(store: LocalStore) -> None:
    for key in ("versions/v1/m", "versions/v1.1/m", "versions/v2/m", "other"):
        store.put_new(key, b"")

    assert store.list("versions/v1") == ["versions/v1.1/m", "versions/v1/m"]
    assert store.list("versions/v1/") == ["versions/v1/m"]
    assert store.list("") == ["other", "versions/v1.1/m", "versions/v1/m", "versions/v2/m"]
    assert store.list("nothing/here/") == []


def test_a_swap_replaces_what_was_read(store: LocalStore) -> None:
    first = store.swap("doc", b"1", None)
    second = store.swap("doc", b"2", first)

    assert store.read_tagged("doc") == (b"2", second)


def test_a_swap_with_an_outdated_tag_loses(store: LocalStore) -> None:
    first = store.swap("doc", b"1", None)
    store.swap("doc", b"2", first)

    with pytest.raises(ConflictError, match="doc was changed"):
        store.swap("doc", b"3", first)

    assert store.read("doc") == b"2"


def test_a_swap_of_a_deleted_or_existing_object_loses(store: LocalStore) -> None:
    tag = store.swap("doc", b"1", None)

    with pytest.raises(ConflictError):
        store.swap("doc", b"2", None)
    store.delete("doc")
    with pytest.raises(ConflictError):
        store.swap("doc", b"2", tag)


def test_deleting_a_missing_object_is_fine(store: LocalStore) -> None:
    store.delete("never/was")


def add_many(url: str, times: int) -> None:
    store = LocalStore(url)
    for _ in range(times):
        while True:
            data, tag = store.read_tagged("counter")
            try:
                store.swap("counter", str(int(data) + 1).encode(), tag)
                break
            except ConflictError:
                continue


def test_no_swap_is_lost_between_processes_and_threads(store: LocalStore) -> None:
    store.put_new("counter", b"0")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=add_many, args=(store.url, 20)) for _ in range(2)]
    threads = [threading.Thread(target=add_many, args=(store.url, 20)) for _ in range(3)]

    for process in processes:
        process.start()
    for thread in threads:
        thread.start()
    for process in processes:
        process.join(timeout=60)
    for thread in threads:
        thread.join(timeout=60)

    assert store.read("counter") == b"100"


def test_one_of_many_creators_wins(store: LocalStore) -> None:
    winners: list[int] = []

    def create(n: int) -> None:
        try:
            store.put_new("claim", str(n).encode())
        except AlreadyExistsError:
            return
        winners.append(n)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(winners) == 1
    assert store.read("claim") == str(winners[0]).encode()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_nothing_behind(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tag = store.swap("doc", b"old", None)
    before = files_below(store)
    real_write = os.write

    def half_then_full(file: int, data: bytes) -> int:
        if len(data) > 3:
            return real_write(file, data[:3])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(StorageFullError, match="no space for new"):
            store.put_new("new", b"123456")
        with pytest.raises(StorageFullError):
            store.swap("doc", b"123456", tag)

    assert files_below(store) - {".store/lock"} == before
    assert store.list("") == ["doc"]
    assert store.read("doc") == b"old"


def test_what_killed_writers_left_is_invisible_and_removed_later(store: LocalStore) -> None:
    old, fresh = (Path(store.url) / ".store/temp" / name for name in ("old", "fresh"))
    for temp in (old, fresh):
        temp.write_bytes(b"half")
    os.utime(old, (time.time() - 7_200,) * 2)

    again = LocalStore(store.url)

    assert again.list("") == []
    assert not old.exists()
    assert fresh.exists()


def test_a_store_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="name a writable folder"):
        LocalStore(tmp_path / "file")


def test_the_address_decides_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = str(tmp_path / "here")

    store = open_store(StoreConfig(url=url, endpoint_url="http://127.0.0.1:1"))

    assert store.url == url
    assert "endpoint_url has no effect" in caplog.text
    for bad in ("gs://bucket/x", "s3://", ""):
        with pytest.raises(ConfigError, match=r"store\.url"):
            open_store(StoreConfig(url=bad, endpoint_url=""))


KEYS = st.sampled_from(["a", "b/c", "b/d/e"])
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["put", "swap", "stale", "delete"]), KEYS, st.binary(max_size=4)),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS)
def test_the_store_behaves_like_a_dictionary(
    actions: list[tuple[str, str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("model"))
    model: dict[str, bytes] = {}

    for verb, key, data in actions:
        if verb == "put":
            try:
                store.put_new(key, data)
            except AlreadyExistsError:
                assert key in model
            else:
                assert key not in model
                model[key] = data
        elif verb == "swap":
            store.swap(key, data, store.read_tagged(key)[1] if key in model else None)
            model[key] = data
        elif verb == "stale":
            with pytest.raises(ConflictError):
                store.swap(key, data, "a tag that never was")
        else:
            store.delete(key)
            model.pop(key, None)

    assert store.list("") == sorted(model)
    assert {key: store.read(key) for key in model} == model
