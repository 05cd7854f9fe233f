"""Versions: immutable bundles of files under a manifest with their checksums.

Stores and returns bytes; does not know what is in them. A version exists once its manifest
does, which is written last and only once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lifelong_ray.release.gate import GateReport
from lifelong_ray.storage import Store
from lifelong_ray.types import (
    AlreadyExistsError,
    NotFoundError,
    VersionDamagedError,
    VersionError,
)

_NAME = re.compile(r"v([1-9]\d*)(?:\.([1-9]\d*))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_FOLDER = "versions/"
_MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What a version is and where it comes from.

    Attributes:
        version: ``v2`` for a base training, ``v2.1`` for an update.
        parent: The version it was updated from; None for a base.
        kind: Base training or update.
        path: The learning path that made it, such as ``fast``.
        class_names: Its classes, in the order of its scores.
        created_at_s: Unix time of registration.
        run_id: The run that trained it.
        snapshot_id: The log rows it was trained on; empty when there were none.
        files: SHA-256 (hex) by file name; filled in by `Registry.register`.
        gate: The checks it went through; None when it was never judged.
        gate_at: The same checks by the precision that its answers were given in, where that was
            not the one of training.
        metrics: Measured numbers.
        config: The settings of the run.
        code_version: The version of this package that made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=rf"^{_NAME.pattern}$")
    parent: str | None = None
    kind: Literal["base", "update"]
    path: str
    class_names: tuple[str, ...]
    created_at_s: float
    run_id: str
    snapshot_id: str = ""
    files: dict[str, str] = {}
    gate: GateReport | None = None
    gate_at: dict[str, GateReport] = {}  # Empty in versions that are older than the field.
    metrics: dict[str, Any] = {}
    config: dict[str, Any] = {}
    code_version: str = ""

    def why_not_at(self, precision: str) -> str:
        """Return why the version may not answer in a precision; empty where it may."""
        if precision == "fp32":
            return ""
        report = self.gate_at.get(precision)
        if report is None:
            return (
                f"{self.version} was not judged in {precision}; train with serving.front.precision "
                "or serving.slot.precision set to it"
            )
        return (
            ""
            if report.passed
            else f"the gate refused {self.version} in {precision}: {report.reason}"
        )


class Registry:
    """The versions of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def versions(self) -> list[str]:
        """Return every registered version, oldest family first: v1, v1.1, v1.10, v2."""
        return sorted(
            (
                parts[1]
                for parts in (key.split("/") for key in self._store.list(_FOLDER))
                if len(parts) == 3 and parts[2] == _MANIFEST and _NAME.fullmatch(parts[1])
            ),
            key=_order,
        )

    def manifest(self, version: str) -> Manifest:
        """Return what is known about a version.

        Raises:
            VersionError: If there is no such version.
            VersionDamagedError: If its manifest cannot be read.
        """
        data = None
        if _NAME.fullmatch(version):
            with suppress(NotFoundError):
                data = self._store.read(_key(version, _MANIFEST))
        if data is None:
            known = ", ".join(self.versions()) or "none"
            raise VersionError(f"there is no version {version!r}; registered: {known}")
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise VersionDamagedError(
                f"the manifest of {version} cannot be read ({error.error_count()} errors, first: "
                f"{error.errors()[0]['msg']}); release another version"
            ) from error
        if manifest.version != version:
            raise VersionDamagedError(
                f"the manifest of {version} says it is {manifest.version}; release another version"
            )
        return manifest

    def load(self, version: str) -> tuple[Manifest, dict[str, bytes]]:
        """Return a version's manifest and files, each checked against its SHA-256.

        Raises:
            VersionError: If there is no such version.
            VersionDamagedError: If a file is missing or was altered.
        """
        manifest = self.manifest(version)
        files = {}
        for name, expected in manifest.files.items():
            try:
                data = self._store.read(_key(version, name))
            except NotFoundError:
                raise VersionDamagedError(
                    f"{version} lacks its file {name}; restore it or release another version"
                ) from None
            if (found := _sha256(data)) != expected:
                raise VersionDamagedError(
                    f"{version}/{name} has SHA-256 {found[:12]}... but the manifest says "
                    f"{expected[:12]}...; restore it or release another version"
                )
            files[name] = data
        return manifest, files

    def register(self, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Store a version for ever; its manifest, written last, makes it exist.

        Registering the very same version again is fine, so that an interrupted caller may
        simply repeat the call.

        Args:
            manifest: Without `files`, which is filled in here.
            files: Content by name.

        Returns:
            The manifest as stored.

        Raises:
            AlreadyExistsError: If another version of that name exists, or its remains.
            VersionError: If its parent does not exist.
            ValueError: If there are no files or a name is not a plain file name.
        """
        version = manifest.version
        if not files:
            raise ValueError(f"{version} has no files; a version is registered with its content")
        for name in files:
            if not _FILE_NAME.fullmatch(name) or name == _MANIFEST:
                raise ValueError(f"{name!r} cannot be a file of {version}; use a plain name")
        if manifest.parent is not None:
            self.manifest(manifest.parent)
        complete = manifest.model_copy(
            update={"files": {name: _sha256(files[name]) for name in sorted(files)}}
        )
        for name in sorted(files):
            self._put_same(_key(version, name), files[name], version)
        self._put_same(
            _key(version, _MANIFEST), complete.model_dump_json(indent=1).encode(), version
        )
        return complete

    def next_base(self) -> str:
        """Return the name of the next base version; names are never used twice."""
        return f"v{max((major for major, _ in self._used_names()), default=0) + 1}"

    def next_update(self, parent: str) -> str:
        """Return the name of the next update in the parent's family: v1 and v1.1 give v1.2.

        Raises:
            VersionError: If the parent's name is not a version.
        """
        if not _NAME.fullmatch(parent):
            raise VersionError(f"{parent!r} is not a version name such as v1 or v1.2")
        family, _ = _order(parent)
        taken = [minor for major, minor in self._used_names() if major == family]
        return f"v{family}.{max(taken, default=0) + 1}"

    def _used_names(self) -> set[tuple[int, int]]:
        """Names in use, those of interrupted registrations included."""
        folders = {key.split("/")[1] for key in self._store.list(_FOLDER)}
        return {_order(name) for name in folders if _NAME.fullmatch(name)}

    def _put_same(self, key: str, data: bytes, version: str) -> None:
        try:
            self._store.put_new(key, data)
        except AlreadyExistsError:
            if self._store.read(key) != data:
                raise AlreadyExistsError(
                    f"{key} exists with other content; versions never change, so register "
                    f"under the name that follows {version}"
                ) from None


def _key(version: str, name: str) -> str:
    return f"{_FOLDER}{version}/{name}"


def _order(version: str) -> tuple[int, int]:
    match = _NAME.fullmatch(version)
    assert match is not None, version
    return int(match[1]), int(match[2] or 0)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
