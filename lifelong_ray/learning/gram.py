"""Gram matrices and column sums in float64, added up in place; exact of integer features.

Axes: N examples, M features, K columns that an example may belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_ray.learning.widening import integer_product

_ROWS, _FLOAT_ROWS, _COLUMNS = 8_192, 2_048, 1_000
_MAX_WEIGHT_GROUPS = 256


def add_integer_sums(gram_MM: Tensor, sums_MK: Tensor, features_NM: Tensor, own_NK: Tensor) -> None:
    """Add Gram matrix and column sums of int8 features, exact; half of the former is computed."""
    width = features_NM.shape[1]
    blocks = [slice(i, min(i + _COLUMNS, width)) for i in range(0, width, _COLUMNS)]
    for first in range(0, len(features_NM), _ROWS):
        rows_NM = features_NM[first : first + _ROWS]
        columns = [rows_NM[:, block].contiguous() for block in blocks]
        for i, rows in enumerate(blocks):
            turned = columns[i].T.contiguous()
            for j in range(i, len(blocks)):
                gram_MM[rows, blocks[j]] += integer_product(turned, columns[j])
            sums_MK[rows] += integer_product(turned, own_NK[first : first + _ROWS])
    for i, rows in enumerate(blocks):
        for later in blocks[i + 1 :]:
            gram_MM[later, rows] = gram_MM[rows, later].T


def add_weighted_integer_sums(
    gram_MM: Tensor, sums_MK: Tensor, features_NM: Tensor, own_NK: Tensor, weights_N: Tensor
) -> None:
    """As `add_integer_sums`; examples of the same weight, as remembered ones have, go together."""
    values = sorted(set(weights_N.tolist()))
    if len(values) > _MAX_WEIGHT_GROUPS:
        add_float_sums(gram_MM, sums_MK, features_NM, own_NK, weights_N)
        return
    for value in values:
        mine_N = weights_N == value
        gram, sums = torch.zeros_like(gram_MM), torch.zeros_like(sums_MK)
        add_integer_sums(gram, sums, features_NM[mine_N], own_NK[mine_N])
        gram_MM += gram.mul_(value)
        sums_MK += sums.mul_(value)


def add_float_sums(
    gram_MM: Tensor,
    sums_MK: Tensor,
    features_NM: Tensor,
    own_NK: Tensor,
    weights_N: Tensor | None,
) -> None:
    """Add Gram matrix and column sums of any features, each counted as its weight says."""
    for first in range(0, len(features_NM), _FLOAT_ROWS):
        piece = slice(first, first + _FLOAT_ROWS)
        x_NM = features_NM[piece].double()
        weighted_NM = x_NM if weights_N is None else x_NM * weights_N[piece, None]
        gram_MM.addmm_(x_NM.T, weighted_NM)
        sums_MK.addmm_(weighted_NM.T, own_NK[piece].double())
