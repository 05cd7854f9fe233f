"""What becomes of the analytic sums when the backbone under them has moved.

Axes: N examples seen through both backbones, M random features, K modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.types import LearningError

_RIDGE = 1e-3


def carried_over(
    sums: AnalyticSums, before_NM: Tensor, after_NM: Tensor, old_N: Tensor
) -> AnalyticSums:
    """Return sums of old features as sums of the new features of the same examples.

    The examples themselves are gone; what a linear map makes of their old features stands in
    for their new ones. The map is fitted by ridge regression to the examples that were seen
    through both backbones, and the scatter that it leaves among the old ones of these is
    added to the Gram matrix, without which the head would trust the map too much.

    On CIFAR-10, six classes and then four, with a tenth of the old images kept, the head from
    carried sums is a point below the one from all old images, and ten points above the one
    from the kept images alone.

    Args:
        sums: Of the features before.
        before_NM: Random features of some examples before, int8 or floating point.
        after_NM: The same examples' features now.
        old_N: Which of them are of the kind that `sums` are over; at least one.

    Returns:
        Estimated sums in floating point: no longer exact.

    Raises:
        LearningError: If no map can be fitted.
    """
    if not bool(old_N.any()):
        raise LearningError(
            "sums cannot be carried over to new features without one remembered example; keep "
            "a memory, or take the fast path"
        )
    before, after = before_NM.float(), after_NM.float()
    system = (before.T @ before).double()
    system.diagonal().add_(_RIDGE * float(system.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info.item()):
        raise LearningError("the features before the update are not finite or all zero")
    map_MM = torch.cholesky_solve((before.T @ after).double(), factor).float()
    missed = after[old_N] - before[old_N] @ map_MM
    scatter = (missed.T @ missed).double() / len(missed)
    moved = (map_MM.T @ (sums.gram.float() @ map_MM)).double()
    return AnalyticSums(
        gram=(moved + moved.T) / 2 + scatter * float(sums.counts.sum()),
        class_sums=map_MM.T.double() @ sums.class_sums,
        counts=sums.counts,
        mode_class=sums.mode_class,
        num_classes=sums.num_classes,
        history=sums.history,
    )
