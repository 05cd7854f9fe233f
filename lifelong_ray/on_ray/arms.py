"""Labels of an experiment's answers, read from the log as they come in."""

from __future__ import annotations

from collections.abc import Callable

from lifelong_ray.feedback import FirstLabels, LogTail
from lifelong_ray.release import ArmTally, Experiment
from lifelong_ray.storage import Store
from lifelong_ray.types import ServedRequest


class ArmLabels:
    """Counts labels by arm; a new one over the same log comes to the same counts."""

    def __init__(self, store: Store, experiment: Experiment, now_s: Callable[[], float]) -> None:
        self._arms = list(zip(experiment.versions, experiment.variants, strict=True))
        self._tail = LogTail(store, "feedback", experiment.started_at_s, now_s)
        self._first = FirstLabels()
        self._tallies = [ArmTally() for _ in self._arms]

    def poll(self, began_s: float | None) -> tuple[ArmTally, ...]:
        """Read what is new and return all counts.

        Args:
            began_s: Unix time from which the weights were in force; earlier answers were not
                divided, and tell nothing.
        """
        rows = [row for row in self._tail.poll() if row.kind == "feedback"]
        for answer, label in self._first.among(rows):
            if began_s is not None and answer.at_s >= began_s and not answer.chosen:
                self._count(answer, is_right=answer.class_name == label)
        return tuple(self._tallies)

    def _count(self, answer: ServedRequest, *, is_right: bool) -> None:
        if (answer.version, answer.variant) not in self._arms:
            return
        arm = self._arms.index((answer.version, answer.variant))
        before = self._tallies[arm]
        self._tallies[arm] = ArmTally(
            labelled=before.labelled + answer.audit,
            correct=before.correct + (answer.audit and is_right),
            corrected=before.corrected + (not is_right),
        )
