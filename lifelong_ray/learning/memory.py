"""What a model keeps of the examples it was shown, as its settings say.

Puts `ReplayMemory` and `Classifier` together: features for herding or in place of images,
logits for dark experience.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lifelong_ray.config import ModelConfig, UpdateConfig
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.checks import check_finite, check_labels
from lifelong_ray.learning.model import Classifier, in_chunks
from lifelong_ray.learning.replay import ReplayMemory
from lifelong_ray.types import LearningError


def empty_memory(model: ModelConfig, num_classes: int) -> ReplayMemory:
    """Return a memory of no images, which `remember` turns to features where asked to."""
    shape = (model.channels, model.image_size, model.image_size)
    return ReplayMemory.empty(shape, num_classes)


def memory_stage(config: UpdateConfig) -> int:
    """Return the stages that remembered inputs have passed; 0 for images.

    Raises:
        LearningError: If features are to be kept of a backbone that may change under them.
    """
    if config.replay.content == "images":
        return 0
    if not isinstance(config.frozen_stages, int) or not config.frozen_stages:
        raise LearningError(
            f"replay.content is features but frozen_stages is {config.frozen_stages}: kept "
            "features need stages that stay as they are; set frozen_stages to 1 or more"
        )
    return config.frozen_stages


def stage_after(parent_stage: int, memory: ReplayMemory, config: UpdateConfig) -> int:
    """Return the stages that the memory's inputs have passed once `remember` has run."""
    return parent_stage if len(memory) else memory_stage(config)


def check_memory(memory: ReplayMemory, stage: int, model: Classifier, config: UpdateConfig) -> None:
    """Refuse a memory that cannot be gone on with as the settings say.

    Args:
        memory: The parent's.
        stage: Stages that its inputs have passed.
        model: The parent's, which new images and remembered inputs enter.
        config: What is to be kept.

    Raises:
        LearningError: If so.
    """
    if not len(memory):
        return
    if memory_stage(config) != stage or (memory.content == "features") != (stage > 0):
        raise LearningError(
            f"the memory holds {memory.content} that passed {stage} stages, which "
            f"replay.content {config.replay.content} with {config.frozen_stages} frozen stages "
            "does not go on with; keep content and frozen_stages as they were for the base training"
        )
    if stage > len(model.stages):
        raise LearningError(
            f"the memory's features passed {stage} stages, and the backbone has "
            f"{len(model.stages)}; use the memory that was saved with this model"
        )
    held, expected = tuple(memory.inputs.shape[1:]), model.entering_shape(stage)
    if held != expected:
        made = f"{stage} stages of this model give" if stage else "the new images are"
        what = "features of another size" if stage else "another image size"
        raise LearningError(
            f"a memory of {what}: it holds {held} and {made} {expected}; use the "
            "memory that was saved with this model, or begin a family anew with a base training"
        )
    check_labels(
        memory.labels,
        len(memory),
        model.num_classes,
        "remembered label",
        "use the memory that was saved with this model",
    )
    check_finite(
        memory.inputs, "remembered features", "go on from a version before it, or without a memory"
    )


@torch.no_grad()
def remember(
    memory: ReplayMemory,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    config: UpdateConfig,
    *,
    seed: int,
    update: int = 0,
    is_trained: bool = True,
) -> ReplayMemory:
    """Return the memory after these examples, with draws that differ from update to update.

    Args:
        memory: Before.
        model: After learning the examples, in eval mode.
        images: uint8 (N, channels, height, width).
        labels: Their classes.
        config: What to keep, and how much of it.
        seed: Of the training.
        update: Number of the update that brought them.
        is_trained: Whether the trained head has learned them. If not, its logits are of no use
            and none are stored.
    """
    replay, stage = config.replay, memory_stage(config)
    inputs = images
    if stage:
        inputs = in_chunks(
            lambda x: _half(model.activations(_on(model, x), stop=stage)), images, filled_up=True
        )
        if memory.content == "images" and not len(memory):
            empty = ReplayMemory.empty(tuple(inputs.shape[1:]), memory.num_classes, inputs.dtype)
            memory = replace(empty, seen=memory.seen)
    features = None
    if replay.selection == "herding":
        both = [model_features(model, x, stage) for x in (memory.inputs, inputs)]
        features = torch.cat(both)
    logits = None
    if replay.dark_weight:
        logits = torch.full((len(labels), model.num_classes), torch.nan)
    memory = memory.updated(
        inputs,
        labels,
        memory_per_class=replay.memory_per_class,
        memory_share=replay.memory_share,
        selection=replay.selection,
        generator=generator_for(seed, "memory", update, int(memory.seen.sum())),
        num_classes=model.num_classes,
        logits=logits,
        update=update,
        features=features,
    )
    if logits is not None and is_trained:
        fresh = memory.updates == update
        memory.logits[fresh] = in_chunks(
            lambda x: model.trained_logits(_on(model, _full(x)), start=stage).cpu(),
            memory.inputs[fresh],
        )
    return memory


def model_features(model: Classifier, inputs: Tensor, stage: int) -> Tensor:
    """Return backbone features (N, D) of remembered or new inputs, on the CPU."""
    if not len(inputs):
        return torch.zeros(0, model.num_features)
    return in_chunks(lambda x: model.features(_on(model, _full(x)), start=stage).cpu(), inputs)


def _on(model: Classifier, x: Tensor) -> Tensor:
    return x.to(model.device)


def _half(x: Tensor) -> Tensor:
    return x.to("cpu", torch.float16)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x
