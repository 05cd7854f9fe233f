"""Answers given lately, by version and by the pixels they were about.

Bounded in bytes; what was not asked for the longest goes first. Knows nothing of HTTP or models.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

A = TypeVar("A")

_ENTRY_BYTES = 400  # Keys, and the objects around an answer, about.
_VALUE_BYTES = 32  # A Python float in a tuple.


class AnswerCache(Generic[A]):
    """Keeps answers of any kind; used by one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        """Keep so many bytes of answers, about; 0 keeps none."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: OrderedDict[tuple[str, str], tuple[A, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, version: str, content_hash: str) -> A | None:
        """Return what a version said about an image; None where that is not known any more."""
        found = self._answers.get((version, content_hash))
        if found is None:
            return None
        self._answers.move_to_end((version, content_hash))
        return found[0]

    def put(self, version: str, content_hash: str, answer: A, *, num_values: int) -> None:
        """Remember an answer of so many numbers."""
        size = _ENTRY_BYTES + _VALUE_BYTES * num_values
        key = (version, content_hash)
        if size > self._max_bytes or key in self._answers:
            return
        self._answers[key] = answer, size
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (_, freed) = self._answers.popitem(last=False)
            self._bytes -= freed
