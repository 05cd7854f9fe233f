"""One score per class from the scores of its modes: the appearances that are told apart.

Axes: N examples, C classes, K modes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS_GRID = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0)
"""What `choose_sharpness` chooses from."""


def class_scores(
    scores_NK: Tensor, mode_class: Tensor, num_classes: int, sharpness: float
) -> Tensor:
    """Return scores by class (N, C): a soft maximum over the modes of each.

    The logarithm of the sum of exponentials, sharper with higher `sharpness`. A class with one
    mode has that mode's score, to the bit.
    """
    sizes_C = torch.bincount(mode_class, minlength=num_classes)
    widest = int(sizes_C.max()) if num_classes else 0
    table_CW = torch.full(
        (num_classes, widest), len(mode_class), dtype=torch.int64, device=mode_class.device
    )
    order_K = torch.argsort(mode_class, stable=True)
    sorted_K = mode_class[order_K]
    first_C = sizes_C.cumsum(0) - sizes_C
    place_K = torch.arange(len(order_K), device=mode_class.device) - first_C[sorted_K]
    table_CW[sorted_K, place_K] = order_K
    padded_NK = F.pad(scores_NK, (0, 1), value=-math.inf)
    by_class_NCW = padded_NK[:, table_CW.to(scores_NK.device)]
    top_NC = by_class_NCW.amax(2)
    rest_NC = ((by_class_NCW - top_NC[:, :, None]) * sharpness).exp().sum(2)
    return top_NC + rest_NC.log() / sharpness


def choose_sharpness(
    scores_NK: Tensor,
    labels_N: Tensor,
    mode_class: Tensor,
    num_classes: int,
    weights_N: Tensor | None = None,
) -> float:
    """Return the sharpness of `class_scores` with the best accuracy on labelled scores.

    Among equals the one with the best likelihood after a temperature of its own, then the
    lowest. Scores should be of examples that the head was not fitted on, or left out.
    """
    if len(mode_class) <= num_classes or not len(labels_N):
        return SHARPNESS_GRID[0]
    weigh_N = torch.ones_like(labels_N, dtype=torch.float64) if weights_N is None else weights_N
    weigh_N = weigh_N.double()

    def quality(sharpness: float) -> tuple[float, float]:
        scores_NC = class_scores(scores_NK.double(), mode_class, num_classes, sharpness)
        right = float((weigh_N * (scores_NC.argmax(1) == labels_N)).sum())
        likelihood = max(
            -float((weigh_N * F.cross_entropy(scores_NC * t, labels_N, reduction="none")).sum())
            for t in SHARPNESS_GRID
        )
        return right, likelihood

    return max(SHARPNESS_GRID, key=quality)
