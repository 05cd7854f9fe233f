"""The first label of each answer, which is the one that counts as evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lifelong_ray.feedback.identity import read_request_id
from lifelong_ray.types import BadRequestIdError, Feedback, ServedRequest


class FirstLabels:
    """Remembers which answers have a label, over as many readings of the log as there are."""

    def __init__(self) -> None:
        self._labelled: set[str] = set()

    def among(self, rows: Sequence[Feedback]) -> Iterator[tuple[ServedRequest, str]]:
        """Answers labelled for the first time, each with its label, in the order of these."""
        for row in sorted(rows, key=lambda row: (row.at_s, row.feedback_id)):
            if row.request_id in self._labelled:
                continue
            self._labelled.add(row.request_id)
            try:
                yield read_request_id(row.request_id), row.label
            except BadRequestIdError:
                continue  # A row that nobody should have written must not stop the release.
