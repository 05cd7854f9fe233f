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
def imprint(head: GrowingHead, first_row: int, features_ND: Tensor, labels_N: Tensor) -> None:
    """Point the rows from `first_row` on at the mean direction of their class.

    A good place to start training from, and with a handful of examples a usable classifier
    by itself. Rows without examples, and all before `first_row`, stay as they are, to the bit.

    In a cosine head the row becomes the mean of the normalised features, normalised again. The
    paper has only such heads. In a linear one the same direction gets the mean length of the
    rows before `first_row` (of all rows where there are none before), so that it speaks as
    loudly as they do. Its bias sets how often it wins: the gap is the new logit minus the
    highest old one, and the bias makes the mean gap 0 over the class's own examples, a toss-up
    that training may settle either way. If examples of old classes are given too, the
    bias puts 0 midway between their mean gap and that of the class. Without old rows
    there is nothing to measure against, and the bias becomes 0.

    Args:
        head: Changed in place.
        first_row: Classes before it are the old ones.
        features_ND: Backbone features of examples.
        labels_N: Their classes.

    Raises:
        ValueError: If `first_row` or a label is no row of the head.

    Source: Qi et al. 2018, arXiv:1712.07136, section 3.2.
    """
    _check_rows(head, first_row, labels_N)
    old_rows = head.weight[:first_row] if first_row else head.weight
    length = old_rows.norm(dim=1).mean()
    is_old_N = labels_N < first_row
    best_old_N = head(features_ND)[:, :first_row].amax(1) if first_row else None
    directions_ND = F.normalize(features_ND)
    for row in torch.unique(labels_N[~is_old_N]).tolist():
        is_own_N = labels_N == row
        direction_D = F.normalize(directions_ND[is_own_N].mean(0), dim=0)
        if isinstance(head, GrowingCosine):
            head.weight[row] = direction_D
            continue
        head.weight[row] = length * direction_D
        head.bias[row] = 0.0
        if best_old_N is not None:
            gap_N = features_ND @ head.weight[row] - best_old_N
            threshold = gap_N[is_own_N].mean()
            if is_old_N.any():
                threshold = (threshold + gap_N[is_old_N].mean()) / 2
            head.bias[row] = -threshold


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


def _check_rows(head: GrowingHead, first_row: int, labels_N: Tensor) -> None:
    if not 0 <= first_row <= head.out_features:
        raise ValueError(f"first_row is {first_row}, but the head has {head.out_features} rows")
    if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < head.out_features:
        raise ValueError(
            f"labels run from {int(labels_N.min())} to {int(labels_N.max())}, but the head has "
            f"{head.out_features} rows; grow it first"
        )


def _rows_of(blocks: tuple[int, ...]) -> list[slice]:
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    return [slice(end - size, end) for size, end in zip(blocks, ends, strict=True)]


def _beside_each_other(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
