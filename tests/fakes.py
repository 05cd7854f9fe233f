"""Small stand-ins for the outside world that keep real state."""

from __future__ import annotations

import hashlib
import threading

from lifelong_ray.types import AlreadyExistsError, ConflictError, NotFoundError


class MemoryStore:
    """A `Store` in a dictionary; safe for threads.

    Attributes:
        objects: What is stored, by key.
        url: Where it claims to be.
    """

    def __init__(self) -> None:
        self.url = "memory://"
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put_new(self, key: str, data: bytes) -> None:
        with self._lock:
            if _checked(key) in self.objects:
                raise AlreadyExistsError(f"{key} exists already")
            self.objects[key] = bytes(data)

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        with self._lock:
            if _checked(key) not in self.objects:
                raise NotFoundError(f"there is no object {key}")
            data = self.objects[key]
        return data, _tag(data)

    def swap(self, key: str, data: bytes, expected: str | None) -> str:
        with self._lock:
            stored = self.objects.get(_checked(key))
            if (None if stored is None else _tag(stored)) != expected:
                raise ConflictError(f"{key} is no longer what was read")
            self.objects[key] = bytes(data)
        return _tag(data)

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            return sorted(key for key in self.objects if key.startswith(prefix))

    def exists(self, key: str) -> bool:
        with self._lock:
            return _checked(key) in self.objects

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(_checked(key), None)


def _checked(key: str) -> str:
    if not key or any(not part or part.startswith(".") for part in key.split("/")):
        raise ValueError(f"key {key!r} is not a relative POSIX path")
    return key


def _tag(data: bytes) -> str:
    """A tag names content, as that of a real store does."""
    return hashlib.sha256(data).hexdigest()
