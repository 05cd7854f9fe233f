"""The analytic head kept solved, so that a few examples more or less cost little.

Axes: N examples, K modes, M random features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.learning.analytic import AnalyticSums, must_not_owe, target_scales
from lifelong_ray.types import LearningError


@dataclass(frozen=True)
class LiveHead:
    """A head that takes single examples in or out without solving anew: O(M^2) for each.

    The regularisation stays what it was in absolute terms when the head was made.

    Attributes:
        inverse: Of the regularised Gram matrix, float64 (M, M).
        weights: Head for targets of one, float64 (M, K).
        counts: As in the sums.
        mode_class: As in the sums.
        class_balance: As for `AnalyticSums.solve`.
    """

    inverse: Tensor
    weights: Tensor
    counts: Tensor
    mode_class: Tensor
    class_balance: float

    @staticmethod
    def of(sums: AnalyticSums, ridge: float, class_balance: float = 0.0) -> LiveHead:
        """Return the live form of ``sums.solve(ridge, class_balance)``; errors as there."""
        factor = sums.factor(ridge)
        # Two products take a small part of the time of torch.cholesky_inverse on CPUs.
        identity = torch.eye(sums.num_features).to(factor)
        half = torch.linalg.solve_triangular(factor, identity, upper=False)
        return LiveHead(
            half.T @ half,
            torch.cholesky_solve(sums.class_sums, factor),
            sums.counts,
            sums.mode_class,
            class_balance,
        )

    def with_examples(
        self, features_NM: Tensor, modes_N: Tensor, sign: int = 1, *, weight: float = 1.0
    ) -> LiveHead:
        """Return the head with (`sign` 1) or without (-1) a few examples.

        Args:
            features_NM: Their random features.
            modes_N: Their modes.
            sign: 1 or -1.
            weight: How many examples each row counts as: a half in mirrored sums, where an
                example has two rows.

        Raises:
            LearningError: If a mode would be left with fewer than no examples, or the head
                does not hold the examples to be taken out.

        Source: the identity of Woodbury, as used for class-incremental learning by Zhuang
        et al. 2022 (ACIL), arXiv:2205.14922, eq. 12.
        """
        if sign not in {1, -1}:
            raise ValueError(f"the sign of examples is 1 or -1, not {sign}")
        # A row of weight w adds to the sums what w times its square and w times its label do.
        x_NM = features_NM.to(self.inverse) * weight**0.5
        own_NK = F.one_hot(modes_N.long(), len(self.counts)).to(x_NM) * weight**0.5
        counts_K = self.counts + sign * own_NK.sum(0) * weight**0.5
        must_not_owe(self.counts, counts_K, self.mode_class)
        towards_MN = self.inverse @ x_NM.T
        core_NN = x_NM @ towards_MN
        core_NN.diagonal().add_(sign)
        factor, info = torch.linalg.cholesky_ex(sign * core_NN)
        if int(info.item()):
            raise LearningError(
                "the head does not hold the examples to be taken out; solve it anew from the sums"
            )
        gain_NM = torch.cholesky_solve(towards_MN.T, factor)
        missing_NK = own_NK - x_NM @ self.weights
        return replace(
            self,
            inverse=torch.addmm(self.inverse, towards_MN, gain_NM, alpha=-sign),
            weights=self.weights + sign * gain_NM.T @ missing_NK,
            counts=counts_K.clamp(min=0.0),
        )

    def solution(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the head's weights (M, K), as `AnalyticSums.solve` does."""
        scale_K = target_scales(self.counts, self.mode_class, self.class_balance)
        return (self.weights * scale_K).to(dtype)
