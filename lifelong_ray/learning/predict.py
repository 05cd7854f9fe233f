"""Answers from a learner, ready to serve: arrays in, probabilities out.

Knows devices, precision and memory layout; does not know who asks, or how batches form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lifelong_ray.config import Precision
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.model import Classifier
from lifelong_ray.learning.precision import lower_precision


@dataclass(frozen=True)
class Answers:
    """Answers to one batch.

    Attributes:
        probabilities: float32, (N, C), rows summing to one, classes as in `class_names`.
        class_names: The classes.
        light: Which rows a light model answered, bool (N,); see `Cascade`.
    """

    probabilities: NDArray[np.float32]
    class_names: tuple[str, ...]
    light: NDArray[np.bool_]


class Calibrated(Protocol):
    """A model whose logits mean something; `Learner` is one."""

    @property
    def model(self) -> Classifier:
        """In eval mode, on the CPU."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""

    @property
    def temperature(self) -> float:
        """Divides the logits."""


class Answerer(Protocol):
    """Answers batches; `Predictor` and `Cascade` do."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes."""

    @property
    def precision(self) -> Precision:
        """What it computes in."""

    def predict(self, images: NDArray[np.uint8]) -> Answers:
        """Answer a batch of (N, channels, height, width) uint8 images."""

    def warm_up(
        self, batch_sizes: tuple[int, ...] = (1, 32), images: NDArray[np.uint8] | None = None
    ) -> None:
        """Answer some batches, so that the first real one finds everything allocated."""


class Predictor:
    """A frozen copy of a model on one device.

    Safe to use from several threads.

    Attributes:
        class_names: The classes.
        precision: What it computes in.
        device: Where it computes.
        channels_last: Whether images are laid out by pixel and then by channel.
        lowered_share: Share of the trained weights held in fewer than 32 bits; see
            `lower_precision`.
    """

    def __init__(
        self,
        source: Calibrated,
        device: str = "cpu",
        precision: Precision = "fp32",
        *,
        channels_last: bool = True,
    ) -> None:
        """Prepare the model.

        Args:
            source: Whose model; stays as it is.
            device: Where to answer.
            precision: What to compute in.
            channels_last: Lay images out by pixel and then by channel where the model has
                convolutions, which are fastest so; else by channel and then by pixel.

        Raises:
            LearningError: If nothing of the model can be int8, and int8 it should be.
            ValueError: If there is no such precision.
        """
        if precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"the precision is {precision!r}; a predictor knows {known}")
        self.class_names = source.class_names
        self.precision = precision
        self.device = device
        self._device = torch.device(device)
        self._temperature = source.temperature
        has_convolutions = any(isinstance(m, nn.Conv2d) for m in source.model.modules())
        self.channels_last = channels_last and has_convolutions
        self._layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model = source.model.copy().to(self._device).to(memory_format=self._layout)
        self._model = model.eval().requires_grad_(False)
        self.lowered_share = lower_precision(self._model, precision, self._device)
        config = source.model.config
        self._shape = (config.channels, config.image_size, config.image_size)

    def predict(self, images: NDArray[np.uint8]) -> Answers:
        """Answer a batch of (N, channels, height, width) uint8 images.

        Raises:
            ValueError: If the shape or type is not what the model takes.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self._shape:
            raise ValueError(
                f"the batch is {images.dtype} of shape {images.shape}; this model takes uint8 of "
                f"shape (N, {', '.join(map(str, self._shape))}); use feedback.to_model_input"
            )
        if not len(images):
            return self._answers(np.zeros((0, len(self.class_names)), np.float32))
        # A copy: the caller's array may be read-only, which torch does not take.
        batch = torch.tensor(images, device=self._device).contiguous(memory_format=self._layout)
        with (
            torch.inference_mode(),
            torch.autocast(
                self._device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
            ),
        ):
            logits_NC = self._model(batch).float() / self._temperature
        probabilities = torch.softmax(logits_NC.double(), dim=1).float().cpu().numpy()
        return self._answers(probabilities)

    def _answers(self, probabilities: NDArray[np.float32]) -> Answers:
        return Answers(probabilities, self.class_names, np.zeros(len(probabilities), np.bool_))

    def warm_up(
        self, batch_sizes: tuple[int, ...] = (1, 32), images: NDArray[np.uint8] | None = None
    ) -> None:
        """Answer some batches, so that the first real one finds everything allocated.

        Args:
            batch_sizes: One batch of each.
            images: What they are of, repeated as often as needed; blank where there are none.
        """
        if images is None or not len(images):
            images = np.zeros((1, *self._shape), np.uint8)
        for size in batch_sizes:
            self.predict(np.resize(images, (size, *self._shape)))


def remembered_images(learner: Learner, at_most: int) -> NDArray[np.uint8]:
    """Return real images that the learner has kept, uint8 (N, channels, height, width).

    There are none where it keeps features, or nothing.
    """
    config = learner.model_config
    if learner.memory_stage or learner.memory.inputs.dtype != torch.uint8:
        return np.zeros((0, config.channels, config.image_size, config.image_size), np.uint8)
    return learner.memory.inputs[:at_most].numpy()
