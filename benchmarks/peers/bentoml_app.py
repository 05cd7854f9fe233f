"""BentoML with its adaptive batching."""

from __future__ import annotations
