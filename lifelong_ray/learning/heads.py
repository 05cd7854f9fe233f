"""Trained heads that grow: linear and cosine, their first rows and their last correction.

Knows features and rows; does not know where features come from or how rows are trained.

Axes: N examples, C classes, D backbone features.
"""

from __future__ import annotations

import copy
import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_NEW_ROW_SCALE = 0.01
_FIRST_SCALE = 10.0


class GrowingLinear(nn.Linear):
    """A linear layer that computes its outputs in the blocks they were added in.

    A wider matrix product may round the old outputs differently; the same product again,
    beside a new one, cannot.

    Attributes:
        blocks: Outputs added at each growth; they sum to `out_features`.
    """

    def __init__(self, in_features: int, blocks: tuple[int, ...]) -> None:
        super().__init__(in_features, sum(blocks))
        self.blocks = blocks

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return outputs (N, C)."""
        return _beside_each_other(
            [
                F.linear(features_ND, self.weight[rows], self.bias[rows])
                for rows in _rows_of(self.blocks)
            ]
        )

    def grown(self, num_outputs: int, generator: torch.Generator) -> GrowingLinear:
        """Return a wider layer: old rows as they are, new ones small and random."""
        old = self.out_features
        fresh = torch.randn(num_outputs - old, self.in_features, generator=generator)
        wider = copy.deepcopy(self)
        wider.blocks = (*self.blocks, num_outputs - old)
        wider.out_features = num_outputs
        fresh = (fresh * _NEW_ROW_SCALE).to(self.weight)
        wider.weight = nn.Parameter(torch.cat([self.weight.detach(), fresh]))
        wider.bias = nn.Parameter(F.pad(self.bias.detach(), (0, num_outputs - old)))
        return wider


class GrowingCosine(nn.Module):
    """Logits that are cosines between features and one direction per class, times a scale.

    The length of a row has no say, so that no class can outweigh another by it. The scale is
    learnt; it starts at 10, because cosines between -1 and 1 alone cannot make a softmax sure
    of anything. The blocks are those of `GrowingLinear`.

    Source: Hou et al. 2019, "Learning a Unified Classifier Incrementally via Rebalancing",
    eq. 4.

    Attributes:
        in_features: Width of the features.
        out_features: Classes.
        blocks: Outputs added at each growth; they sum to `out_features`.
        weight: One direction per class (C, D); only the direction counts.
        scale: Logit of a perfect match.
    """

    def __init__(self, in_features: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = sum(blocks)
        self.blocks = blocks
        self.weight = nn.Parameter(F.normalize(torch.randn(self.out_features, in_features)))
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return outputs (N, C)."""
        directions_ND = F.normalize(features_ND)
        return self.scale * _beside_each_other(
            [
                F.linear(directions_ND, F.normalize(self.weight[rows]))
                for rows in _rows_of(self.blocks)
            ]
        )

    def grown(self, num_outputs: int, generator: torch.Generator) -> GrowingCosine:
        """Return a wider layer: old rows as they are, new ones random unit vectors."""
        old = self.out_features
        fresh = torch.randn(num_outputs - old, self.in_features, generator=generator)
        wider = copy.deepcopy(self)
        wider.blocks = (*self.blocks, num_outputs - old)
        wider.out_features = num_outputs
        fresh = F.normalize(fresh).to(self.weight)
        wider.weight = nn.Parameter(torch.cat([self.weight.detach(), fresh]))
        return wider


GrowingHead = GrowingLinear | GrowingCosine


def make_head(
    kind: Literal["linear", "cosine"], in_features: int, blocks: tuple[int, ...]
) -> GrowingHead:
    """Return a head whose weights are drawn from torch's global random state.

    Args:
        kind: As in the setting model.head.
        in_features: Width of the features.
        blocks: Classes, in the steps in which they came.
    """
    if kind == "linear":
        return GrowingLinear(in_features, blocks)
    if kind == "cosine":
        return GrowingCosine(in_features, blocks)
    raise ValueError(f"head is {kind!r}; it must be linear or cosine")


@torch.no_grad()
def align_new_rows(head: GrowingHead, num_old: int) -> float:
    """Scale the new classes' rows so that their mean length is that of the old ones' rows.

    Training with few old examples makes new rows longer, and longer rows win. All new rows get
    the same factor, so that the order among new classes stays. The paper's head has no bias and
    scales the new logits; for that to hold here the new biases are scaled too. Old rows and
    biases stay as they are, to the bit. Call it once after training; it needs no data.

    Args:
        head: Changed in place. A cosine head has nothing to align; a warning says so.
        num_old: The rows before it are the old ones.

    Returns:
        The factor; 1 if nothing was changed.

    Raises:
        ValueError: If not at least one row is old and one new.

    Source: Zhao et al. 2020, arXiv:1911.07053, section 4.2.
    """
    if not 0 < num_old < head.out_features:
        raise ValueError(
            f"cannot align the rows from {num_old} on of a head with {head.out_features}; "
            "at least one row must be old and one new"
        )
    if isinstance(head, GrowingCosine):
        logger.warning(
            "weight alignment has no effect on a cosine head, where all rows weigh the same; "
            "turn it off or set model.head to linear"
        )
        return 1.0
    lengths_C = head.weight.norm(dim=1)
    new_length = lengths_C[num_old:].mean()
    if new_length == 0:
        return 1.0
    factor = lengths_C[:num_old].mean() / new_length
    head.weight[num_old:] *= factor
    head.bias[num_old:] *= factor
    return float(factor)


def _rows_of(blocks: tuple[int, ...]) -> list[slice]:
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    return [slice(end - size, end) for size, end in zip(blocks, ends, strict=True)]


def _beside_each_other(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
