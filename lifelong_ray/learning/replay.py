"""The replay memory: a fair sample of everything seen, class by class.

Each class keeps a reservoir, so that every example ever offered is in it with the same
probability. Also decides how remembered examples are mixed into update batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lifelong_ray.types import LearningError


@dataclass(frozen=True)
class ReplayMemory:
    """Remembered examples.

    Attributes:
        images: uint8, (N, channels, height, width).
        labels: int64, (N,), sorted by class.
        seen: int64, (C,), examples offered so far by class: what the memory stands for.
    """

    images: Tensor
    labels: Tensor
    seen: Tensor

    @staticmethod
    def empty(shape: tuple[int, int, int], num_classes: int) -> ReplayMemory:
        """Return a memory of nothing, for images of (channels, height, width)."""
        return ReplayMemory(
            torch.zeros((0, *shape), dtype=torch.uint8),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(num_classes, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Tensor:
        """Return how many examples of each class are remembered (C,)."""
        return torch.bincount(self.labels, minlength=len(self.seen))

    def updated(
        self,
        new_images: Tensor,
        new_labels: Tensor,
        per_class: int,
        generator: torch.Generator,
        *,
        num_classes: int | None = None,
    ) -> ReplayMemory:
        """Return the memory after more examples were offered to it.

        With `per_class` constant or falling, each of the n examples of a class ever
        offered is kept with probability min(1, per_class / n). If `per_class` has risen,
        the places won go to new examples first.

        Args:
            new_images: uint8, shapes as in the memory.
            new_labels: Their classes.
            per_class: Most examples kept of one class.
            generator: The only source of chance.
            num_classes: Classes from now on; None means as many as before.

        Source: Vitter 1985, algorithm R.
        """
        classes = len(self.seen) if num_classes is None else num_classes
        seen_C = torch.zeros(classes, dtype=torch.int64)
        seen_C[: len(self.seen)] = self.seen
        pool = torch.cat([self.images, new_images])
        kept: list[Tensor] = []
        labels: list[Tensor] = []
        for c in range(classes):
            places = (self.labels == c).nonzero()[:, 0]
            if len(places) > per_class:
                places = places[torch.randperm(len(places), generator=generator)[:per_class]]
            offered = (new_labels == c).nonzero()[:, 0] + len(self)
            draws = torch.rand(len(offered), generator=generator, dtype=torch.float64).tolist()
            reservoir = places.tolist()
            seen = int(seen_C[c])
            for position, draw in zip(offered.tolist(), draws, strict=True):
                seen += 1
                if len(reservoir) < per_class:
                    reservoir.append(position)
                elif (place := int(draw * seen)) < per_class:
                    reservoir[place] = position
            seen_C[c] = seen
            kept.append(torch.tensor(reservoir, dtype=torch.int64))
            labels.append(torch.full((len(reservoir),), c, dtype=torch.int64))
        return ReplayMemory(pool[torch.cat(kept)], torch.cat(labels), seen_C)

    def weights(self) -> Tensor:
        """Return for each remembered example how many seen ones it stands for (N,), float64."""
        per_example_C = self.seen.double() / self.counts().clamp(min=1).double()
        return per_example_C[self.labels]


def mix_batches(
    num_new: int, num_remembered: int, share: float, batch_size: int
) -> Callable[[torch.Generator], list[Tensor]]:
    """Return a plan for one epoch's batches over new examples followed by remembered ones.

    An epoch shows every new example once and every remembered one at least once; each batch
    holds the same mixture, of which at least `share` (up to rounding) is remembered.

    Returns:
        A function from a generator to lists of positions in ``[0, num_new + num_remembered)``.

    Raises:
        LearningError: If `share` leaves no place for new examples.
    """
    if share >= 1:
        raise LearningError(
            f"replay share {share:g} leaves no place for new examples; set "
            "learning.update.replay.share below 1"
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


def _spread(positions: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Split into parts of almost equal size, the larger ones last.

    New examples put theirs first, so that no batch gets two spare ones.
    """
    edges = [len(positions) * part // num_parts for part in range(1, num_parts)]
    return positions.tensor_split(edges)
