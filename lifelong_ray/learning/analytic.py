"""The analytic head: ridge regression decided by sums over examples.

Sums can be added example by example, class by class, worker by worker, in any order,
and subtracted again; the head that follows from them is the one that training on all
the examples at once would give. Does not know where features come from.

Axes: N examples, C classes, D backbone features, M random features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.types import LearningError


@dataclass(frozen=True)
class AnalyticSums:
    """Everything that the ridge solution needs to know of the examples, in float64.

    Attributes:
        gram: Sum of outer products of feature vectors, (M, M).
        class_sums: Sum of feature vectors by class, (M, C).
        counts: Examples by class, (C,); weighted examples count by their weight.
    """

    gram: Tensor
    class_sums: Tensor
    counts: Tensor

    @staticmethod
    def empty(num_features: int, num_classes: int) -> AnalyticSums:
        """Return the sums over no examples."""
        return AnalyticSums(
            torch.zeros(num_features, num_features, dtype=torch.float64),
            torch.zeros(num_features, num_classes, dtype=torch.float64),
            torch.zeros(num_classes, dtype=torch.float64),
        )

    @staticmethod
    def of(
        features_NM: Tensor, labels_N: Tensor, num_classes: int, weights_N: Tensor | None = None
    ) -> AnalyticSums:
        """Return the sums over examples; `weights_N` lets one stand for several."""
        x_NM = features_NM.double()
        targets_NC = F.one_hot(labels_N, num_classes).double()
        if weights_N is not None:
            targets_NC = targets_NC * weights_N.double()[:, None]
        weighted_NM = x_NM if weights_N is None else x_NM * weights_N.double()[:, None]
        return AnalyticSums(x_NM.T @ weighted_NM, x_NM.T @ targets_NC, targets_NC.sum(0))

    @property
    def num_classes(self) -> int:
        """Classes that the sums distinguish."""
        return self.counts.shape[0]

    def merge(self, other: AnalyticSums) -> AnalyticSums:
        """Return the sums over both sets of examples."""
        self._must_match(other)
        return AnalyticSums(
            self.gram + other.gram,
            self.class_sums + other.class_sums,
            self.counts + other.counts,
        )

    def add(self, features_NM: Tensor, labels_N: Tensor) -> AnalyticSums:
        """Return the sums with more examples."""
        return self.merge(AnalyticSums.of(features_NM, labels_N, self.num_classes))

    def subtract(self, features_NM: Tensor, labels_N: Tensor) -> AnalyticSums:
        """Return the sums without examples that they hold: exact unlearning of the head.

        Raises:
            LearningError: If a class would be left with fewer than no examples.
        """
        other = AnalyticSums.of(features_NM, labels_N, self.num_classes)
        counts_C = self.counts - other.counts
        if bool((counts_C < 0).any()):
            worst = int(counts_C.argmin())
            raise LearningError(
                f"class {worst} has {self.counts[worst]:g} examples in the sums, and "
                f"{other.counts[worst]:g} were to be taken out; subtract only what was added"
            )
        return AnalyticSums(self.gram - other.gram, self.class_sums - other.class_sums, counts_C)

    def grow(self, num_classes: int) -> AnalyticSums:
        """Return the sums with room for more classes, of which no example was seen yet."""
        missing = num_classes - self.num_classes
        if missing < 0:
            raise ValueError(f"sums of {self.num_classes} classes cannot shrink to {num_classes}")
        return AnalyticSums(
            self.gram,
            F.pad(self.class_sums, (0, missing)),
            F.pad(self.counts, (0, missing)),
        )

    def solve(self, ridge: float) -> Tensor:
        """Return the head's weights (M, C), float32.

        Raises:
            LearningError: If the sums are not finite or the system cannot be solved.
        """
        if not bool(torch.isfinite(self.gram).all()):
            raise LearningError("the analytic sums are not finite; the backbone has overflowed")
        solution: Tensor = torch.cholesky_solve(self.class_sums, self._factor(ridge))
        return solution.float()

    def left_out_scores(
        self, features_NM: Tensor, labels_N: Tensor, weights_N: Tensor, ridge: float
    ) -> Tensor:
        """Return for each example the scores (N, C) of the head fitted without it.

        Args:
            features_NM: Examples that the sums hold.
            labels_N: Their classes.
            weights_N: The weights they were added with.
            ridge: As for `solve`.

        Source: the closed form of leave-one-out for linear smoothers, Hastie et al. 2009,
        eq. 7.64.
        """
        factor = self._factor(ridge)
        x_NM = features_NM.double()
        scores_NC: Tensor = x_NM @ torch.cholesky_solve(self.class_sums, factor)
        half_MN = torch.linalg.solve_triangular(factor, x_NM.T, upper=False)
        # Sums that are not exact may not hold an example as it is now: stay below one.
        leverage_N = (weights_N.double() * half_MN.square().sum(0)).clamp(max=0.999)
        own_NC = F.one_hot(labels_N, self.num_classes).double()
        left_out_NC: Tensor = scores_NC - leverage_N[:, None] * own_NC
        left_out_NC /= (1 - leverage_N)[:, None]
        return left_out_NC

    def _factor(self, ridge: float) -> Tensor:
        system = self.gram.clone()
        system.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info.item()):
            raise LearningError(
                f"the analytic head has no solution with ridge {ridge:g}; "
                "raise learning.analytic.ridge"
            )
        lower: Tensor = factor
        return lower

    def _must_match(self, other: AnalyticSums) -> None:
        if self.class_sums.shape != other.class_sums.shape:
            raise ValueError(
                f"sums of shape {tuple(self.class_sums.shape)} and "
                f"{tuple(other.class_sums.shape)} do not add up; grow the smaller one first"
            )


def projection(dim: int, num_features: int, seed: int) -> Tensor:
    """Return the random projection (D, M) of the analytic head, by `seed` alone.

    Source: McDonnell et al. 2023 (RanPAC), arXiv:2307.02251.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, num_features, generator=generator) / math.sqrt(dim)
