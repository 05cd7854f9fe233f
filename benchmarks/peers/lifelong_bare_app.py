"""The Serve application without log, assignment and metrics, to say what these three cost.

Its answers are those of `lifelong_ray`, request id included, from the same batches. Its classes
take the place of ours before the deployments are made of them; a replica imports this module, where
it finds them, and so does the same over there. The process of the models runs this module too, and
sends no pixels back, as nobody writes them down.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from lifelong_ray.feedback import SentImage
from lifelong_ray.on_ray import front, metrics, model_process

_MODULE = "lifelong_bare_app"
_with_pixels = model_process._answered


class AnsweringFront(front.Front):
    """Answers with the stable version, and keeps no account of it."""

    async def answer_together(
        self, images: Sequence[SentImage], *, key: str, override: str | None = None, user: str = ""
    ) -> list[front.Served]:
        """As `Front.answer_together`."""
        stable = self.stable
        if stable is None:
            raise front.NoVersionError("no version is released yet")
        answers = await front.each([stable.answer(image) for image in images])
        return [self._unlogged(answer) for answer in answers]

    def _unlogged(self, answer: front.VersionAnswer) -> front.Served:
        request_id = self._ids.issue(
            time.time(),
            answer.version,
            "stable",
            answer.class_name,
            False,
            chosen=False,
            sticky=False,
        )
        return front.Served(request_id, answer, "stable", audit=False)


class NoMetrics(metrics.FrontMetrics):
    """Counts nothing."""

    def answered(
        self, version: str, variant: str, model_ms: float, *, cached: bool, light: bool
    ) -> None:
        """As `FrontMetrics.answered`."""


def _without_pixels(*question: Any) -> list[Any]:
    return [(answer, None) for answer, _ in _with_pixels(*question)]


front.Front = AnsweringFront  # type: ignore[misc]
metrics.FrontMetrics = NoMetrics  # type: ignore[misc]
model_process._answered = _without_pixels
model_process.__name__ = _MODULE  # what `python -m` is given for the process of the models


def app(args: dict[str, str]) -> Any:
    """Build the application, as serve_app does.

    Raises:
        RuntimeError: If it would be made of other classes than those above.
    """
    import serve_app  # noqa: PLC0415 - once those above are in place
    from lifelong_ray.on_ray import serving  # noqa: PLC0415 - as above

    if serving.Front is not AnsweringFront or serving.metrics.FrontMetrics is not NoMetrics:
        raise RuntimeError(
            "the deployments are made of other classes; import this module before "
            "lifelong_ray.on_ray.serving"
        )
    return serve_app.app(args)


if __name__ == "__main__":
    model_process.main(sys.argv[1:3])
