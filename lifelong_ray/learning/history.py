"""What a sequence of updates did: the accuracies after each of them, and what follows.

Experience i is what update i (counted from 0; 0 may be the base training) was for: new
classes, new conditions, or both. It has a test part of its own. ``R[t][i]`` is the accuracy
on the test part of experience i after update t, ``n[i]`` the size of that part, T the number
of updates so far.

A figure is None where it is not defined, such as forgetting after a single update, or where an
accuracy that it needs was not measured: never a mean over whatever happens to be there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Row = tuple[float | None, ...]


@dataclass(frozen=True)
class History:
    """The accuracy matrix of a sequence of updates.

    Two figures pool test examples, ``sum(n[i] * R[t][i]) / sum(n[i])``: final accuracy and
    retention, which are accuracies on everything known. All others are means over experiences
    or updates that count alike, as in the papers they come from.

    Attributes:
        num_examples: n, by experience, of those still to come too.
        rows: R, a row for every update so far.
        within_rows: The same with only those classes competing that were known before the
            update: needed for the experiences before it, and empty if it was not measured.
        untrained: Accuracy on each experience before any training, with random weights.
        joint: Accuracy on experience i of a reference trained on experiences 0 to i together.

    >>> history = History.of([[0.75, 0.0], [0.5, 0.75]], num_examples=[100, 300])
    >>> history.final_accuracy, history.forgetting, history.plasticity
    (0.6875, 0.25, 0.75)
    """

    num_examples: tuple[int, ...]
    rows: tuple[Row, ...] = ()
    within_rows: tuple[Row, ...] = ()
    untrained: Row | None = None
    joint: Row | None = None

    def __post_init__(self) -> None:
        if not self.num_examples or min(self.num_examples) < 1:
            raise ValueError(
                f"the experiences have {list(self.num_examples)} test examples; there must be an "
                "experience, and each needs at least one example"
            )
        if len(self.rows) > len(self.num_examples):
            raise ValueError(
                f"there are {len(self.rows)} updates but {len(self.num_examples)} experiences; "
                "give every update an experience of its own"
            )
        if self.within_rows and len(self.within_rows) != len(self.rows):
            raise ValueError(
                f"there are {len(self.within_rows)} rows within old classes for {len(self.rows)} "
                "updates; give every update one, or none at all"
            )
        named = [(f"row {t}", row) for t, row in enumerate(self.rows)]
        named += [(f"row {t} within old classes", row) for t, row in enumerate(self.within_rows)]
        named += [("untrained", self.untrained or ()), ("joint", self.joint or ())]
        for name, row in named:
            if row and len(row) != len(self.num_examples):
                raise ValueError(
                    f"{name} has {len(row)} accuracies for {len(self.num_examples)} experiences; "
                    "put None where one was not measured"
                )
            for value in row:
                if value is not None and not 0 <= value <= 1:
                    raise ValueError(f"{name} has accuracy {value}; accuracies are from 0 to 1")

    @staticmethod
    def of(
        rows: Iterable[Sequence[float | None]],
        *,
        num_examples: Sequence[int] | None = None,
        within_rows: Iterable[Sequence[float | None]] = (),
        untrained: Sequence[float | None] | None = None,
        joint: Sequence[float | None] | None = None,
    ) -> History:
        """Return the history of a matrix.

        Rows that end early were not measured any further. Without `num_examples` there are as
        many experiences as rows, all of one size.

        >>> History.of([[0.9], [0.6, 0.8]]).rows
        ((0.9, None), (0.6, 0.8))
        """
        given = [tuple(row) for row in rows]
        sizes = tuple(num_examples) if num_examples is not None else (1,) * len(given)
        return History(
            num_examples=sizes,
            rows=tuple(_filled(row, len(sizes)) for row in given),
            within_rows=tuple(_filled(row, len(sizes)) for row in within_rows),
            untrained=None if untrained is None else tuple(untrained),
            joint=None if joint is None else tuple(joint),
        )

    def after_update(
        self, row: Sequence[float | None], within_old: Sequence[float | None] | None = None
    ) -> History:
        """Return the history with one more update; either row may end early."""
        width = len(self.num_examples)
        within_rows = self.within_rows
        if within_old is not None:
            # Nothing is old at the first update, which therefore needs no such row.
            missing = len(self.rows) - len(within_rows)
            within_rows += ((None,) * width,) * missing + (_filled(within_old, width),)
        elif within_rows:
            within_rows += ((None,) * width,)
        return replace(self, rows=(*self.rows, _filled(row, width)), within_rows=within_rows)

    @property
    def final_accuracy(self) -> float | None:
        """Accuracy after the last update on all experiences so far, every example alike.

        ``sum(n[i] * R[T-1][i] for i < T) / sum(n[i] for i < T)``
        """
        if not self.rows:
            return None
        return self._pooled(self.rows[-1], len(self.rows))

    @property
    def final_mean_accuracy(self) -> float | None:
        """The same with every experience alike: ``sum(R[T-1][i] for i < T) / T``.

        Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840 (ACC); Chaudhry et al. 2018,
        arXiv:1801.10112.
        """
        return _mean(self.rows[-1][: len(self.rows)]) if self.rows else None

    @property
    def average_incremental_accuracy(self) -> float | None:
        """Mean over updates of the mean accuracy on the experiences so far.

        ``sum(sum(R[t][i] for i <= t) / (t + 1) for t < T) / T``

        Source: Rebuffi et al. 2017, arXiv:1611.07725, whose experiences are of one size.
        """
        return _mean([_mean(row[: t + 1]) for t, row in enumerate(self.rows)])

    @property
    def forgetting_by_experience(self) -> Row:
        """Best accuracy at any earlier time less the last one, of every experience but the last.

        ``max(R[t][i] for t < T-1) - R[T-1][i] for i < T-1``; negative where the last update
        brought an experience to a new height. Earlier times that were not measured are left
        out, but for the one right after experience i was learned.

        Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3.
        """
        if not self.rows:
            return ()
        *earlier, last = self.rows
        figures: list[float | None] = []
        for i in range(len(earlier)):
            known = [value for row in earlier if (value := row[i]) is not None]
            now, learned = last[i], self.rows[i][i]
            figures.append(None if now is None or learned is None else max(known) - now)
        return tuple(figures)

    @property
    def forgetting(self) -> float | None:
        """Mean of `forgetting_by_experience`; None after a single update."""
        return _mean(self.forgetting_by_experience)

    @property
    def backward_transfer(self) -> float | None:
        """What later updates did to experiences already learned; negative where they forgot.

        ``sum(R[T-1][i] - R[i][i] for i < T-1) / (T-1)``

        Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, eq. 3.
        """
        return _mean([_less(self.rows[-1][i], self.rows[i][i]) for i in range(len(self.rows) - 1)])

    @property
    def forward_transfer(self) -> float | None:
        """What earlier updates did for experiences not yet learned; needs `untrained`.

        ``sum(R[i-1][i] - untrained[i] for 0 < i < T) / (T-1)``

        Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, eq. 4.
        """
        untrained = self.untrained
        if untrained is None:
            return None
        return _mean([_less(self.rows[i - 1][i], untrained[i]) for i in range(1, len(self.rows))])

    @property
    def plasticity(self) -> float | None:
        """Mean accuracy on an experience right after learning it: ``sum(R[i][i]) / T``."""
        return _mean([row[i] for i, row in enumerate(self.rows)])

    @property
    def intransigence(self) -> float | None:
        """What learning one after the other cost each experience; needs `joint`.

        ``sum(joint[i] - R[i][i] for i < T) / T``; Chaudhry et al. give it by experience.

        Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3.
        """
        joint = self.joint
        if joint is None:
            return None
        return _mean([_less(joint[i], row[i]) for i, row in enumerate(self.rows)])

    @property
    def retention_by_update(self) -> Row:
        """What each update after the first left of the accuracy on what was known before it.

        ``sum(n[i] * R[t][i] for i < t) / sum(n[i] * R[t-1][i] for i < t)`` for t from 1. Above
        1 where the update improved what was known; None too where nothing was right before.
        """
        return self._retentions(self.rows)

    @property
    def retention(self) -> float | None:
        """Mean of `retention_by_update`: what one update leaves; None after a single one."""
        return _mean(self.retention_by_update)

    @property
    def final_retention(self) -> float | None:
        """What all updates together left of what each experience was learned to.

        ``sum(n[i] * R[T-1][i] for i < T-1) / sum(n[i] * R[i][i] for i < T-1)``
        """
        num_earlier = len(self.rows) - 1
        if num_earlier < 1:
            return None
        learned = tuple(self.rows[i][i] for i in range(num_earlier))
        return _ratio(self._pooled(self.rows[-1], num_earlier), self._pooled(learned, num_earlier))

    @property
    def retention_within_old_by_update(self) -> Row:
        """As `retention_by_update`, after the update with only the known classes competing.

        What is missing here is forgotten; what is missing in retention besides was confused
        with new classes. Needs `within_rows`.
        """
        return self._retentions(self.within_rows)

    @property
    def retention_within_old(self) -> float | None:
        """Mean of `retention_within_old_by_update`."""
        return _mean(self.retention_within_old_by_update)

    def summary(self) -> dict[str, float | None]:
        """Return all figures by name, ready for a report.

        >>> History.of([[0.5]]).summary()["final_accuracy"]
        0.5
        """
        return {
            "final_accuracy": self.final_accuracy,
            "final_mean_accuracy": self.final_mean_accuracy,
            "average_incremental_accuracy": self.average_incremental_accuracy,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "plasticity": self.plasticity,
            "intransigence": self.intransigence,
            "retention": self.retention,
            "final_retention": self.final_retention,
            "retention_within_old": self.retention_within_old,
        }

    def _retentions(self, after_rows: tuple[Row, ...]) -> Row:
        return tuple(
            _ratio(self._pooled(after_rows[t], t), self._pooled(self.rows[t - 1], t))
            for t in range(1, len(after_rows))
        )

    def _pooled(self, row: Row, num_experiences: int) -> float | None:
        """Accuracy on the test examples of the first experiences together."""
        sizes = self.num_examples[:num_experiences]
        right: list[float] = []
        for size, value in zip(sizes, row, strict=False):
            if value is None:
                return None
            right.append(size * value)
        return math.fsum(right) / sum(sizes)


def _filled(row: Sequence[float | None], width: int) -> Row:
    return (*row, *[None] * (width - len(row)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before
