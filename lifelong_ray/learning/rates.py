"""Learning rates: how they run over a training, and how to find a good one.

Pure functions of steps and losses; the trainer takes the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from lifelong_ray.types import LearningError

Schedule = Literal["one_cycle", "constant"]

_WARM_UP_SHARE = 0.3
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
_CYCLED_MOMENTUM = (0.95, 0.85)
_PLAIN_MOMENTUM = 0.9

_LOWEST, _HIGHEST = 1e-5, 1.0
_NUM_RATES = 60
_SMOOTHING = 0.8
_DIVERGED = 3.0
_BELOW_BEST = 5.0


def rate_and_momentum(
    schedule: Schedule, step: int, num_steps: int, peak: float
) -> tuple[float, float]:
    """Return learning rate and (first) momentum of a step, from 0.

    Source: Smith and Topin 2018, arXiv:1708.07120; the numbers of one cycle are those of
    `torch.optim.lr_scheduler.OneCycleLR`, which has no closed form to resume from.

    >>> [round(rate_and_momentum("one_cycle", step, 100, 0.25)[0], 3) for step in (0, 29, 99)]
    [0.01, 0.25, 0.0]
    >>> rate_and_momentum("constant", 7, 100, 0.25)
    (0.25, 0.9)
    """
    if schedule == "constant":
        return peak, _PLAIN_MOMENTUM
    top = max(_WARM_UP_SHARE * num_steps - 1, 0.0)
    start = peak / _START_DIVISOR
    high, low = _CYCLED_MOMENTUM
    if step <= top and top > 0:
        share = step / top
        return _cosine(start, peak, share), _cosine(high, low, share)
    share = (step - top) / max(num_steps - 1 - top, 1.0)
    return _cosine(peak, start / _END_DIVISOR, share), _cosine(low, high, share)


def find_rate(loss_at: Callable[[int, float], float]) -> float:
    """Return a good peak for the schedule, by raising the rate until the loss diverges.

    The rate at which the smoothed loss is least is already too high to stay at; a fifth of
    it is returned.

    Args:
        loss_at: Takes one training step, from 0, at a rate and returns its loss.

    Raises:
        LearningError: If no step had a finite loss.

    Source: Smith 2017, arXiv:1506.01186 (the range test).

    >>> round(find_rate(lambda step, rate: (math.log10(rate) + 2) ** 2), 4)
    0.004
    """
    smoothed, best, best_rate = 0.0, math.inf, 0.0
    for step in range(_NUM_RATES):
        rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (_NUM_RATES - 1))
        loss = loss_at(step, rate)
        if not math.isfinite(loss):
            break
        smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        level = smoothed / (1 - _SMOOTHING ** (step + 1))
        if level < best:
            best, best_rate = level, rate
        elif level > _DIVERGED * best:
            break
    if not best_rate:
        raise LearningError(
            "the learning-rate range test met no finite loss; look at the inputs and the "
            "weights of the loss terms, or set a learning rate"
        )
    return best_rate / _BELOW_BEST


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2.0 * (math.cos(math.pi * share) + 1)
