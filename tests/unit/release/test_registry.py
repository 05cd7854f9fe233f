"""Versions are immutable, complete or absent, and checked when they are read."""

import json

import pytest

from lifelong_ray.release import Manifest, Registry
from lifelong_ray.types import (
    AlreadyExistsError,
    StorageFullError,
    VersionDamagedError,
    VersionError,
)
from tests.fakes import MemoryStore

FILES = {"model.safetensors": b"weights", "learner.json": b"{}"}


def a_manifest(version: str = "v1", parent: str | None = None) -> Manifest:
    return Manifest(
        version=version,
        parent=parent,
        kind="update" if parent else "base",
        path="base",
        class_names=("cat", "dog"),
        created_at_s=1.0,
        run_id="run",
    )


def test_a_registered_version_is_read_back_with_its_checksums() -> None:
    registry = Registry(MemoryStore())

    stored = registry.register(a_manifest(), FILES)

    assert set(stored.files) == set(FILES)
    assert registry.load("v1") == (stored, FILES)
    assert registry.versions() == ["v1"]


def test_versions_are_listed_in_their_own_order() -> None:
    registry = Registry(MemoryStore())
    for version in ("v10", "v1", "v1.10", "v1.2", "v2"):
        registry.register(a_manifest(version), FILES)

    assert registry.versions() == ["v1", "v1.2", "v1.10", "v2", "v10"]


def test_names_count_up_within_a_family_and_are_never_used_twice() -> None:
    registry = Registry(MemoryStore())

    assert registry.next_base() == "v1"
    registry.register(a_manifest("v1"), FILES)
    assert registry.next_base() == "v2"
    assert registry.next_update("v1") == "v1.1"
    registry.register(a_manifest("v1.1", "v1"), FILES)
    assert registry.next_update("v1.1") == "v1.2"
    assert registry.next_update("v1") == "v1.2"


def test_the_name_of_an_interrupted_registration_is_not_offered_again() -> None:
    store = MemoryStore()
    store.put_new("versions/v1/model.safetensors", b"half")

    assert Registry(store).versions() == []
    assert Registry(store).next_base() == "v2"


def test_registering_the_same_version_again_is_fine() -> None:
    registry = Registry(MemoryStore())

    first = registry.register(a_manifest(), FILES)

    assert registry.register(a_manifest(), FILES) == first


def test_a_version_never_changes() -> None:
    registry = Registry(MemoryStore())
    registry.register(a_manifest(), FILES)

    with pytest.raises(AlreadyExistsError, match="versions never change"):
        registry.register(a_manifest(), {**FILES, "model.safetensors": b"other"})

    assert registry.load("v1")[1] == FILES


def test_a_version_does_not_exist_before_its_manifest() -> None:
    class FullStore(MemoryStore):
        def put_new(self, key: str, data: bytes) -> None:
            if key.endswith("manifest.json"):
                raise StorageFullError("no space")
            super().put_new(key, data)

    registry = Registry(FullStore())

    with pytest.raises(StorageFullError):
        registry.register(a_manifest(), FILES)

    assert registry.versions() == []
    with pytest.raises(VersionError):
        registry.load("v1")


def test_a_version_from_before_precisions_were_judged_answers_in_fp32_alone() -> None:
    store = MemoryStore()
    Registry(store).register(a_manifest(), FILES)
    plain = json.loads(store.read("versions/v1/manifest.json"))
    del plain["gate_at"]
    store.objects["versions/v1/manifest.json"] = json.dumps(plain).encode()

    manifest = Registry(store).manifest("v1")

    assert manifest.why_not_at("fp32") == ""
    assert "v1 was not judged in int8; train with" in manifest.why_not_at("int8")


def test_an_unknown_version_is_answered_with_the_known_ones() -> None:
    registry = Registry(MemoryStore())
    registry.register(a_manifest(), FILES)

    with pytest.raises(VersionError, match=r"no version 'v7'; registered: v1"):
        registry.manifest("v7")


@pytest.mark.parametrize("name", ["", "../v1", "v0", "v1.0", "latest", "v1/x"])
def test_what_is_not_a_version_name_is_an_unknown_version(name: str) -> None:
    with pytest.raises(VersionError):
        Registry(MemoryStore()).manifest(name)


def test_an_altered_file_is_found() -> None:
    store = MemoryStore()
    Registry(store).register(a_manifest(), FILES)
    store.objects["versions/v1/model.safetensors"] = b"weight5"

    with pytest.raises(VersionDamagedError, match=r"v1/model\.safetensors has SHA-256"):
        Registry(store).load("v1")


def test_a_missing_file_is_found() -> None:
    store = MemoryStore()
    Registry(store).register(a_manifest(), FILES)
    store.delete("versions/v1/learner.json")

    with pytest.raises(VersionDamagedError, match=r"v1 lacks its file learner\.json"):
        Registry(store).load("v1")


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "v1"}', b"\xff"])
def test_a_damaged_manifest_is_named(content: bytes) -> None:
    store = MemoryStore()
    store.put_new("versions/v1/manifest.json", content)

    with pytest.raises(VersionDamagedError, match="manifest of v1 cannot be read"):
        Registry(store).manifest("v1")


def test_a_manifest_under_another_name_is_refused() -> None:
    store = MemoryStore()
    Registry(store).register(a_manifest("v1"), FILES)
    store.put_new("versions/v2/manifest.json", store.read("versions/v1/manifest.json"))

    with pytest.raises(VersionDamagedError, match="manifest of v2 says it is v1"):
        Registry(store).manifest("v2")


def test_an_update_of_an_unknown_parent_is_refused() -> None:
    with pytest.raises(VersionError, match="v9"):
        Registry(MemoryStore()).register(a_manifest("v9.1", "v9"), FILES)


@pytest.mark.parametrize("name", ["../secret", "a/b", "", ".hidden", "manifest.json"])
def test_a_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file"):
        Registry(MemoryStore()).register(a_manifest(), {name: b"x"})


def test_a_version_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="has no files"):
        Registry(MemoryStore()).register(a_manifest(), {})
