"""Gram matrices and column sums in float64, exact where the features are integers.

Axes: N examples, M features, K columns that an example may belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_ray.learning.widening import integer_product

_ROWS, _FLOAT_ROWS, _COLUMNS = 8_192, 2_048, 1_000
_MAX_WEIGHT_GROUPS = 256


def integer_sums(features_NM: Tensor, own_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and column sums of int8 features, exact; only half of the former computed."""
    width = features_NM.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=features_NM.device)
    sums_MK = gram.new_zeros(width, own_NK.shape[1])
    blocks = [slice(i, min(i + _COLUMNS, width)) for i in range(0, width, _COLUMNS)]
    for first in range(0, len(features_NM), _ROWS):
        rows_NM = features_NM[first : first + _ROWS]
        columns = [rows_NM[:, block].contiguous() for block in blocks]
        for i, rows in enumerate(blocks):
            turned = columns[i].T.contiguous()
            for j in range(i, len(blocks)):
                gram[rows, blocks[j]] += integer_product(turned, columns[j])
            sums_MK[rows] += integer_product(turned, own_NK[first : first + _ROWS])
    for i, rows in enumerate(blocks):
        for later in blocks[i + 1 :]:
            gram[later, rows] = gram[rows, later].T
    return gram, sums_MK


def weighted_integer_sums(
    features_NM: Tensor, own_NK: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """As `integer_sums`; examples of the same weight, as remembered ones have, go together."""
    values = sorted(set(weights_N.tolist()))
    if len(values) > _MAX_WEIGHT_GROUPS:
        return float_sums(features_NM, own_NK, weights_N)
    width = features_NM.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=features_NM.device)
    sums_MK = gram.new_zeros(width, own_NK.shape[1])
    for value in values:
        mine_N = weights_N == value
        gram_part, sums_part = integer_sums(features_NM[mine_N], own_NK[mine_N])
        gram += gram_part.mul_(value)
        sums_MK += sums_part.mul_(value)
    return gram, sums_MK


def float_sums(
    features_NM: Tensor, own_NK: Tensor, weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gram matrix and column sums of any features, each counted as often as its weight says."""
    width = features_NM.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=features_NM.device)
    sums_MK = gram.new_zeros(width, own_NK.shape[1])
    for first in range(0, len(features_NM), _FLOAT_ROWS):
        piece = slice(first, first + _FLOAT_ROWS)
        x_NM = features_NM[piece].double()
        weighted_NM = x_NM if weights_N is None else x_NM * weights_N[piece, None]
        gram.addmm_(x_NM.T, weighted_NM)
        sums_MK.addmm_(weighted_NM.T, own_NK[piece].double())
    return gram, sums_MK
