"""Objects under keys, on local disk or S3, with the two promises everything else rests on.

A create-only write has one winner, and a compare-and-swap has one winner. Both are durable
when they return, and a reader sees a whole object or none. Knows nothing of what the bytes
mean. Keys are relative POSIX paths; a part that starts with a dot belongs to the store itself.

A tag names content, not a moment: when an object returns to earlier bytes, its earlier tag is
valid again. Documents under `Store.swap` therefore carry a counter or a nonce. On S3, a client
that repeats a request whose success it did not hear of looks like the loser of a race; whoever
cares re-reads and compares that nonce.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol

from lifelong_ray.config import StoreConfig
from lifelong_ray.types import (
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    NotFoundError,
    StorageError,
    StorageFullError,
)

_log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PRIVATE = ".store"
_STALE_TEMP_S = 3_600.0
_CONFLICT_ATTEMPTS = 5


class Store(Protocol):
    """Whole objects under keys.

    Attributes:
        url: Where it is: an absolute folder, or ``s3://bucket/prefix``.
    """

    url: str

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that must not exist yet; durable when it returns.

        Raises:
            AlreadyExistsError: If there is one; it is left as it is.
            StorageFullError: If there is no space; nothing is left behind.
        """

    def read(self, key: str) -> bytes:
        """Return the whole object; raises `NotFoundError`."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the object and the tag that `swap` wants; raises `NotFoundError`."""

    def swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Replace the object if it is still the one that was read.

        Args:
            key: The object.
            data: Its next content.
            expected: Tag from `read_tagged` or an earlier `swap`; None means that there
                must be no object yet.

        Returns:
            The tag of the new content.

        Raises:
            ConflictError: If someone else changed it first; read again and decide anew.
            StorageFullError: If there is no space; the old content stays.
        """

    def list(self, prefix: str) -> list[str]:
        """Return the sorted keys that start with `prefix`, as a plain string."""

    def exists(self, key: str) -> bool:
        """Tell whether there is an object under the key."""

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""


def open_store(config: StoreConfig) -> Store:
    """Open the store that the settings name; an S3 server is probed once.

    Raises:
        ConfigError: If the address is not understood, or the server ignores conditional
            writes, so that two writers could both win.
        StorageError: If the store cannot be reached or written.
    """
    if config.url.startswith("s3://"):
        store = S3Store(config.url, endpoint_url=config.endpoint_url)
        store.probe()
        return store
    if "://" in config.url:
        raise ConfigError(
            f"store.url is {config.url!r}: only a folder or s3://bucket/prefix can be a store"
        )
    if not config.url:
        raise ConfigError("store.url is empty; name a folder or s3://bucket/prefix")
    if config.endpoint_url:
        _log.warning("store.endpoint_url has no effect: store.url %s is a folder", config.url)
    return LocalStore(config.url)


def _checked(key: str) -> str:
    """Return `key`, or raise `ValueError` when it could mean another place."""
    if not key or key.startswith("/") or "\\" in key or "\0" in key:
        raise ValueError(f"key {key!r} is not a relative POSIX path such as 'log/a.parquet'")
    for part in key.split("/"):
        if not part or part.startswith("."):
            raise ValueError(
                f"key {key!r} has the part {part!r}; parts are not empty and start with no dot"
            )
    return key


def _checked_prefix(prefix: str) -> str:
    if prefix:
        _checked(prefix.removesuffix("/") if prefix != "/" else prefix)
    return prefix


# ---------------------------------------------------------------- local disk


class LocalStore:
    """A folder. Safe for many threads and processes of one host.

    New objects are written beside, synced, and linked into place; a swap also holds a file
    lock. A network file system is as good as its hard links, `flock` and `fsync`.
    """

    def __init__(self, folder: str | Path) -> None:
        self._root = Path(folder).expanduser().resolve()
        self.url = str(self._root)
        self._temp = self._root / _PRIVATE / "temp"
        self._durable_folders: set[Path] = set()
        try:
            self._temp.mkdir(parents=True, exist_ok=True)
            self._remove_stale_temp()
            with suppress(PermissionError):
                _sync_folder(self._root.parent)
        except OSError as error:
            raise StorageError(
                f"the store {self.url} cannot be used: {error.strerror}; "
                "name a writable folder as store.url"
            ) from error

    def put_new(self, key: str, data: bytes, *, mode: int = 0o644) -> None:
        """As `Store.put_new`; `mode` are the file's permission bits."""
        target = self._path(key)
        with self._translated(key, writing=True), self._written(data, mode) as temp:
            self._make_folder(target.parent)
            try:
                os.link(temp, target)
            except FileExistsError:
                raise AlreadyExistsError(f"{key} exists in {self.url} already") from None
            _sync_folder(target.parent)

    def read(self, key: str) -> bytes:
        """As `Store.read`."""
        path = self._path(key)
        with self._translated(key):
            return path.read_bytes()

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """As `Store.read_tagged`."""
        data = self.read(key)
        return data, _tag(data)

    def swap(self, key: str, data: bytes, expected: str | None) -> str:
        """As `Store.swap`."""
        if expected is None:
            try:
                self.put_new(key, data)
            except AlreadyExistsError:
                raise ConflictError(f"{key} was created by someone else; read it again") from None
            return _tag(data)
        target = self._path(key)
        with (
            self._translated(key, writing=True),
            self._locked(),
            self._written(data, 0o644) as temp,
        ):
            try:
                found = _tag(target.read_bytes())
            except FileNotFoundError:
                found = ""
            if found != expected:
                raise ConflictError(f"{key} was changed by someone else; read it again")
            temp.rename(target)
            _sync_folder(target.parent)
        return _tag(data)

    def list(self, prefix: str) -> list[str]:
        """As `Store.list`."""
        _checked_prefix(prefix)
        start = self._root / prefix.rpartition("/")[0]
        keys: list[str] = []
        with self._translated(prefix):
            for folder, folders, names in os.walk(start, onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(".")]
                base = PurePosixPath(Path(folder).relative_to(self._root).as_posix())
                keys += [str(base / name) for name in names if not name.startswith(".")]
        return sorted(key for key in keys if key.startswith(prefix))

    def exists(self, key: str) -> bool:
        """As `Store.exists`."""
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """As `Store.delete`."""
        path = self._path(key)
        with self._translated(key), self._locked(), suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    @contextmanager
    def _translated(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            if gone and not writing:
                raise NotFoundError(f"no object {key} in {self.url}") from None
            if error.errno in _FULL:
                raise StorageFullError(
                    f"no space for {key} in {self.url} ({error.strerror}); free some and try again"
                ) from error
            raise StorageError(f"{key} in {self.url}: {error.strerror or error}") from error

    @contextmanager
    def _written(self, data: bytes, mode: int) -> Iterator[Path]:
        """A synced temporary file with `data`, gone afterwards unless it was renamed."""
        temp = self._temp / uuid.uuid4().hex
        file = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            finally:
                os.close(file)
            yield temp
        finally:
            temp.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self._root / _PRIVATE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _make_folder(self, folder: Path) -> None:
        """Create a folder so that it outlives a power cut, with everything above it."""
        if folder in self._durable_folders or folder == self._root:
            return
        self._make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
        _sync_folder(folder.parent)
        self._durable_folders.add(folder)

    def _remove_stale_temp(self) -> None:
        """Drop what killed writers left; a live one keeps its file for seconds only."""
        for temp in self._temp.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - temp.stat().st_mtime > _STALE_TEMP_S:
                    temp.unlink()


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


# ---------------------------------------------------------------- S3


class S3Store:
    """A prefix of an S3 bucket, through s3fs; region and credentials from the environment.

    Every write is a single PUT, because servers differ in which conditions they honour on
    multipart uploads. Listings are never cached.
    """

    def __init__(self, url: str, *, endpoint_url: str = "") -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not url.startswith("s3://") or not bucket:
            raise ConfigError(f"store.url is {url!r}, not of the form s3://bucket/prefix")
        import s3fs  # noqa: PLC0415 - slow to import, and only needed here

        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._fs = s3fs.S3FileSystem(
            endpoint_url=endpoint_url or None, skip_instance_cache=True, use_listings_cache=False
        )

    def probe(self) -> None:
        """Prove with real writes that the server honours conditions, as two writers would.

        Raises:
            ConfigError: If a second create, or a swap with an outdated tag, succeeds.
            StorageError: If the bucket cannot be written at all.
        """
        key = f"{_PRIVATE}/probe-{uuid.uuid4().hex}"
        first = self._put(key, b"first", {"IfNoneMatch": "*"}, lost=AlreadyExistsError)
        try:
            try:
                self._put(key, b"second", {"IfNoneMatch": "*"}, lost=AlreadyExistsError)
            except AlreadyExistsError:
                pass
            else:
                self._refuse("If-None-Match")
            second = self._put(key, b"third", {"IfMatch": first}, lost=ConflictError)
            try:
                self._put(key, b"fourth", {"IfMatch": first}, lost=ConflictError)
            except ConflictError:
                pass
            else:
                self._refuse("If-Match")
            if second == first:
                self._refuse("ETag")
        finally:
            with suppress(StorageError):
                self._call(key, "delete_object", Key=self._prefix + key)

    def put_new(self, key: str, data: bytes) -> None:
        """As `Store.put_new`."""
        self._put(_checked(key), data, {"IfNoneMatch": "*"}, lost=AlreadyExistsError)

    def read(self, key: str) -> bytes:
        """As `Store.read`."""
        return self.read_tagged(key)[0]

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """As `Store.read_tagged`; content and tag come from one answer."""
        from fsspec.asyn import sync  # noqa: PLC0415 - see __init__

        _checked(key)
        with self._translated(key):
            data, tag = sync(self._fs.loop, self._get, self._prefix + key)
        return bytes(data), str(tag)

    def swap(self, key: str, data: bytes, expected: str | None) -> str:
        """As `Store.swap`."""
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            return self._put(_checked(key), data, condition, lost=ConflictError)
        except NotFoundError:
            raise ConflictError(f"{key} was deleted by someone else; read it again") from None

    def list(self, prefix: str) -> list[str]:
        """As `Store.list`."""
        _checked_prefix(prefix)
        keys: list[str] = []
        page: dict[str, str] = {}
        while True:
            answer = self._call(prefix, "list_objects_v2", Prefix=self._prefix + prefix, **page)
            keys += [str(o["Key"]).removeprefix(self._prefix) for o in answer.get("Contents", [])]
            if not answer.get("IsTruncated"):
                return sorted(key for key in keys if not key.startswith("."))
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def exists(self, key: str) -> bool:
        """As `Store.exists`."""
        try:
            self._call(_checked(key), "head_object", Key=self._prefix + key)
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        """As `Store.delete`."""
        self._call(_checked(key), "delete_object", Key=self._prefix + key)

    async def _get(self, path: str) -> tuple[bytes, str]:
        import aiohttp  # noqa: PLC0415 - see __init__

        for attempt in range(_CONFLICT_ATTEMPTS):
            answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=path)
            try:
                async with answer["Body"] as body:
                    return await body.read(), answer["ETag"]
            except (aiohttp.ClientError, TimeoutError):  # cut off in the middle
                if attempt == _CONFLICT_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _put(
        self, key: str, data: bytes, condition: dict[str, str], *, lost: type[StorageError]
    ) -> str:
        """Write under a condition; 409 means that another write is under way, so try again."""
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                answer = self._call(
                    key, "put_object", Key=self._prefix + key, Body=data, **condition
                )
                return str(answer["ETag"])
            except StorageError as error:
                status = _status(error)
                if status == 412:
                    raise lost(f"{key} in {self.url} was written by someone else") from error
                if status != 409 or attempt == _CONFLICT_ATTEMPTS - 1:
                    raise
            time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def _call(self, key: str, method: str, **arguments: Any) -> dict[str, Any]:
        with self._translated(key):
            answer: dict[str, Any] = self._fs.call_s3(method, Bucket=self._bucket, **arguments)
            return answer

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        import aiohttp  # noqa: PLC0415 - see __init__
        from botocore.exceptions import BotoCoreError, NoCredentialsError  # noqa: PLC0415

        try:
            yield
        except NoCredentialsError as error:
            raise StorageError(
                f"no credentials for {self.url}: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or run where a role provides them"
            ) from error
        except (OSError, BotoCoreError, aiohttp.ClientError) as error:
            code = _code(error)
            if code == "NoSuchBucket":
                raise StorageError(
                    f"bucket {self._bucket} does not exist; create it or correct store.url"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise NotFoundError(f"no object {key} in {self.url}") from error
            if _status(error) == 507 or code in {"QuotaExceeded", "XMinioStorageFull"}:
                raise StorageFullError(f"no space for {key} in {self.url}: {error}") from error
            raise StorageError(f"{key} in {self.url}: {error or type(error).__name__}") from error

    def _refuse(self, header: str) -> NoReturn:
        raise ConfigError(
            f"the S3 server behind {self.url} ignores {header}, so two writers could both "
            "win; use AWS S3 or a server with conditional writes"
        )


def _response(error: BaseException | None) -> dict[str, Any]:
    """The server's answer behind an error, however often it was wrapped."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
