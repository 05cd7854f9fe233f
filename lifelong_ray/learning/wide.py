"""The analytic head of a model: its sums over examples, its solution, and how it is used.

Puts `AnalyticSums` and `Classifier` together. Knows which images are behind activations,
and how a model with two heads had best answer; does not know how the backbone came about.

Axes: N examples, C classes, K modes, M random features, W inputs of the analytic head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lifelong_ray.config import AnalyticConfig, LearningConfig, ModelConfig, UpdateConfig
from lifelong_ray.learning.analytic import AnalyticSums, history_after
from lifelong_ray.learning.collective import Collective
from lifelong_ray.learning.evaluate import accuracy, clearly_better, fit_temperature
from lifelong_ray.learning.model import Classifier, Head, Seen, Source, rows_at_once, with_rows
from lifelong_ray.learning.modes import choose_sharpness, class_scores
from lifelong_ray.learning.widening import RandomFeatures
from lifelong_ray.types import LearningError

_ROWS = 512
_SUMS_ROWS = 65_536
_NUM_FITTING = 2_000
_DEFAULT_SHARPNESS = 10.0
_ALIKE = 0.3
# Of the analytic head beside the trained one. First the one that disturbs it least: on CIFAR-10
# it was never worse than the analytic head alone, and up to half a point better.
_MIX = (32.0, 16.0, 8.0, 4.0, 2.0)
NO_MIRROR = (
    "the analytic sums of this family are over mirror images too, which features kept or made up "
    "in place of images cannot give; keep images (learning.update.replay.content, "
    "pseudo_features 0), or set learning.analytic.mirror to false for the base training"
)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Training inputs of a model, wherever in the backbone they enter.

    Attributes:
        tensor: uint8 images, or activations entering stage `start` (N, ...).
        start: Stages that `tensor` has passed.
        pixels: The images, for an analytic head that looks at them; None where `tensor` is.
        turned: What `tensor` would be of the mirror images, where that is kept; None elsewhere.
    """

    tensor: Tensor
    start: int = 0
    pixels: Tensor | None = None
    turned: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, chosen: slice | Tensor) -> Inputs:
        pixels = None if self.pixels is None else self.pixels[chosen]
        turned = None if self.turned is None else self.turned[chosen]
        return Inputs(self.tensor[chosen], self.start, pixels, turned)

    def mirrored(self) -> Inputs:
        """Return the same of the mirror images.

        Raises:
            LearningError: If only activations are left of the images.
        """
        pixels = None if self.pixels is None else self.pixels.flip(-1)
        if not self.start:
            return Inputs(self.tensor.flip(-1))
        if self.turned is not None:
            return Inputs(self.turned, self.start, pixels, self.tensor)
        if pixels is None:
            raise LearningError(NO_MIRROR)
        return Inputs(pixels)


def source_for(model: ModelConfig, learning: LearningConfig) -> Source:
    """Return what the analytic head of a new family looks at.

    Raises:
        LearningError: If that is more than the architecture or the memory will have.
    """
    config, update = learning.analytic, learning.update
    has_maps = model.name in ("convnet", "resnet20", "resnet32")
    if config.source == "stages" and not has_maps:
        raise LearningError(
            f"analytic.source is stages, but what the stages of {model.name} give cannot be "
            "pooled alike; use features, or pixels"
        )
    imageless = replays_no_images(update)
    if imageless and config.source in ("pixels", "stages") and config.num_features:
        raise LearningError(
            f"analytic.source is {config.source}, which features kept or made up in place of "
            "images cannot give; set it to features"
        )
    if config.source != "auto":
        return config.source
    # A network of dense layers keeps little of what its first classes did not need; its
    # pixels are few enough to be looked at themselves.
    return "pixels" if model.name == "mlp" and not imageless else "features"


def mirror_for(learning: LearningConfig) -> bool | Literal["auto"]:
    """Return whether the sums of a new family are over mirror images too.

    Raises:
        LearningError: If they are to be, and what will be replayed has no mirror images.
    """
    wanted, update = learning.analytic.mirror, learning.update
    if not learning.analytic.num_features or not replays_no_images(update):
        return wanted
    if wanted is True:
        raise LearningError(NO_MIRROR)
    return False


def replays_no_images(update: UpdateConfig) -> bool:
    """Whether features stand in for old images, which have no pixels and no mirror images."""
    return bool(update.pseudo_features) or update.replay.content == "features"


@torch.no_grad()
def look(model: Classifier, inputs: Inputs) -> Seen:
    """Return what both heads look at, on the CPU, for all of `inputs`."""
    features, wide = [], []
    for seen in _seen_by_pieces(model, inputs):
        features.append(seen.features.cpu())
        wide.append(seen.wide.cpu())
    return Seen(torch.cat(features), torch.cat(wide))


@torch.no_grad()
def fit_widening(model: Classifier, inputs: Inputs, seed: int, generator: torch.Generator) -> None:
    """Draw the model's random features, to the scale of some of `inputs`."""
    if not model.num_random_features:
        return
    chosen = torch.randperm(len(inputs), generator=generator)[:_NUM_FITTING]
    wide_NW = look(model, inputs[chosen]).wide
    fitted = RandomFeatures.fitted(
        wide_NW, model.num_random_features, seed, blocks=model.wide_blocks()
    )
    model.analytic.widening = fitted.to(model.device)


@torch.no_grad()
def take_sums(
    model: Classifier,
    inputs: Inputs,
    modes_N: Tensor,
    room: AnalyticSums,
    group: Collective,
    weights_N: Tensor | None = None,
    *,
    known_NM: Tensor | None = None,
    plain: AnalyticSums | None = None,
) -> AnalyticSums:
    """Return the sums over all examples, of which each worker takes its share.

    A mirrored head's are over each image and its mirror image with half the weight, so that
    counts stay those of examples; halves of whole numbers are exact too.

    Args:
        model: Gives the random features.
        inputs: Examples.
        modes_N: The mode of each.
        room: Sums whose modes and classes are meant; their values do not count, nor their width.
        group: The workers.
        weights_N: How many examples each one stands for; None means one.
        known_NM: Their random features, where they are known; may have more rows behind.
        plain: All workers' sums over these examples without their mirror images, where a
            mirrored head's are wanted and these are known.
    """
    views = (False, True) if model.analytic.mirrored else (False,)
    if plain is not None:
        views = (True,)
    total: AnalyticSums | None = None
    for first in range(group.rank * _SUMS_ROWS, len(inputs), group.world_size * _SUMS_ROWS):
        rows = slice(first, first + _SUMS_ROWS)
        piece = inputs[rows]
        weights = None if weights_N is None else weights_N[rows]
        for mirrored in views:
            if known_NM is None or mirrored:
                features_NM = random_features(model, piece, mirrored=mirrored)
            else:
                features_NM = known_NM[first : first + len(piece)]
            total = AnalyticSums.of(
                features_NM,
                modes_N[rows],
                room.num_classes,
                weights,
                mode_class=room.mode_class,
                onto=total,
            )
    if total is None:
        nothing_NM = torch.zeros(0, model.num_random_features, dtype=torch.int8)
        total = AnalyticSums.of(
            nothing_NM, modes_N[:0], room.num_classes, mode_class=room.mode_class
        )
    group.sum([total.gram, total.class_sums, total.counts])
    if plain is not None:
        total = plain.merged_into(total)
    if model.analytic.mirrored:
        for values in (total.gram, total.class_sums, total.counts):
            values.mul_(0.5)
    return total


def num_views(model: Classifier) -> int:
    """How many looks at an image its analytic sums are over: at the image, and at its mirror."""
    return 2 if model.analytic.mirrored else 1


@torch.no_grad()
def random_features(model: Classifier, inputs: Inputs, *, mirrored: bool = False) -> Tensor:
    """Return the analytic head's random features (N, M) as int8, on the CPU.

    Args:
        model: Whose head it is.
        inputs: Examples.
        mirrored: Of their mirror images instead.
    """
    features = []
    for first in range(0, len(inputs), _ROWS):
        piece = inputs[first : first + _ROWS]
        wide_NW = _wide_inputs(model, piece.mirrored() if mirrored else piece)
        features.append(model.analytic.widening.integers(wide_NW).cpu())
    return torch.cat(features)


@torch.no_grad()
def answers(model: Classifier, inputs: Inputs) -> Tensor:
    """Return the active head's logits (N, C) for all of `inputs`, on the model's device."""
    return torch.cat([model.answer(seen) for seen in _seen_by_pieces(model, inputs)])


@torch.no_grad()
def answers_and_random_features(model: Classifier, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return what `answers` and `random_features` do, in one pass through the backbone."""
    logits, random = [], []
    for seen in _seen_by_pieces(model, inputs):
        features_NM = model.analytic.widening.integers(seen.wide)
        logits.append(model.answer(seen, features_NM))
        random.append(features_NM.cpu())
    return torch.cat(logits), torch.cat(random)


def _seen_by_pieces(model: Classifier, inputs: Inputs) -> Iterator[Seen]:
    """What both heads look at, on the model's device, a bounded number of inputs at once."""
    for first in range(0, len(inputs), _ROWS):
        seen = [
            Seen(one.features[:count], one.wide[:count])
            for tensor, pixels, count in _placed(model, inputs[first : first + _ROWS])
            for one in [model.see(tensor, start=inputs.start, pixels=pixels)]
        ]
        yield Seen(torch.cat([one.features for one in seen]), torch.cat([one.wide for one in seen]))


def _wide_inputs(model: Classifier, piece: Inputs) -> Tensor:
    parts = [
        model.wide_inputs(tensor, start=piece.start, pixels=pixels)[:count]
        for tensor, pixels, count in _placed(model, piece)
    ]
    return torch.cat(parts)


def _placed(model: Classifier, piece: Inputs) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Inputs and pixels on the model's device, laid out as convolutions like them.

    In batches of one size, filled up with rows of zeros, and how many of the rows count.
    """
    rows = rows_at_once(model.device)
    for first in range(0, len(piece), rows):
        batch = piece[first : first + rows]
        pixels = None
        if batch.pixels is not None:
            pixels = with_rows(batch.pixels.to(model.device), rows)
        tensor = with_rows(batch.tensor.to(model.device), rows)
        if tensor.dtype == torch.float16:
            tensor = tensor.float()
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        yield tensor, pixels, len(batch)


def solve(
    model: Classifier, sums: AnalyticSums, config: AnalyticConfig, ridge: float
) -> tuple[AnalyticSums, float]:
    """Give the model the head that follows from the sums; return these and the ridge.

    Modes of a class that the head cannot tell apart are put together: kept apart, they would
    share out one class's score.

    Args:
        model: Its analytic head is replaced.
        sums: Over everything that is to be known.
        config: `ridge` 0 chooses one.
        ridge: The one before, near which it is looked for; 0 means there was none.
    """
    if not model.num_random_features:
        return sums, 0.0
    sums, _ = sums.merged_modes(config.max_modes)
    chosen = config.ridge or sums.choose_ridge(ridge or None, views=num_views(model))
    weights_MK = sums.solve(chosen, config.class_balance)
    sums, weights_MK = _alike_put_together(sums, weights_MK)
    model.analytic.set_modes(sums.mode_class, weights_MK, _DEFAULT_SHARPNESS)
    return sums, chosen


def _alike_put_together(sums: AnalyticSums, weights_MK: Tensor) -> tuple[AnalyticSums, Tensor]:
    """Add up modes of one class whose examples score much the same for either.

    The mean score for mode k of the examples of mode j follows from the sums. Columns add up,
    so the head need not be solved anew.
    """
    means_MK = (sums.class_sums / sums.counts.clamp(min=1e-12)).float()
    score_JK = means_MK.T @ weights_MK
    modes = list(range(len(sums.mode_class)))
    partner = list(modes)
    for j in modes:
        for k in modes[:j]:
            if sums.mode_class[j] == sums.mode_class[k]:
                own = min(float(score_JK[j, j]), float(score_JK[k, k]))
                cross = max(float(score_JK[j, k]), float(score_JK[k, j]))
                if cross > _ALIKE * own:
                    partner[j] = partner[k]
                    break
    first = sorted(set(partner))
    if len(first) == len(modes):
        return sums, weights_MK
    place_K = torch.tensor([first.index(p) for p in partner])
    together_KJ = torch.zeros(len(modes), len(first), dtype=torch.float64)
    together_KJ[torch.arange(len(modes)), place_K] = 1
    merged = replace(
        sums,
        class_sums=sums.class_sums @ together_KJ,
        counts=sums.counts @ together_KJ,
        mode_class=sums.mode_class[first],
        history=history_after(sums.history, place_K),
    )
    return merged, weights_MK @ together_KJ.float()


@dataclass(frozen=True)
class Answering:
    """How a model had best answer, as seen on labelled examples.

    Attributes:
        head: Which head answers.
        accuracy: Of that head.
        temperature: For its logits.
        analytic_weight: Of the analytic head where both answer.
        sharpness: Of the analytic head.
        right: Which of the examples are answered rightly, (N,) bool; None where there were none.
    """

    head: Head
    accuracy: float
    temperature: float
    analytic_weight: float
    sharpness: float
    right: Tensor | None = None


@torch.no_grad()
def choose_answering(
    model: Classifier, seen: Seen, labels_N: Tensor, *, prefer: Head, among: tuple[Head, ...]
) -> Answering:
    """Make the best way to answer the model's own: `prefer`, unless another is clearly better."""
    device = model.device
    linear_NC = model.logits_of(seen.features.to(device)).cpu()
    heads = [prefer, *(head for head in among if head != prefer)]
    candidates: list[tuple[Head, float, Tensor]] = []
    sharpness = float(model.analytic.sharpness)
    analytic_NC = linear_NC
    if any(head != "linear" for head in heads):
        scores_NK, modes = _scores(model, seen.wide), model.analytic.mode_class.cpu()
        if len(modes) > model.num_classes:
            sharpness = choose_sharpness(scores_NK, labels_N, modes, model.num_classes)
        analytic_NC = class_scores(scores_NK, modes, model.num_classes, sharpness)
    for head in heads:
        if head == "linear":
            candidates.append((head, 1.0, linear_NC))
        elif head == "analytic":
            candidates.append((head, 1.0, analytic_NC))
        else:
            candidates += [(head, weight, linear_NC + weight * analytic_NC) for weight in _MIX]
    rights = [logits_NC.argmax(1) == labels_N for _, _, logits_NC in candidates]
    kept = 0
    for index in sorted(range(len(rights)), key=lambda i: -int(rights[i].sum())):
        if clearly_better(rights[index], rights[0]):
            kept = index
            break
    head, weight, logits_NC = candidates[kept]
    best = Answering(
        head,
        accuracy(logits_NC, labels_N),
        fit_temperature(logits_NC, labels_N),
        weight,
        sharpness,
        rights[kept],
    )
    model.active_head = best.head
    model.analytic_weight = best.analytic_weight
    model.analytic.sharpness = torch.tensor(best.sharpness, device=device)
    return best


def _scores(model: Classifier, wide_NW: Tensor) -> Tensor:
    analytic = model.analytic
    return torch.cat(
        [
            (analytic.widening(piece.to(model.device)) @ analytic.weights_MK).cpu()
            for piece in wide_NW.split(_ROWS)
        ]
    )
