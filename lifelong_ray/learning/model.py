"""The classifier: a backbone in stages, a linear head and an analytic head.

Knows shapes and weights; does not know how either head is trained.

Axes: N images, C classes, D backbone features, M random features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig

Head = Literal["linear", "analytic"]

_CHUNK = 256
_NORM_GROUPS = 8
_NEW_ROW_SCALE = 0.01


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
        parts, first = [], 0
        for size in self.blocks:
            rows = slice(first, first + size)
            parts.append(F.linear(features_ND, self.weight[rows], self.bias[rows]))
            first += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

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


class Classifier(nn.Module):
    """Images to one logit per class.

    There is no batch normalisation: an answer never depends on its batch, and no
    running statistic can drift away from what the penalties protect.

    Attributes:
        active_head: Which head `forward` answers with.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        num_random_features: int = 0,
        *,
        head_blocks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.active_head: Head = "linear"
        stages, side = _stages(config)
        self.stages = nn.ModuleList(stages)
        self._grid = min(config.pool_size, side)
        num_features = config.widths[-1] * self._grid**2
        self.head = GrowingLinear(num_features, head_blocks or (num_classes,))
        self.projection_DM: Tensor
        self.analytic_MC: Tensor
        self.register_buffer("projection_DM", torch.zeros(num_features, num_random_features))
        self.register_buffer("analytic_MC", torch.zeros(num_random_features, num_classes))

    @property
    def num_classes(self) -> int:
        """Classes that both heads know."""
        return self.head.out_features

    @property
    def num_features(self) -> int:
        """Backbone features of one image."""
        return self.head.in_features

    @property
    def num_random_features(self) -> int:
        """Width of the analytic head's projection; 0 when there is none."""
        return self.projection_DM.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.head.weight.device

    def activations(self, inputs: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the stages from `start` up to, not including, `stop`.

        Args:
            inputs: uint8 images (N, channels, height, width), or floating-point activations
                that enter stage `start`.
            start: Stages that `inputs` have already passed.
            stop: None means to the end of the backbone.
        """
        h = inputs if inputs.is_floating_point() else inputs.float() / 255
        for stage in self.stages[start:stop]:
            h = stage(h)
        return h

    def features(self, inputs: Tensor, *, start: int = 0) -> Tensor:
        """Return backbone features (N, D); arguments as in `activations`."""
        h = self.activations(inputs, start=start)
        if h.dim() == 4:
            h = F.adaptive_avg_pool2d(h, self._grid)
        return h.flatten(1)

    def random_features(self, features_ND: Tensor) -> Tensor:
        """Return the analytic head's inputs (N, M) for backbone features."""
        return F.relu(features_ND @ self.projection_DM)

    def answer(self, features_ND: Tensor) -> Tensor:
        """Return logits (N, C) of the active head for backbone features."""
        if self.active_head == "analytic":
            return self.random_features(features_ND) @ self.analytic_MC
        logits_NC: Tensor = self.head(features_ND)
        return logits_NC

    def forward(self, images: Tensor) -> Tensor:
        """Return uncalibrated logits (N, C) of the active head for uint8 images."""
        return self.answer(self.features(images))

    def grow(self, num_classes: int, generator: torch.Generator) -> None:
        """Make room for more classes; the rows of the old ones stay as they are, to the bit.

        New rows of the linear head are small and random, of the analytic head zero.
        """
        old = self.num_classes
        if num_classes < old:
            raise ValueError(f"a head of {old} classes cannot shrink to {num_classes}")
        if num_classes == old:
            return
        self.head = self.head.grown(num_classes, generator)
        self.analytic_MC = F.pad(self.analytic_MC, (0, num_classes - old))

    def freeze_stages(self, num_stages: int) -> None:
        """Let training change only the stages after the first `num_stages`, and the head."""
        if num_stages > len(self.stages):
            raise ValueError(
                f"cannot freeze {num_stages} stages of a backbone that has {len(self.stages)}"
            )
        for index, stage in enumerate(self.stages):
            stage.requires_grad_(index >= num_stages)

    def copy(self) -> Classifier:
        """Return an independent copy."""
        return copy.deepcopy(self)


def build_model(
    config: ModelConfig, num_classes: int, seed: int, *, num_random_features: int = 0
) -> Classifier:
    """Build a classifier whose random weights follow from `seed` alone.

    Leaves the global random state as it was.

    >>> from lifelong_ray.config import ModelConfig
    >>> build_model(ModelConfig(), 8, seed=0).num_classes
    8
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(config, num_classes, num_random_features)


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Apply `function` to `inputs` in bounded pieces, without gradients.

    The pieces are the same for the same input, so the result is reproducible to the bit.
    """
    return torch.cat([function(inputs[i : i + chunk]) for i in range(0, len(inputs), chunk)])


def _stages(config: ModelConfig) -> tuple[list[nn.Module], int]:
    """The backbone, and the side of what leaves it."""
    stages: list[nn.Module] = []
    if config.name == "mlp":
        inputs = config.channels * config.image_size**2
        for width in config.widths:
            stages.append(nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()))
            inputs = width
        return stages, 1
    channels: int = config.channels
    side = config.image_size
    for index, width in enumerate(config.widths):
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.GroupNorm(_num_groups(width), width),
            nn.ReLU(),
        ]
        if index < len(config.widths) - 1 and side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        stages.append(nn.Sequential(*layers))
        channels = width
    return stages, side


def _num_groups(width: int) -> int:
    """Groups of at least two channels where possible.

    In groups of one the norm cancels the convolution's bias: its gradient is rounding error,
    which Adam would blow up to full steps.
    """
    groups = math.gcd(_NORM_GROUPS, width)
    return groups if groups < width else max(1, width // 2)
