"""Answers from a learner, ready to serve: arrays in, probabilities out.

Knows devices, precision and memory layout; does not know who asks, or how batches form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lifelong_ray.learning.learner import Learner


@dataclass(frozen=True)
class Answers:
    """Answers to one batch.

    Attributes:
        probabilities: float32, (N, C), rows summing to one, classes as in `class_names`.
        class_names: The classes.
    """

    probabilities: NDArray[np.float32]
    class_names: tuple[str, ...]


class Predictor:
    """A frozen copy of a learner's model on one device.

    Safe to use from several threads.
    """

    def __init__(
        self,
        learner: Learner,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"the precision is {precision!r}; a predictor knows fp32 and bf16")
        self.class_names = learner.class_names
        self._device = torch.device(device)
        self._precision = precision
        self._temperature = learner.temperature
        self._model = learner.model.copy().to(self._device).eval().requires_grad_(False)
        config = learner.model_config
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
            return Answers(np.zeros((0, len(self.class_names)), np.float32), self.class_names)
        # A copy: the caller's array may be read-only, which torch does not take.
        batch = torch.tensor(images, device=self._device)
        with (
            torch.inference_mode(),
            torch.autocast(
                self._device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"
            ),
        ):
            logits_NC = self._model(batch).float() / self._temperature
        probabilities = torch.softmax(logits_NC.double(), dim=1).float().cpu().numpy()
        return Answers(probabilities, self.class_names)

    def warm_up(self, batch_sizes: tuple[int, ...] = (1, 32)) -> None:
        """Answer blank batches, so that the first real one finds everything allocated."""
        for size in batch_sizes:
            self.predict(np.zeros((size, *self._shape), np.uint8))
