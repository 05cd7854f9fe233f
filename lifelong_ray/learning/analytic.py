"""The analytic head: ridge regression decided by sums over examples.

Sums can be added example by example, class by class, worker by worker, in any order,
and subtracted again; the head that follows from them is the one that training on all
the examples at once would give. Of integer features the sums are whole numbers, exact in
float64: any order and grouping gives the same sums to the bit. Does not know where
features come from.

Axes: N examples, C classes, K modes, M random features, P probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.gram import (
    add_float_sums,
    add_integer_sums,
)
from lifelong_ray.types import LearningError

_ROWS = 2_048
_STEPS_PER_DECADE = 2
_LOWEST_STEP, _HIGHEST_STEP = -6 * _STEPS_PER_DECADE, 0
_FLAT = 0.003
_NUM_PROBES, _EXACT_TRACE_FEATURES = 16, 512
_CHOOSING_FEATURES = 1_000
_CORRECTED_FEATURES, _MOST_CORRECTIONS, _CORRECTED_TO = 4_000, 6, 1e-9
_OVERFLOWED = (
    "the analytic sums are not finite; the backbone has overflowed: lower the learning rate and "
    "train again"
)


@dataclass(frozen=True)
class AnalyticSums:
    """Everything that the ridge solution needs to know of the examples, in float64.

    The columns are modes. A mode is one appearance of a class: an update that shows a known
    class in a new guise may open another mode for it, so that the linear head need not fit
    one target through several guises. Sums never need more than one mode per class.

    Attributes:
        gram: Sum of outer products of feature vectors, (M, M).
        class_sums: Sum of feature vectors by mode, (M, K).
        counts: Examples by mode, (K,); weighted examples count by their weight.
        mode_class: The class of each mode, int64 (K,).
        num_classes: C; each class has a mode, with or without examples.
        history: The mode that each class's examples of each update went to, int64 (U, C); -1
            where there were none or nobody knows. A base training is update 0.
    """

    gram: Tensor
    class_sums: Tensor
    counts: Tensor
    mode_class: Tensor
    num_classes: int
    history: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    @staticmethod
    def empty(num_features: int, num_classes: int) -> AnalyticSums:
        """Return the sums over no examples, with one mode per class, in order."""
        return AnalyticSums(
            torch.zeros(num_features, num_features, dtype=torch.float64),
            torch.zeros(num_features, num_classes, dtype=torch.float64),
            torch.zeros(num_classes, dtype=torch.float64),
            torch.arange(num_classes),
            num_classes,
        )

    @staticmethod
    def of(
        features_NM: Tensor,
        modes_N: Tensor,
        num_classes: int,
        weights_N: Tensor | None = None,
        *,
        mode_class: Tensor | None = None,
        onto: AnalyticSums | None = None,
    ) -> AnalyticSums:
        """Return the sums over examples, exact if features are int8 and weights whole numbers.

        Args:
            features_NM: int8 of sizes up to 127, or floating-point numbers. int8 is tens of
                times as fast.
            modes_N: The mode of each example.
            num_classes: C.
            weights_N: Lets one example stand for several.
            mode_class: As the attribute; None means one mode per class, in order.
            onto: Sums of the same modes that nobody else holds: these examples are added to
                them in place, which spares a matrix of M squared.

        Raises:
            LearningError: If the sums are not finite.
            ValueError: If the shapes do not fit, or a mode is not among those of the sums.
        """
        if mode_class is None:
            mode_class = torch.arange(num_classes)
        mode_class = mode_class.to(features_NM.device)
        _must_fit(features_NM, modes_N, weights_N)
        if len(modes_N) and not 0 <= int(modes_N.min()) <= int(modes_N.max()) < len(mode_class):
            raise ValueError(
                f"modes from {int(modes_N.min())} to {int(modes_N.max())} are not among the "
                f"{len(mode_class)} modes of the sums"
            )
        modes_N = modes_N.to(features_NM.device)
        own_NK = F.one_hot(modes_N.long(), len(mode_class)).to(torch.int8)
        if weights_N is not None:
            weights_N = weights_N.to(features_NM.device, torch.float64)
        if onto is None:
            onto = _empty(features_NM, mode_class, num_classes)
        gram, class_sums, counts = onto.gram, onto.class_sums, onto.counts
        if features_NM.dtype != torch.int8:
            add_float_sums(gram, class_sums, features_NM, own_NK, weights_N)
        else:
            add_integer_sums(gram, class_sums, features_NM, own_NK, weights_N)
        counts += (
            own_NK.sum(0).double()
            if weights_N is None
            else torch.stack([weights_N[modes_N == k].sum() for k in range(len(mode_class))])
        )
        if not _all_finite(gram.diagonal(), class_sums, counts):
            raise LearningError(_OVERFLOWED)
        return onto

    @property
    def num_features(self) -> int:
        """M."""
        return self.gram.shape[0]

    @property
    def num_modes(self) -> int:
        """K."""
        return self.counts.shape[0]

    @property
    def newest_modes(self) -> Tensor:
        """The last mode of each class, (C,): ``sums.newest_modes[labels]`` are modes."""
        newest_C = torch.zeros(self.num_classes, dtype=torch.int64, device=self.counts.device)
        positions_K = torch.arange(self.num_modes, device=self.counts.device)
        return newest_C.scatter_reduce(0, self.mode_class, positions_K, "amax")

    def to(self, device: torch.device | str) -> AnalyticSums:
        """Return the same sums on another device."""
        return AnalyticSums(
            self.gram.to(device),
            self.class_sums.to(device),
            self.counts.to(device),
            self.mode_class.to(device),
            self.num_classes,
            self.history.to(device),
        )

    def noted(self, update: int, classes: Iterable[int]) -> AnalyticSums:
        """Return the sums with a note that an update's classes go to their newest modes."""
        missing = update + 1 - len(self.history)
        wide = self.num_classes - self.history.shape[1]
        history_UC = F.pad(self.history, (0, wide, 0, missing), value=-1)
        mine = list(classes)
        history_UC[update, mine] = self.newest_modes[mine].to(history_UC.device)
        return replace(self, history=history_UC)

    def modes_of(self, updates_N: Tensor, labels_N: Tensor) -> Tensor:
        """Return the modes (N,) that examples went to: their class's newest where nobody knows."""
        newest_N = self.newest_modes[labels_N]
        width = self.history.shape[1]
        known_N = (updates_N < len(self.history)) & (labels_N < width)
        modes_N = newest_N.clone()
        modes_N[known_N] = self.history[updates_N[known_N], labels_N[known_N]]
        return torch.where(modes_N < 0, newest_N, modes_N)

    def merge(self, other: AnalyticSums) -> AnalyticSums:
        """Return the sums over both sets of examples."""
        self._must_match(other)
        return replace(
            self,
            gram=self.gram + other.gram,
            class_sums=self.class_sums + other.class_sums,
            counts=self.counts + other.counts,
        )

    def merged_into(self, other: AnalyticSums) -> AnalyticSums:
        """Return what `merge` does, in the tensors of `other`, which nobody else may hold."""
        self._must_match(other)
        return replace(
            self,
            gram=other.gram.add_(self.gram),
            class_sums=other.class_sums.add_(self.class_sums),
            counts=other.counts.add_(self.counts),
        )

    def add(
        self, features_NM: Tensor, modes_N: Tensor, weights_N: Tensor | None = None
    ) -> AnalyticSums:
        """Return the sums with more examples; arguments as in `of`."""
        return self.merge(self._same_modes(features_NM, modes_N, weights_N))

    def subtract(
        self, features_NM: Tensor, modes_N: Tensor, weights_N: Tensor | None = None
    ) -> AnalyticSums:
        """Return the sums without examples that they hold: exact unlearning of the head.

        Raises:
            LearningError: If a mode would be left with fewer than no examples.
        """
        return self.less(self._same_modes(features_NM, modes_N, weights_N))

    def less(self, other: AnalyticSums) -> AnalyticSums:
        """Return the sums without those over some of their examples; errors as in `subtract`."""
        self._must_match(other)
        counts_K = self.counts - other.counts
        must_not_owe(self.counts, counts_K, self.mode_class)
        return replace(
            self,
            gram=self.gram - other.gram,
            class_sums=self.class_sums - other.class_sums,
            counts=counts_K.clamp(min=0.0),
        )

    def grow(self, num_classes: int) -> AnalyticSums:
        """Return the sums with room for more classes, of which no example was seen yet."""
        if num_classes < self.num_classes:
            raise ValueError(f"sums of {self.num_classes} classes cannot shrink to {num_classes}")
        return self._with_modes(range(self.num_classes, num_classes), num_classes)

    def open_modes(self, classes: Iterable[int]) -> AnalyticSums:
        """Return the sums with a further, empty mode for each of some known classes.

        A class whose newest mode is still empty keeps that one.
        """
        wanted = sorted(set(classes))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_classes:
            raise ValueError(f"classes {wanted} are not among the {self.num_classes} of the sums")
        newest_C = self.newest_modes
        return self._with_modes(
            [c for c in wanted if self.counts[newest_C[c]] > 0], self.num_classes
        )

    def merged_modes(self, max_modes: int) -> tuple[AnalyticSums, Tensor]:
        """Put together the most alike modes of each class until it has at most `max_modes`.

        Most alike are those with the nearest mean features; empty ones go first. As columns
        add up, the result is exactly what the examples would have given under the new modes.

        Returns:
            The sums, and for each old mode its new one, (K,).
        """
        if max_modes < 1:
            raise ValueError(f"each class needs at least one mode, not {max_modes}")
        groups: list[list[int]] = [[k] for k in range(self.num_modes)]
        class_of = self.mode_class.tolist()
        for c in range(self.num_classes):
            while sum(class_of[group[0]] == c for group in groups) > max_modes:
                mine = [group for group in groups if class_of[group[0]] == c]
                one, other = self._most_alike(mine)
                groups.remove(other)
                one.extend(other)
        new_K = torch.zeros(self.num_modes, dtype=torch.int64)
        for position, group in enumerate(groups):
            new_K[group] = position
        first_of = [group[0] for group in groups]
        merged = replace(
            self,
            class_sums=torch.stack([self.class_sums[:, group].sum(1) for group in groups], 1),
            counts=torch.stack([self.counts[group].sum() for group in groups]),
            mode_class=self.mode_class[first_of],
        )
        new_K = new_K.to(self.mode_class.device)
        return replace(merged, history=history_after(self.history, new_K)), new_K

    def without_empty_modes(self) -> AnalyticSums:
        """Return the sums without modes that have no examples, but for one of each class."""
        held_K = (self.counts > 0).tolist()
        class_of = self.mode_class.tolist()
        shown = {c for c, held in zip(class_of, held_K, strict=True) if held}
        kept: list[int] = []
        for k, c in enumerate(class_of):
            if held_K[k] or c not in shown:
                kept.append(k)
                shown.add(c)
        if len(kept) == self.num_modes:
            return self
        new_K = torch.full_like(self.mode_class, -1)
        new_K[kept] = torch.arange(len(kept), device=new_K.device)
        return replace(
            self,
            class_sums=self.class_sums[:, kept],
            counts=self.counts[kept],
            mode_class=self.mode_class[kept],
            history=history_after(self.history, new_K.to(self.history.device)),
        )

    def decayed(self, factor: float) -> AnalyticSums:
        """Return the sums with every example's weight multiplied by `factor`."""
        if factor == 1:
            return self
        return replace(
            self,
            gram=self.gram * factor,
            class_sums=self.class_sums * factor,
            counts=self.counts * factor,
        )

    def absolute_ridge(self, ridge: float) -> float:
        """Return what is added to the Gram matrix's diagonal: a share of its mean."""
        return ridge * float(self.gram.diagonal().mean()) if self.num_features else ridge

    def solve(
        self, ridge: float, class_balance: float = 0.0, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the head's weights (M, K).

        Args:
            ridge: Regularisation, as a share of the mean squared feature's sum: the mean of
                the Gram matrix's diagonal.
            class_balance: Power b of the mean class's count over a rarer class's own, by which
                its targets are multiplied: 0 weighs every example alike, 1 makes the sums of
                rare classes those of as many examples as the mean class has. The Gram matrix
                does not know of classes, so that it stays as it is.
            dtype: Of the result. For float64, and where there are few features, the computation
                is in float64; else a factor in float32, which takes half the time, is corrected
                until what is left is below a hundredth of float32's own rounding.

        Raises:
            LearningError: If the sums are not finite or the system cannot be solved.
        """
        targets_MK = self.class_sums * self._target_scales(class_balance)
        solution: Tensor | None = None
        if dtype == torch.float32 and self.num_features >= _CORRECTED_FEATURES:
            solution = self._corrected_solution(targets_MK, ridge)
        if solution is None:
            solution = torch.cholesky_solve(targets_MK, self.factor(ridge))
        if not _all_finite(solution):
            raise _no_solution(ridge)
        return solution.to(dtype)

    def _corrected_solution(self, targets_MK: Tensor, ridge: float) -> Tensor | None:
        """Solve by a factor in float32 and corrections in float64; None where that fails.

        Source: iterative refinement in mixed precision, Buttari et al. 2007, as in LAPACK's
        dsposv.
        """
        size, added = float(targets_MK.norm()), self.absolute_ridge(ridge)
        system = self.gram.float()
        system.diagonal().add_(added)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info.item()) or not 0 < size < math.inf:
            return None
        solution_MK, left_MK = torch.zeros_like(targets_MK), targets_MK
        for _ in range(_MOST_CORRECTIONS):
            step_MK = torch.cholesky_solve((left_MK / size).float(), factor)
            solution_MK = solution_MK + step_MK.double() * size
            left_MK = targets_MK - self.gram @ solution_MK - added * solution_MK
            if float(left_MK.norm()) <= _CORRECTED_TO * size:
                return solution_MK
        return None

    def choose_ridge(self, previous: float | None = None, *, views: int = 1) -> float:
        """Return the ridge, for `solve`, that the sums themselves find best.

        With at least twice as many examples as features (as the first 1,000 of them, which
        stand for all where there are more) by generalised cross-validation:
        the least RSS / (N - df)^2, with residuals and the trace of the hat matrix from the
        sums (the trace estimated with a few random vectors where M is large). Where it is flat
        the lowest ridge of a decade is taken: shrinking costs accuracy before it costs
        squares. With fewer examples, where that criterion divides nothing by nothing, by the
        largest marginal likelihood of the Gaussian model.
        Twice per decade from 1e-6 to 1 is looked at, coarsely first.

        Args:
            previous: The choice before few examples changed; only its neighbours are tried.
            views: How many looks at an example share its weight. They count as examples of their
                own here: on photographs and their mirror images that came nearest to the best.

        Raises:
            LearningError: If the sums hold no examples, or none of the ridges has a solution.

        Sources: Golub, Heath and Wahba 1979, Generalized cross-validation as a method for
        choosing a good ridge parameter; MacKay 1992, Bayesian interpolation; Hutchinson 1990
        for the trace.
        """
        if self.num_features == 0:
            return previous or _ridge_at(_LOWEST_STEP)
        if self.num_features > _CHOOSING_FEATURES:
            # Random features are drawn alike: some of them stand for all, at the same ridge
            # relative to the kernel, and a factor costs the cube of their number.
            share = _CHOOSING_FEATURES / self.num_features
            some = replace(
                self,
                gram=self.gram[:_CHOOSING_FEATURES, :_CHOOSING_FEATURES],
                class_sums=self.class_sums[:_CHOOSING_FEATURES],
            )
            near = None if previous is None else previous * share
            return min(some.choose_ridge(near, views=views) / share, 1.0)
        if views > 1:
            return self.decayed(views).choose_ridge(previous)
        scores: dict[int, float] = {}

        def try_steps(steps: Iterable[int]) -> int:
            for step in steps:
                if _LOWEST_STEP <= step <= _HIGHEST_STEP and step not in scores:
                    scores[step] = self._badness(_ridge_at(step))
            return min(scores, key=lambda step: (scores[step], -step))

        if previous is not None and previous > 0:
            near = round(math.log10(previous) * _STEPS_PER_DECADE)
            near = min(max(near, _LOWEST_STEP), _HIGHEST_STEP)
            best = try_steps((near - 1, near, near + 1))
        else:
            best = try_steps(range(_LOWEST_STEP, _HIGHEST_STEP + 1, _STEPS_PER_DECADE))
            best = try_steps((best - 1, best + 1))
        if math.isinf(scores[best]):
            raise _no_solution(_ridge_at(max(scores)))
        slack = 0.0 if self._has_few_examples() else _FLAT
        good = (step for step in scores if scores[step] <= scores[best] + slack)
        return _ridge_at(min(step for step in good if step >= best - _STEPS_PER_DECADE))

    def left_out_scores(
        self,
        features_NM: Tensor,
        modes_N: Tensor,
        weights_N: Tensor,
        ridge: float,
        class_balance: float = 0.0,
    ) -> Tensor:
        """Return for each example the scores (N, K) of the head fitted without it.

        The ridge and the balance stay as they are with it.

        Args:
            features_NM: Examples that the sums hold.
            modes_N: Their modes.
            weights_N: The weights they were added with.
            ridge: As for `solve`.
            class_balance: As for `solve`.

        Source: the closed form of leave-one-out for linear smoothers, Hastie et al. 2009,
        eq. 7.64.
        """
        _must_fit(features_NM, modes_N, weights_N, self.num_features)
        factor = self.factor(ridge)
        scale_K = self._target_scales(class_balance)
        weights_MK = torch.cholesky_solve(self.class_sums * scale_K, factor)
        parts = []
        for first in range(0, len(features_NM), _ROWS):
            piece = slice(first, first + _ROWS)
            x_NM = features_NM[piece].double()
            half_MN = torch.linalg.solve_triangular(factor, x_NM.T, upper=False)
            # Sums that are not exact may not hold an example as it is now: stay below one.
            leverage_N = (weights_N[piece].double() * half_MN.square().sum(0)).clamp(max=0.999)
            own_NK = F.one_hot(modes_N[piece], self.num_modes).double() * scale_K
            left_out_NK = x_NM @ weights_MK - leverage_N[:, None] * own_NK
            parts.append(left_out_NK / (1 - leverage_N)[:, None])
        return torch.cat(parts) if parts else scale_K.new_zeros(0, self.num_modes)

    def _target_scales(self, class_balance: float) -> Tensor:
        return target_scales(self.counts, self.mode_class, class_balance)

    def _same_modes(
        self, features_NM: Tensor, modes_N: Tensor, weights_N: Tensor | None
    ) -> AnalyticSums:
        return AnalyticSums.of(
            features_NM, modes_N, self.num_classes, weights_N, mode_class=self.mode_class
        )

    def _with_modes(self, classes: Iterable[int], num_classes: int) -> AnalyticSums:
        more = torch.tensor(list(classes), dtype=torch.int64, device=self.mode_class.device)
        return AnalyticSums(
            self.gram,
            F.pad(self.class_sums, (0, len(more))),
            F.pad(self.counts, (0, len(more))),
            torch.cat([self.mode_class, more]),
            num_classes,
            self.history,
        )

    def _most_alike(self, groups: list[list[int]]) -> tuple[list[int], list[int]]:
        sums = torch.stack([self.class_sums[:, group].sum(1) for group in groups])
        counts = torch.stack([self.counts[group].sum() for group in groups])
        means = sums / counts.clamp(min=1e-12)[:, None]
        apart = torch.cdist(means, means)
        empty = counts <= 0
        apart[empty], apart[:, empty] = 0.0, 0.0
        size = len(groups)
        apart[torch.ones(size, size, device=apart.device).tril().bool()] = math.inf
        one, other = divmod(int(apart.argmin()), size)
        return groups[one], groups[other]

    def _badness(self, ridge: float) -> float:
        """The logarithm of `choose_ridge`'s criterion; infinite where there is no solution."""
        num_examples, width = float(self.counts.sum()), self.num_features
        if num_examples <= 0:
            raise LearningError("the analytic sums hold no examples; add some before solving")
        try:
            factor = self.factor(ridge)
        except LearningError:
            return math.inf
        added = self.absolute_ridge(ridge)
        weights_MK = torch.cholesky_solve(self.class_sums, factor)
        explained = float((weights_MK * self.class_sums).sum())
        if self._has_few_examples():
            unexplained = max(num_examples - explained, 1e-9 * num_examples)
            log_det = 2 * float(factor.diagonal().log().sum()) - width * math.log(added)
            return num_examples * math.log(unexplained) + log_det
        rss = num_examples - explained - added * float(weights_MK.square().sum())
        free = num_examples - width + added * _inverse_trace(factor)
        return math.log(max(rss, 1e-9 * num_examples)) - 2 * math.log(max(free, 1.0))

    def _has_few_examples(self) -> bool:
        return float(self.counts.sum()) < 2 * self.num_features

    def factor(self, ridge: float) -> Tensor:
        """Return the lower Cholesky factor (M, M) of the regularised Gram matrix.

        Raises:
            LearningError: If the sums are not finite or the system cannot be solved.
        """
        if not _all_finite(self.gram, self.class_sums):
            raise LearningError(_OVERFLOWED)
        system = self.gram.clone()
        system.diagonal().add_(self.absolute_ridge(ridge))
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info.item()):
            raise _no_solution(ridge)
        lower: Tensor = factor
        return lower

    def _must_match(self, other: AnalyticSums) -> None:
        if self.class_sums.shape != other.class_sums.shape or not torch.equal(
            self.mode_class, other.mode_class
        ):
            raise ValueError(
                f"sums of shape {tuple(self.class_sums.shape)} and "
                f"{tuple(other.class_sums.shape)} do not add up; grow the smaller one first, "
                "and give both the same modes"
            )


def _must_fit(
    features_NM: Tensor, modes_N: Tensor, weights_N: Tensor | None, width: int | None = None
) -> None:
    """Refuse examples of which each has not one row of features, one mode and one weight."""
    wide = features_NM.dim() == 2 and width in (None, features_NM.shape[1])
    rows = (len(features_NM),) if wide else ()
    weighed = weights_N is None or tuple(weights_N.shape) == rows
    if not wide or tuple(modes_N.shape) != rows or modes_N.is_floating_point() or not weighed:
        weights = "" if weights_N is None else f", weights of shape {tuple(weights_N.shape)}"
        raise ValueError(
            f"features of shape {tuple(features_NM.shape)}, {modes_N.dtype} modes of shape "
            f"{tuple(modes_N.shape)}{weights} do not fit together"
            f"{'' if width is None else f' or sums over {width} features'}; give each example a "
            "row, a whole number as its mode, and one weight"
        )


def _empty(features_NM: Tensor, mode_class: Tensor, num_classes: int) -> AnalyticSums:
    width, num_modes = features_NM.shape[1], len(mode_class)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=features_NM.device)

    return AnalyticSums(
        zeros(width, width), zeros(width, num_modes), zeros(num_modes), mode_class, num_classes
    )


def history_after(history_UC: Tensor, new_K: Tensor) -> Tensor:
    """Return the history once each old mode is mode `new_K` of the new ones; -1 is none."""
    return torch.where(history_UC < 0, history_UC, new_K[history_UC.clamp(min=0)])


def target_scales(counts_K: Tensor, mode_class_K: Tensor, class_balance: float) -> Tensor:
    """What the target of each mode is multiplied by, (K,); one for classes without examples.

    The modes of a class share one scale: rare is said of classes, not of appearances. Frequent
    classes are not held down, so that about equal ones keep the balance of the examples.
    """
    counts_C = counts_K.new_zeros(int(mode_class_K.max()) + 1) if len(counts_K) else counts_K
    counts_C = counts_C.index_add(0, mode_class_K, counts_K)
    present_C = counts_C > 0
    if not class_balance or not bool(present_C.any()):
        return torch.ones_like(counts_K)
    rarity_C = (counts_C[present_C].mean() / counts_C.clamp(min=1e-12)).clamp(min=1.0)
    scale_C = torch.where(present_C, rarity_C**class_balance, torch.ones_like(counts_C))
    return scale_C[mode_class_K]


def _inverse_trace(factor: Tensor) -> float:
    """Trace of the inverse of the matrix with this Cholesky factor; an estimate if it is large."""
    width = factor.shape[0]
    if width <= _EXACT_TRACE_FEATURES:
        probes_MP, per_probe = torch.eye(width).to(factor), 1.0
    else:
        generator = generator_for(0, "trace probes", width)
        signs = torch.randint(0, 2, (width, _NUM_PROBES), generator=generator) * 2 - 1
        probes_MP, per_probe = signs.to(factor), 1 / _NUM_PROBES
    half_MP = torch.linalg.solve_triangular(factor, probes_MP, upper=False)
    return float(half_MP.square().sum()) * per_probe


def _ridge_at(step: int) -> float:
    ridge: float = 10.0 ** (step / _STEPS_PER_DECADE)
    return ridge


def must_not_owe(had_K: Tensor, left_K: Tensor, mode_class: Tensor) -> None:
    """Refuse to take more examples out of a mode than it had.

    Counts that are not whole numbers may come out a rounding error below zero.

    Raises:
        LearningError: If so.
    """
    if bool((left_K < -1e-9 * had_K.clamp(min=1.0)).any()):
        worst = int(left_K.argmin())
        raise LearningError(
            f"class {int(mode_class[worst])} has {had_K[worst]:g} examples in the sums (mode "
            f"{worst}), and {had_K[worst] - left_K[worst]:g} were to be taken out; subtract only "
            "what was added"
        )


def _all_finite(*tensors: Tensor) -> bool:
    # A sum is finite only if all is, and needs no copy.
    return all(math.isfinite(float(tensor.sum())) for tensor in tensors)


def _no_solution(ridge: float) -> LearningError:
    return LearningError(
        f"the analytic head has no solution with ridge {ridge:g}; add examples or raise "
        "learning.analytic.ridge"
    )
