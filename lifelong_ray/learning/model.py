"""The classifier: a backbone in stages, a trained head and an analytic head.

Knows shapes and weights; does not know how either head is trained.

Axes: N images, C classes, D backbone features, W inputs of the analytic head, M random
features, K modes (appearances of a class that the analytic head tells apart).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning.backbones import build_backbone, has_batch_statistics, standardise
from lifelong_ray.learning.checks import check_finite, check_images, check_rows
from lifelong_ray.learning.heads import GrowingCosine, GrowingLinear, make_head
from lifelong_ray.learning.modes import class_scores
from lifelong_ray.learning.widening import RandomFeatures
from lifelong_ray.types import LearningError

Head = Literal["linear", "analytic", "both"]
Source = Literal["pixels", "features", "stages"]

_CHUNK = 256
_STAGE_GRID = 4


@dataclass(frozen=True)
class Shape:
    """What a classifier's size follows from, beside its configuration.

    Attributes:
        head_blocks: Classes added at each growth.
        num_random_features: Width of the analytic head; 0 when there is none.
        source: What the analytic head looks at.
        mirrored: Whether its sums are over mirror images too.
        mode_class: The class of each of its modes.
        branch_starts: For each branch of an expanded network, the stage it leaves from.
        branch_blocks: For each branch, the classes its head was grown in.
    """

    head_blocks: tuple[int, ...]
    num_random_features: int = 0
    source: Source = "features"
    mirrored: bool = False
    mode_class: tuple[int, ...] | None = None
    branch_starts: tuple[int, ...] = ()
    branch_blocks: tuple[tuple[int, ...], ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes that the heads know."""
        return sum(self.head_blocks)


class AnalyticHead(nn.Module):
    """Random features of what it looks at, times the weights that the sums decide.

    Attributes:
        source: What it looks at.
        mirrored: Whether its sums are over each image and its mirror image, half each.
        widening: The random features.
        weights_MK: One column per mode.
        mode_class: The class of each mode (K,).
        sharpness: How the modes of a class are put together.
    """

    def __init__(
        self, source: Source, num_inputs: int, num_features: int, mode_class: Sequence[int]
    ) -> None:
        super().__init__()
        self.source = source
        self.mirrored = False
        self.widening = RandomFeatures(num_inputs, num_features)
        self.weights_MK: Tensor
        self.mode_class: Tensor
        self.sharpness: Tensor
        self.register_buffer("weights_MK", torch.zeros(num_features, len(mode_class)))
        self.register_buffer("mode_class", torch.tensor(list(mode_class), dtype=torch.int64))
        self.register_buffer("sharpness", torch.ones(()))

    def forward(self, inputs_NW: Tensor, num_classes: int) -> Tensor:
        """Return logits (N, C)."""
        return self.of_random(self.widening(inputs_NW), num_classes)

    def of_random(self, features_NM: Tensor, num_classes: int) -> Tensor:
        """Return logits (N, C) for random features in floating point."""
        return self.together(features_NM @ self.weights_MK, num_classes)

    def together(self, scores_NK: Tensor, num_classes: int) -> Tensor:
        """Return logits (N, C) for scores by mode."""
        if len(self.mode_class) == num_classes:
            return scores_NK[:, self.mode_class.argsort()]
        mode_class = self.mode_class.to(scores_NK.device)
        return class_scores(scores_NK, mode_class, num_classes, float(self.sharpness))

    def set_modes(self, mode_class: Tensor, weights_MK: Tensor, sharpness: float = 1.0) -> None:
        """Take over what the sums decided."""
        device = self.weights_MK.device
        self.mode_class = mode_class.to(device)
        self.weights_MK = weights_MK.to(device)
        self.sharpness = torch.tensor(sharpness, device=device)


class Branch(nn.Module):
    """A later part of the network beside the one before it, with a head of its own.

    Attributes:
        start: The stage whose input it shares with the trunk.
        stages: Its own copies of the stages from there on.
        head: Adds to the trunk's logits; zero at first.
    """

    def __init__(
        self, start: int, stages: nn.ModuleList, head: GrowingLinear | GrowingCosine
    ) -> None:
        super().__init__()
        self.start = start
        self.stages = stages
        self.head = head


@dataclass(frozen=True, eq=False)
class Seen:
    """What the heads look at.

    Attributes:
        features: The backbone's features, of the trunk and then of each branch (N, D).
        wide: The analytic head's inputs (N, W); empty where there is no such head.
    """

    features: Tensor
    wide: Tensor


class Classifier(nn.Module):
    """Images to one logit per class.

    Batch normalisation, where the architecture has it, answers with fixed statistics but
    for a base training: an answer never depends on its batch, and no running statistic
    drifts away from what the penalties protect.

    Attributes:
        active_head: Which head `forward` answers with; ``both`` adds their logits.
        analytic_weight: Multiplies the analytic head's logits where both answer.
        learns_statistics: Whether training mode lets batch normalisation use its batch.
        num_trunk_features: Backbone features of one image, without those of the branches.
    """

    def __init__(self, config: ModelConfig, shape: Shape) -> None:
        super().__init__()
        self.config = config
        self.active_head: Head = "linear"
        self.analytic_weight = 1.0
        self.learns_statistics = False
        backbone = build_backbone(config)
        self.stages = backbone.stages
        self._grid = backbone.grid
        self.num_trunk_features = backbone.num_features
        self.head = make_head(config.head, backbone.num_features, shape.head_blocks)
        self.branches = nn.ModuleList()
        for start, blocks in zip(shape.branch_starts, shape.branch_blocks, strict=True):
            head = make_head(config.head, backbone.num_features, blocks)
            self.branches.append(Branch(start, copy.deepcopy(self.stages[start:]), head))
        modes = range(shape.num_classes) if shape.mode_class is None else shape.mode_class
        self.analytic = AnalyticHead(shape.source, 0, shape.num_random_features, list(modes))
        self.analytic.widening = RandomFeatures(sum(self.wide_blocks()), shape.num_random_features)
        self.analytic.mirrored = shape.mirrored
        # How convolutions are fastest, in training and in answering: twice as fast on CPUs, and
        # what tensor cores want.
        self.to(memory_format=torch.channels_last)

    @property
    def shape(self) -> Shape:
        """What a classifier of this size is built from."""
        return Shape(
            head_blocks=self.head.blocks,
            num_random_features=self.num_random_features,
            source=self.analytic.source,
            mirrored=self.analytic.mirrored,
            mode_class=tuple(self.analytic.mode_class.tolist()),
            branch_starts=tuple(branch.start for branch in self._branches()),
            branch_blocks=tuple(branch.head.blocks for branch in self._branches()),
        )

    @property
    def num_classes(self) -> int:
        """Classes that both heads know."""
        return self.head.out_features

    @property
    def num_features(self) -> int:
        """Backbone features of one image, those of the branches included."""
        return self.num_trunk_features * (1 + len(self.branches))

    @property
    def num_random_features(self) -> int:
        """Width of the analytic head's projection; 0 when there is none."""
        return self.analytic.weights_MK.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.head.weight.device

    @torch.no_grad()
    def entering_shape(self, stage: int) -> tuple[int, ...]:
        """Return the shape of one example that enters the trunk's stage; 0 takes images.

        Raises:
            ValueError: If there is no such stage.
        """
        if not 0 <= stage <= len(self.stages):
            raise ValueError(f"the backbone has {len(self.stages)} stages, so none enters {stage}")
        config = self.config
        shape = (config.channels, config.image_size, config.image_size)
        if not stage:
            return shape
        passed = self.stages[:stage]
        modes = {module: module.training for module in passed.modules()}
        passed.eval()  # A blank image must leave no trace in running statistics.
        try:
            blank = torch.zeros(1, *shape, dtype=torch.uint8, device=self.device)
            return tuple(self.activations(blank, stop=stage).shape[1:])
        finally:
            for module, training in modes.items():
                module.training = training

    @property
    def has_batch_statistics(self) -> bool:
        """Whether the architecture normalises over batches."""
        return has_batch_statistics(self)

    def train(self, mode: bool = True) -> Classifier:
        """Set training mode; batch normalisation follows only where it may learn."""
        super().train(mode)
        if mode and not self.learns_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def activations(self, inputs: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the trunk's stages from `start` up to, not including, `stop`.

        Args:
            inputs: uint8 images (N, channels, height, width), or floating-point activations
                that enter stage `start`.
            start: Stages that `inputs` have already passed.
            stop: None means to the end of the backbone.
        """
        h = self._entering(inputs)
        for stage in self.stages[start:stop]:
            h = stage(h)
        return h

    def features(self, inputs: Tensor, *, start: int = 0) -> Tensor:
        """Return backbone features (N, D); arguments as in `activations`."""
        return self._run(inputs, start)[0]

    def see(self, inputs: Tensor, *, start: int = 0, pixels: Tensor | None = None) -> Seen:
        """Return what both heads look at; arguments as in `activations`.

        Args:
            inputs: As in `activations`; `start` may be at most the last stage.
            start: As there.
            pixels: The images, where `inputs` are not and the analytic head looks at pixels.
        """
        features, last_two = self._run(inputs, start)
        if not self.num_random_features:
            return Seen(features, features[:, :0])
        if self.analytic.source == "features":
            return Seen(features, features)
        if self.analytic.source == "pixels":
            return Seen(features, self.wide_inputs(inputs, pixels=pixels))
        # Each at length one: how strong a stage answers depends on the image's contrast, and on
        # photographs half a point of accuracy with it.
        wide = [F.normalize(self._pooled(h, _STAGE_GRID), dim=1) for h in last_two]
        return Seen(features, torch.cat(wide, dim=1))

    def wide_inputs(
        self, inputs: Tensor, *, start: int = 0, pixels: Tensor | None = None
    ) -> Tensor:
        """Return what the analytic head looks at (N, W); arguments as in `see`."""
        if not self.num_random_features:
            return inputs.new_zeros(len(inputs), 0, dtype=torch.float32)
        if self.analytic.source == "pixels":
            return self._entering(inputs if pixels is None else pixels).flatten(1)
        return self.see(inputs, start=start, pixels=pixels).wide

    def trained_logits(self, inputs: Tensor, *, start: int = 0) -> Tensor:
        """Return logits (N, C) of the trained head; arguments as in `activations`."""
        return self.logits_of(self.features(inputs, start=start))

    def logits_of(self, features_ND: Tensor) -> Tensor:
        """Return logits (N, C) of the trained head for backbone features."""
        parts = features_ND.split(self.num_trunk_features, dim=1)
        logits_NC: Tensor = self.head(parts[0])
        for branch, part in zip(self._branches(), parts[1:], strict=True):
            logits_NC = logits_NC + branch.head(part)
        return logits_NC

    def answer(self, seen: Seen, random_NM: Tensor | None = None) -> Tensor:
        """Return logits (N, C) of the active head.

        Args:
            seen: What the heads look at.
            random_NM: The random features that follow from it, where they are known already.
        """
        if self.active_head == "linear":
            return self.logits_of(seen.features)
        if random_NM is None:
            random_NM = self.analytic.widening(seen.wide)
        analytic_NC = self.analytic.of_random(random_NM.float(), self.num_classes)
        if self.active_head == "analytic":
            return analytic_NC
        return self.logits_of(seen.features) + self.analytic_weight * analytic_NC

    def forward(self, images: Tensor) -> Tensor:
        """Return uncalibrated logits (N, C) of the active head for uint8 images."""
        if self.active_head == "linear":
            return self.trained_logits(images)
        if self.active_head == "analytic":
            logits_NC: Tensor = self.analytic(self.wide_inputs(images), self.num_classes)
            return logits_NC
        return self.answer(self.see(images))

    def grow(self, num_classes: int, generator: torch.Generator) -> None:
        """Make room for more classes; the rows of the old ones stay as they are, to the bit.

        New rows of the trained head are small and random, of the analytic head zero.
        """
        old = self.num_classes
        if num_classes < old:
            raise ValueError(f"a head of {old} classes cannot shrink to {num_classes}")
        if num_classes == old:
            return
        self.head = self.head.grown(num_classes, generator)
        for branch in self._branches():
            branch.head = branch.head.grown(num_classes, generator)
            with torch.no_grad():
                branch.head.weight[old:] = 0
        fresh = torch.arange(old, num_classes, device=self.device)
        self.analytic.set_modes(
            torch.cat([self.analytic.mode_class, fresh]),
            F.pad(self.analytic.weights_MK, (0, num_classes - old)),
            float(self.analytic.sharpness),
        )

    def expand(self, start: int) -> None:
        """Add a branch from stage `start` on; the answers stay as they are, to the bit.

        The new branch starts as a copy of the trunk's stages, with a head of zeros.

        Source: Yan et al. 2021, arXiv:2103.16788, whose branches are whole networks; here
        they share the first stages.
        """
        if self.config.head != "linear":
            raise LearningError(
                f"model.head is {self.config.head}, and only a linear head can take branches; set "
                "learning.update.expansion to never, or begin a family with a linear head"
            )
        head = copy.deepcopy(self.head)
        nn.init.zeros_(head.weight)
        assert isinstance(head.bias, Tensor)
        nn.init.zeros_(head.bias)
        self.branches.append(Branch(start, copy.deepcopy(self.stages[start:]), head))

    def freeze_stages(self, num_stages: int) -> None:
        """Let training change only the stages after the first `num_stages`, and the head."""
        if num_stages > len(self.stages):
            raise ValueError(
                f"cannot freeze {num_stages} stages of a backbone that has {len(self.stages)}"
            )
        for index, stage in enumerate(self.stages):
            stage.requires_grad_(index >= num_stages)

    def freeze_but_last_branch(self) -> None:
        """Let training change only the newest branch and every head."""
        self.stages.requires_grad_(False)
        for branch in list(self._branches())[:-1]:
            branch.stages.requires_grad_(False)

    def copy(self) -> Classifier:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def _branches(self) -> Iterator[Branch]:
        for branch in self.branches:
            assert isinstance(branch, Branch)
            yield branch

    def _entering(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            return inputs
        check_images(inputs, self.config, "images")
        return standardise(inputs, self.config.pixels)

    def _run(self, inputs: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        """Features, and what the trunk's last stage takes and gives, then each branch gives."""
        h = self._entering(inputs)
        before = h
        entering: dict[int, Tensor] = {}
        for index in range(start, len(self.stages)):
            entering[index] = before = h
            h = self.stages[index](h)
        parts, outputs = [self._pooled(h, self._grid)], [before, h]
        for branch in self._branches():
            h = entering[branch.start]
            for stage in branch.stages:
                h = stage(h)
            parts.append(self._pooled(h, self._grid))
            outputs.append(h)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), outputs

    def wide_blocks(self) -> list[int]:
        """Return the numbers of inputs of the analytic head, by where they come from."""
        config, source = self.config, self.analytic.source
        if not self.num_random_features:
            return []
        if source == "features":
            return [self.num_trunk_features] * (1 + len(self.branches))
        if source == "pixels":
            return [config.channels * config.image_size**2]
        was_training = self.training
        self.eval()
        with torch.no_grad():
            blank = torch.zeros(1, config.channels, config.image_size, config.image_size)
            outputs = self._run(blank.to(self.device), 0)[1]
        self.train(was_training)
        return [self._pooled(h, _STAGE_GRID).shape[1] for h in outputs]

    @staticmethod
    def _pooled(h: Tensor, grid: int) -> Tensor:
        """Features (N, D): maps are averaged to a grid of at most `grid` by `grid`."""
        if h.dim() == 4:
            height, width = min(grid, h.shape[2]), min(grid, h.shape[3])
            if h.shape[2] % height == 0 and h.shape[3] % width == 0:
                # The same means; many times as fast backwards on CPUs.
                h = F.avg_pool2d(h, (h.shape[2] // height, h.shape[3] // width))
            else:
                h = F.adaptive_avg_pool2d(h, (height, width))
        return h.flatten(1)


def build_model(
    config: ModelConfig,
    num_classes: int,
    seed: int,
    *,
    num_random_features: int = 0,
    source: Source = "features",
) -> Classifier:
    """Build a classifier whose random weights follow from `seed` alone.

    Leaves the global random state as it was.

    Raises:
        ValueError: If there is no class, or a negative number of random features.

    >>> from lifelong_ray.config import ModelConfig
    >>> build_model(ModelConfig(), 8, seed=0).num_classes
    8
    """
    if num_classes < 1 or num_random_features < 0:
        raise ValueError(
            f"{num_classes} classes and {num_random_features} random features make no classifier; "
            "at least one class is needed, and 0 random features mean no analytic head"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(config, Shape((num_classes,), num_random_features, source))


def check_inputs(model: Classifier, inputs: Tensor, start: int, what: str) -> None:
    """Refuse what cannot enter a stage of the model, and numbers that are none.

    Args:
        model: Whose trunk they enter.
        inputs: uint8 images, or activations that enter stage `start`.
        start: Stages that they have passed.
        what: What errors call them, in the plural.

    Raises:
        LearningError: If so.
        ValueError: If there is no such stage.
    """
    check_rows(inputs, what)
    shape = model.entering_shape(start)
    # What follows the last stage is pooled, which features that are so already stay.
    pooled = (model.num_trunk_features,) if start == len(model.stages) else shape
    if not start and not inputs.is_floating_point():
        check_images(inputs, model.config, what)
    elif not inputs.is_floating_point() or inputs.shape[1:] not in (shape, pooled):
        raise LearningError(
            f"the {what} are {inputs.dtype} of shape {tuple(inputs.shape)}; stage {start} of this "
            f"model takes floating-point activations of shape (N, {', '.join(map(str, shape))}): "
            "compute them with this model's activations"
        )
    check_finite(inputs, what, "repair these images or leave them out")


@torch.no_grad()
def in_chunks(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    chunk: int = _CHUNK,
    *,
    filled_up: bool = False,
) -> Tensor:
    """Apply `function` to `inputs` in bounded pieces, without gradients.

    The pieces are the same for the same input, so the result is reproducible to the bit. Of no
    inputs there is one empty piece, whose result has the right shape.

    Args:
        function: Row by row; may do more rows than it is asked for.
        inputs: Rows.
        chunk: Rows of a piece.
        filled_up: Give every piece that many rows, so that what an input gives does not depend, to
            the bit, on how many others come with it: convolutions round by the size of the batch.
    """
    outputs = []
    for first in range(0, max(len(inputs), 1), chunk):
        piece = inputs[first : first + chunk]
        whole = with_rows(piece, chunk) if filled_up and len(piece) else piece
        outputs.append(function(whole)[: len(piece)])
    return torch.cat(outputs)


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the tensor with rows of zeros behind, so that it has `rows` of them."""
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def rows_at_once(device: torch.device) -> int:
    """How many inputs go through a backbone together where each must give the same to the bit.

    As fast as any number on processors of today; a GPU wants more.
    """
    return 64 if device.type == "cpu" else 512
