"""The replay memory: what is kept of everything seen, and how it is mixed into batches.

What is kept follows from the examples and a generator alone, so that workers that call with
the same arguments hold the same memory. Knows nothing of models: features and logits are
handed in.

Axes: N remembered examples, P the pool of remembered examples and then new ones, C classes,
K classes of the stored logits, S strata (classes, or one for all), G the old and the new part
of each stratum, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.learning.checks import check_labels, check_rows
from lifelong_ray.types import LearningError

Selection = Literal["class_balanced", "reservoir", "herding"]
BatchPlan = Callable[[torch.Generator], list[Tensor]]
"""From a generator to batches of positions among new examples followed by remembered ones."""

_CONTENTS = {torch.uint8: "images", torch.float16: "features", torch.float32: "features"}


@dataclass(frozen=True)
class ReplayMemory:
    """Remembered examples, sorted by class; within a herded class, the most telling first.

    Attributes:
        inputs: (N, ...). uint8 images (N, channels, height, width), or float16 or float32
            features of any shape where images may not be kept.
        labels: int64, (N,).
        updates: int64, (N,), the update that each example came from; 0 is the base training.
        logits: float32, (N, K), answers at storing time, NaN where a class was not known then
            or nothing was stored; K is 0 where no logits are kept at all.
        seen: int64, (C,), examples offered so far by class, less those that were erased.
        stands_for: float64, (N,), how many seen examples each one stands for; None derives it
            from `seen`, as if every class were a fair sample of its own.
    """

    inputs: Tensor
    labels: Tensor
    updates: Tensor
    logits: Tensor
    seen: Tensor
    stands_for: Tensor | None = None

    def __post_init__(self) -> None:
        parts = {"inputs": self.inputs, "updates": self.updates, "logits": self.logits}
        if self.stands_for is not None:
            parts["stands_for"] = self.stands_for
        for name, part in parts.items():
            if len(part) != len(self.labels):
                raise ValueError(
                    f"the memory has {len(self.labels)} labels but {len(part)} rows of {name}; "
                    "give every remembered example one of each"
                )
        if self.inputs.dtype not in _CONTENTS:
            raise ValueError(
                f"the memory's inputs are {self.inputs.dtype}; images are torch.uint8, features "
                "torch.float16 or torch.float32"
            )

    @staticmethod
    def empty(
        shape: tuple[int, ...], num_classes: int, dtype: torch.dtype = torch.uint8
    ) -> ReplayMemory:
        """Return a memory of nothing, for inputs of `shape` (of one example) and `dtype`."""
        return ReplayMemory(
            inputs=torch.zeros((0, *shape), dtype=dtype),
            labels=torch.zeros(0, dtype=torch.int64),
            updates=torch.zeros(0, dtype=torch.int64),
            logits=torch.zeros(0, 0),
            seen=torch.zeros(num_classes, dtype=torch.int64),
            stands_for=torch.zeros(0, dtype=torch.float64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes the memory knows of, remembered or not."""
        return len(self.seen)

    @property
    def content(self) -> Literal["images", "features"]:
        """What an input is."""
        return "images" if self.inputs.dtype == torch.uint8 else "features"

    def counts(self) -> Tensor:
        """Return how many examples of each class are remembered (C,)."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def weights(self) -> Tensor:
        """Return for each remembered example how many seen ones it stands for (N,), float64.

        The estimator is Horvitz and Thompson's, one over the probability of being kept, scaled
        to the known totals (Hajek). While capacity stays or falls, that is the same for all
        examples of a class (`class_balanced`: seen / kept) or of the memory (`reservoir`). Once
        capacity has risen, the newer examples, kept at a higher rate, stand for fewer. Herded
        examples are chosen, not drawn: each stands for an equal part of its class.

        Totals are exact: of each class that is remembered at all, or of all together after
        `reservoir`.
        """
        if self.stands_for is not None:
            return self.stands_for
        return _equal_parts(self.labels, self.seen)

    def padded(self, num_classes: int) -> ReplayMemory:
        """Return the memory for more classes: none seen, and unknown to the stored logits."""
        if num_classes < self.num_classes:
            raise ValueError(
                f"the memory has {self.num_classes} classes, not only {num_classes}; classes are "
                "added, never taken away"
            )
        width = num_classes if self.logits.shape[1] else 0
        return replace(
            self,
            logits=_widened(self.logits, width),
            seen=F.pad(self.seen, (0, num_classes - self.num_classes)),
        )

    def updated(
        self,
        new_inputs: Tensor,
        new_labels: Tensor,
        *,
        memory_per_class: int,
        generator: torch.Generator,
        memory_share: float = 0.0,
        selection: Selection = "class_balanced",
        num_classes: int | None = None,
        logits: Tensor | None = None,
        update: int = 0,
        features: Tensor | None = None,
    ) -> ReplayMemory:
        """Return the memory after more examples were offered to it.

        A class has ``max(memory_per_class, ceil(memory_share * n))`` places, n being its
        examples seen so far.

        `class_balanced`: a fair sample of every class. While capacity stays or falls, each of
        the n examples ever offered is kept with probability exactly min(1, places / n), as in
        Vitter's algorithm R, however they were cut into updates. Unlike there, the old and the
        new part get places in proportion to their sizes, rounded at random, instead of a
        hypergeometric draw: an update's part in the memory of a class is its part in what was
        seen, with less scatter, and a memory that grows with `memory_share` stays fair (up to
        one place per update).

        `reservoir`: the same with everything as one class, with as many places as all classes
        have together: frequent classes get more of them.

        `herding`: those whose mean feature follows the class's mean feature most closely, in
        that order. A class without new examples keeps its first ones. One with new examples is
        chosen anew from remembered and new ones, of which the remembered weigh as many as they
        stand for. No fair sample.

        If capacity has risen, the places won go to new examples: what was not kept is gone.

        Args:
            new_inputs: Of the memory's dtype and shape.
            new_labels: Their classes.
            memory_per_class: Places of a class.
            generator: The only source of chance.
            memory_share: Places as a share of what was seen of a class; 1 keeps all.
            selection: Which examples are kept.
            num_classes: Classes from now on; None means as many as before.
            logits: Answers to the new examples, to be kept with them; None keeps none.
            update: Number of the update that brings the new examples.
            features: (P, D), features by one model of the remembered examples and then of the
                new ones; for `herding` only.

        Raises:
            LearningError: If an input is not of the memory's kind or a label has no class.

        Source: Vitter 1985 (algorithm R); Rebuffi et al. 2017, arXiv:1611.07725, algorithms 4
        and 5 (herding).
        """
        if selection not in get_args(Selection):
            raise ValueError(f"the selection is {selection!r}, not one of {get_args(Selection)}")
        if memory_per_class < 0 or not 0 <= memory_share <= 1:
            raise ValueError(
                f"a class cannot have {memory_per_class} places, or a share of {memory_share}; "
                "give 0 or more places, and a share from 0 to 1"
            )
        old = self.padded(self.num_classes if num_classes is None else num_classes)
        old._check(new_inputs, new_labels)
        num_old, num_new = len(old), len(new_labels)
        labels_P = torch.cat([old.labels, new_labels])
        seen_C = old.seen + torch.bincount(new_labels, minlength=old.num_classes)
        weights_P = torch.cat([old.weights(), torch.ones(num_new, dtype=torch.float64)])
        places_C = _places(seen_C, memory_per_class, memory_share)
        if selection == "herding":
            if features is None and not num_new:
                features = torch.zeros(num_old, 0)  # Nobody is chosen anew.
            if features is None or features.dim() < 2 or len(features) != len(labels_P):
                raise ValueError(
                    f"herding needs the features of {num_old} remembered and {num_new} new "
                    f"examples, not {None if features is None else tuple(features.shape)}; pass "
                    "both in this order, a row for each"
                )
            kept = _herded(features, labels_P, weights_P, num_old, places_C)
            stands_for = _equal_parts(labels_P[kept], seen_C)
        elif selection == "class_balanced":
            kept, stands_for = _fair_sample(
                labels_P, weights_P, num_old, old.seen, places_C, generator
            )
        else:
            kept, stands_for = _fair_sample(
                torch.zeros_like(labels_P),
                weights_P,
                num_old,
                old.seen.sum(0, keepdim=True),
                _places(seen_C.sum(0, keepdim=True), memory_per_class * len(seen_C), memory_share),
                generator,
            )
        by_class = labels_P[kept].argsort(stable=True)
        kept, stands_for = kept[by_class], stands_for[by_class]
        return ReplayMemory(
            inputs=_picked(old.inputs, new_inputs, kept),
            labels=labels_P[kept],
            updates=_picked(old.updates, torch.full_like(new_labels, update), kept),
            logits=_picked(*_same_width(old, logits, num_new), kept),
            seen=seen_C,
            stands_for=stands_for,
        )

    def without(self, chosen: Tensor, *, erased: Tensor | None = None) -> ReplayMemory:
        """Return the memory without some of its examples, as if they had never been offered.

        Those that stay share out what is left of their class. Places come free for new
        examples.

        Args:
            chosen: Positions, or a mask (N,).
            erased: (C,), how many seen examples of each class are erased, remembered or not;
                None means only the chosen ones.

        Raises:
            ValueError: If a position is outside the memory, or the erased examples cannot
                include the chosen ones.
        """
        goes_N = chosen
        if chosen.is_floating_point() or chosen.dim() != 1:
            raise ValueError(
                f"what is to be forgotten is {chosen.dtype} of shape {tuple(chosen.shape)}; give "
                "whole positions or a mask, of shape (N,)"
            )
        if chosen.dtype != torch.bool:
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
                raise ValueError(
                    f"positions {int(chosen.min())} to {int(chosen.max())} are to be forgotten, "
                    f"but the memory has {len(self)} examples; count from 0"
                )
            goes_N = torch.zeros(len(self), dtype=torch.bool).index_fill(0, chosen.long(), True)
        elif len(chosen) != len(self):
            raise ValueError(
                f"the mask has {len(chosen)} entries but the memory {len(self)} examples; give "
                "each one an entry"
            )
        gone_C = torch.bincount(self.labels[goes_N], minlength=self.num_classes)
        erased_C = gone_C if erased is None else erased
        left_C = self.seen - erased_C
        if (erased_C < gone_C).any() or (left_C < self.counts() - gone_C).any():
            raise ValueError(
                f"{erased_C.tolist()} examples by class are erased, of {self.seen.tolist()} seen; "
                f"count at least the {gone_C.tolist()} forgotten here, and none that stays"
            )
        stays_N = ~goes_N
        weights_N, labels = self.weights(), self.labels[stays_N]
        total_C = torch.zeros(self.num_classes, dtype=torch.float64)
        total_C.index_add_(0, self.labels, weights_N)
        total_C *= left_C / self.seen.clamp(min=1)
        return ReplayMemory(
            inputs=self.inputs[stays_N],
            labels=labels,
            updates=self.updates[stays_N],
            logits=self.logits[stays_N],
            seen=left_C,
            stands_for=_scaled_to(total_C, weights_N[stays_N], labels),
        )

    def _check(self, new_inputs: Tensor, new_labels: Tensor) -> None:
        check_rows(new_inputs, "memory inputs")
        check_labels(
            new_labels,
            len(new_inputs),
            self.num_classes,
            "memory label",
            "raise num_classes to take in new ones",
        )
        mine, theirs = tuple(self.inputs.shape[1:]), tuple(new_inputs.shape[1:])
        if (mine, self.inputs.dtype) != (theirs, new_inputs.dtype):
            what = "image size" if self.content == "images" else "features"
            raise LearningError(
                f"a memory of another {what}: it holds {self.inputs.dtype} of shape {mine} and "
                f"the new examples are {new_inputs.dtype} of shape {theirs}; bring them to the "
                "memory's shape, or begin a family anew with a base training"
            )


def herding_order(features_ND: Tensor, num_chosen: int, weights_N: Tensor | None = None) -> Tensor:
    """Return positions of the examples that stand for all best, the most telling first.

    Each choice brings the mean of the chosen as close to the mean of all as one more example
    can, so that the first k are the choice of k. Features are brought to unit length first.
    Their mean keeps its own length, as in the algorithm's formula: at unit length no mean of
    examples could reach it, and the chosen ones would be those that point furthest its way.

    Args:
        features_ND: Features of one class.
        num_chosen: Examples wanted; all are returned if there are fewer.
        weights_N: How many examples each row stands for in the mean; None means one.

    Source: Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.9], [1.0, 0.2]])
    >>> herding_order(features, 2).tolist()
    [2, 3]
    """
    unit_ND = F.normalize(features_ND.flatten(1).double(), dim=1)
    weights_N = torch.ones(len(unit_ND)) if weights_N is None else weights_N
    mean_D = weights_N.double() @ unit_ND / weights_N.double().sum()
    near_N = unit_ND @ mean_D
    length_N = unit_ND.square().sum(1)
    among_chosen_N = torch.zeros_like(near_N)
    taken_N = torch.zeros(len(unit_ND), dtype=torch.bool)
    order: list[int] = []
    for k in range(1, min(num_chosen, len(unit_ND)) + 1):
        # |k mean - (chosen + x)|^2 without the terms that are the same for every x.
        cost_N = length_N - 2 * (k * near_N - among_chosen_N)
        best = int(cost_N.masked_fill(taken_N, math.inf).argmin())
        order.append(best)
        taken_N[best] = True
        among_chosen_N += unit_ND @ unit_ND[best]
    return torch.tensor(order, dtype=torch.int64)


def mix_batches(num_new: int, num_remembered: int, share: float, batch_size: int) -> BatchPlan:
    """Return a plan for one epoch's batches over new examples followed by remembered ones.

    An epoch shows every new example once and every remembered one at least once; each batch
    holds the same mixture, of which at least `share` (up to rounding) is remembered.

    Returns:
        A function from a generator to lists of positions in ``[0, num_new + num_remembered)``.

    Raises:
        LearningError: If there are no new examples, or no place for one.
    """
    if not 0 <= share < 1:
        raise LearningError(
            f"replay share {share:g} leaves no place for new examples, or none for old ones; set "
            "learning.update.replay.share to 0 or more, and below 1"
        )
    if num_new < 1 or num_remembered < 0 or batch_size < 1:
        raise LearningError(
            f"{num_new} new and {num_remembered} remembered examples in batches of {batch_size} "
            "train nothing; there must be a new example, and a place for it"
        )
    num_replayed = 0
    if num_remembered and share > 0:
        num_replayed = max(num_remembered, math.ceil(num_new * share / (1 - share)))
    num_batches = math.ceil((num_new + num_replayed) / batch_size)

    def plan(generator: torch.Generator) -> list[Tensor]:
        new = torch.randperm(num_new, generator=generator)
        rounds = math.ceil(num_replayed / num_remembered) if num_replayed else 0
        again = [torch.randperm(num_remembered, generator=generator) for _ in range(rounds)]
        remembered = torch.cat([*again, new[:0]])[:num_replayed] + num_new
        parts = zip(new.tensor_split(num_batches), _spread(remembered, num_batches), strict=True)
        return [torch.cat(part) for part in parts]

    return plan


def endless_batches(
    num_new: int,
    num_remembered: int,
    new_per_batch: int,
    remembered_per_batch: int,
    num_batches: int,
) -> BatchPlan:
    """Return a plan for a fixed number of batches, for protocols that count iterations.

    Each batch holds exactly `new_per_batch` new examples and then `remembered_per_batch`
    remembered ones (none while nothing is remembered). Either kind is gone through in a random
    order, and in a new one whenever it is used up, in the middle of a batch if need be: no
    example is shown twice more often than another.

    Returns:
        A function from a generator to `num_batches` lists of positions in
        ``[0, num_new + num_remembered)``.

    Raises:
        LearningError: If there are no new examples, or no place for one.

    >>> batches = endless_batches(3, 2, 2, 1, 3)(torch.Generator().manual_seed(0))
    >>> [len(batch) for batch in batches], sorted(torch.cat(batches).tolist())[:6]
    ([3, 3, 3], [0, 0, 1, 1, 2, 2])
    """
    if min(num_remembered, remembered_per_batch, num_batches) < 0:
        raise LearningError(
            f"{num_batches} batches with {remembered_per_batch} of {num_remembered} remembered "
            "examples cannot be made; no number may be below 0"
        )
    if num_new < 1 or new_per_batch < 1:
        raise LearningError(
            f"batches of {new_per_batch} of {num_new} new examples train nothing new; both must "
            "be at least 1"
        )
    replayed = remembered_per_batch if num_remembered else 0

    def plan(generator: torch.Generator) -> list[Tensor]:
        new = _shuffled_again_and_again(num_new, num_batches * new_per_batch, generator)
        remembered = _shuffled_again_and_again(num_remembered, num_batches * replayed, generator)
        rows = [
            new.view(num_batches, new_per_batch),
            remembered.view(num_batches, replayed) + num_new,
        ]
        return list(torch.cat(rows, dim=1))

    return plan


def _shuffled_again_and_again(num: int, length: int, generator: torch.Generator) -> Tensor:
    """The first `length` of endless permutations of `num` positions."""
    rounds = -(-length // num) if length else 0
    # Ties among 53-bit keys are too rare to matter.
    keys = torch.rand(rounds, num, generator=generator, dtype=torch.float64)
    return keys.argsort(dim=1).flatten()[:length]


def _spread(positions: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Split into parts of almost equal size, the larger ones last.

    New examples put theirs first, so that no batch gets two spare ones.
    """
    edges = [len(positions) * part // num_parts for part in range(1, num_parts)]
    return positions.tensor_split(edges)


def _places(seen_S: Tensor, at_least: int, share: float) -> Tensor:
    # A hair less, so that 0.07 of 100, which is above 7 in floating point, are 7.
    return (seen_S.double() * share - 1e-9).ceil().long().clamp(min=at_least)


def _fair_sample(
    strata_P: Tensor,
    weights_P: Tensor,
    num_old: int,
    seen_S: Tensor,
    places_S: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Sample every stratum of a pool.

    Args:
        strata_P: Of the remembered examples, then of the new ones.
        weights_P: What each example of the pool stands for.
        num_old: How many of the pool are remembered ones.
        seen_S: Examples that the remembered ones were kept from.
        places_S: Most examples to keep.
        generator: Draws the rounding, then who is kept.

    Returns:
        Positions in the pool, rising, and what each example kept stands for.
    """
    num_strata, pool_size = len(seen_S), len(strata_P)
    held_S = torch.bincount(strata_P[:num_old], minlength=num_strata)
    offered_S = torch.bincount(strata_P[num_old:], minlength=num_strata)
    total_S = seen_S + offered_S
    places_S = torch.minimum(places_S, total_S)
    fair_S = places_S * seen_S.double() / total_S.clamp(min=1)
    fair_S = torch.minimum(fair_S, held_S.double())
    draw_S = torch.rand(num_strata, generator=generator, dtype=torch.float64)
    old_S = torch.minimum((fair_S + draw_S).floor().long(), held_S)
    new_S = torch.minimum(places_S - old_S, offered_S)

    group_P = 2 * strata_P
    group_P[num_old:] += 1
    size_G = torch.stack([held_S, offered_S], 1).flatten()
    take_G = torch.stack([old_S, new_S], 1).flatten()
    expected_G = torch.stack(
        [fair_S, torch.minimum(places_S - fair_S, offered_S.double())], 1
    ).flatten()
    shuffled_P = torch.randperm(pool_size, generator=generator)
    shuffled_P = shuffled_P[group_P[shuffled_P].argsort(stable=True)]
    rank_P = torch.arange(pool_size) - (size_G.cumsum(0) - size_G)[group_P[shuffled_P]]
    kept = shuffled_P[rank_P < take_G[group_P[shuffled_P]]].sort().values

    # One over the probability of being kept, by the expected size of each part, not the drawn.
    rarer_G = size_G / expected_G.clamp(min=1e-12)
    strata = strata_P[kept]
    stands_for = weights_P[kept] * rarer_G[group_P[kept]]
    return kept, _scaled_to(total_S.double(), stands_for, strata)


def _herded(
    features_PD: Tensor, labels_P: Tensor, weights_P: Tensor, num_old: int, places_C: Tensor
) -> Tensor:
    """Positions in the pool that herding keeps, class by class, the most telling first."""
    edges = torch.bincount(labels_P, minlength=len(places_C)).cumsum(0)[:-1].tolist()
    pools = labels_P.argsort(stable=True).tensor_split(edges)
    kept: list[Tensor] = []
    for pool, places in zip(pools, places_C.tolist(), strict=True):
        if len(pool) and int(pool[-1]) >= num_old:
            order = herding_order(features_PD[pool], places, weights_P[pool])
            kept.append(pool[order])
        else:
            kept.append(pool[:places])
    return torch.cat(kept)


def _equal_parts(labels: Tensor, seen_C: Tensor) -> Tensor:
    """What each example stands for if all of a class stand for as many."""
    ones = torch.ones(len(labels), dtype=torch.float64)
    return _scaled_to(seen_C.double(), ones, labels)


def _scaled_to(total_S: Tensor, weights: Tensor, strata: Tensor) -> Tensor:
    """Weights in the same proportions that add up to a total in each stratum."""
    sum_S = torch.zeros_like(total_S).index_add_(0, strata, weights)
    return weights * (total_S / sum_S)[strata]


def _picked(old: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``cat([old, new])``, without the copy of all."""
    is_new = positions >= len(old)
    rows = old.new_empty((len(positions), *old.shape[1:]))
    rows[~is_new] = old[positions[~is_new]]
    rows[is_new] = new[positions[is_new] - len(old)]
    return rows


def _same_width(
    old: ReplayMemory, new_logits: Tensor | None, num_new: int
) -> tuple[Tensor, Tensor]:
    """Stored and new logits for all of the memory's classes, NaN where there are none."""
    if new_logits is None:
        return old.logits, old.logits.new_full((num_new, old.logits.shape[1]), math.nan)
    if len(new_logits) != num_new or new_logits.shape[1] > old.num_classes:
        raise ValueError(
            f"there are logits of shape {tuple(new_logits.shape)} for {num_new} new examples and "
            f"{old.num_classes} classes; give each example one row, and no class too many"
        )
    new = new_logits.detach().to("cpu", torch.float32)
    return _widened(old.logits, old.num_classes), _widened(new, old.num_classes)


def _widened(logits: Tensor, width: int) -> Tensor:
    return F.pad(logits, (0, width - logits.shape[1]), value=math.nan)
