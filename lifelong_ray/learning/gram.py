"""Gram matrices and column sums in float64, added up in place; exact of integer features.

Axes: N examples, M features, K columns that an example may belong to.
"""

from __future__ import annotations

from torch import Tensor

from lifelong_ray.learning.widening import integer_product

# A block of the Gram matrix fits a core's cache; its rows are enough to pay for adding it up.
_ROWS, _FLOAT_ROWS, _COLUMNS = 16_384, 2_048, 1_000
_MAX_WEIGHT_GROUPS = 256


def add_integer_sums(
    gram_MM: Tensor,
    sums_MK: Tensor,
    features_NM: Tensor,
    own_NK: Tensor,
    weights_N: Tensor | None = None,
) -> None:
    """Add Gram matrix and column sums of int8 features, each counted as its weight says.

    Exact for weights that are whole numbers. Examples of the same weight, as remembered ones
    have, go together; there should be few weights.
    """
    values = [1.0] if weights_N is None else sorted(set(weights_N.tolist()))
    if len(values) > _MAX_WEIGHT_GROUPS:
        add_float_sums(gram_MM, sums_MK, features_NM, own_NK, weights_N)
        return
    blocks = _blocks(features_NM.shape[1])
    for value in values:
        mine = slice(None) if weights_N is None else weights_N == value
        _add_above_diagonal(gram_MM, sums_MK, features_NM[mine], own_NK[mine], value, blocks)
    for i, rows in enumerate(blocks):
        for later in blocks[i + 1 :]:
            gram_MM[later, rows] = gram_MM[rows, later].T


def _add_above_diagonal(
    gram_MM: Tensor,
    sums_MK: Tensor,
    features_NM: Tensor,
    own_NK: Tensor,
    weight: float,
    blocks: list[slice],
) -> None:
    """Add the column sums and those blocks of the Gram matrix that are not below its diagonal."""
    for first in range(0, len(features_NM), _ROWS):
        piece_NM = features_NM[first : first + _ROWS]
        sums_MK.add_(integer_product(piece_NM.T, own_NK[first : first + _ROWS]), alpha=weight)
        for i, rows in enumerate(blocks):
            for columns in blocks[i:]:
                product = integer_product(piece_NM[:, rows].T, piece_NM[:, columns])
                gram_MM[rows, columns].add_(product, alpha=weight)


def _blocks(width: int) -> list[slice]:
    return [slice(i, min(i + _COLUMNS, width)) for i in range(0, width, _COLUMNS)]


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
