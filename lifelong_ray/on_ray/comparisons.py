"""Pairs of answers as operators see them: read from the log, summarised, the latest shown.

Knows where the log and the records of rollouts lie. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lifelong_ray.feedback import LogTail
from lifelong_ray.release import ReleaseDesk, summarise_comparisons
from lifelong_ray.storage import Store


def compared(
    store: Store,
    now_s: Callable[[], float],
    *,
    rollout_id: str | None,
    hours: float,
    last: int,
) -> dict[str, Any]:
    """Return what `GET /admin/comparisons` answers.

    Args:
        store: Where the log lies.
        now_s: Unix time.
        rollout_id: The rollout to show, from its start; None shows all of the last `hours`.
        hours: How far to look back where no rollout is named.
        last: How many of the latest pairs to list.

    Raises:
        NotFoundError: If there was never a rollout of that name.
    """
    since_s = now_s() - hours * 3_600
    if rollout_id is not None:
        since_s = ReleaseDesk(store, now_s).rollout(rollout_id).started_at_s
    rows = [
        row
        for row in LogTail(store, "comparisons", since_s, now_s).poll()
        if rollout_id in (None, row.rollout_id)
    ]
    feedback = LogTail(store, "feedback", since_s, now_s).poll() if rows else []
    rows.sort(key=lambda row: (row.at_s, row.request_id))
    return {
        "since_s": since_s,
        "num_comparisons": len(rows),
        "rollouts": [asdict(summary) for summary in summarise_comparisons(rows, feedback)],
        "comparisons": [asdict(row) for row in rows[max(0, len(rows) - last) :]],
    }
