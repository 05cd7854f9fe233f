"""The model that every peer serves, from a version in lifelong_ray's registry.

Decoding is what such servers are written with: Pillow, to a square of the model's size, without
lifelong_ray's checks of what a stranger may send.
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lifelong_ray.config import StoreConfig
from lifelong_ray.learning import Learner
from lifelong_ray.release import Registry
from lifelong_ray.storage import open_store

MAX_BATCH = 32
WAIT_S = 0.002


class Model:
    """Decodes images and answers batches of them, in one thread of this process.

    Attributes:
        size: Height and width of its input, pixels.
        channels: Channels of its input.
    """

    def __init__(self) -> None:
        store = open_store(StoreConfig(url=os.environ["PEER_STORE"]))
        _, files = Registry(store).load("v1")
        learner = Learner.from_files(files)
        self._model = learner.model.eval().requires_grad_(False)
        self._temperature = learner.temperature
        self._names = learner.class_names
        self.size = learner.model_config.image_size
        self.channels = learner.model_config.channels
        self._mode = "RGB" if self.channels == 3 else "L"
        torch.set_num_threads(int(os.environ.get("PEER_THREADS", "1")))

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """(C, H, W) of an encoded image."""
        with Image.open(io.BytesIO(data)) as opened:
            return self.fit(opened)

    def fit(self, opened: Image.Image) -> NDArray[np.uint8]:
        """(C, H, W) of an image, which is decoded here."""
        image = opened.convert(self._mode)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    def predict(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Probabilities (C,) of each image."""
        with torch.inference_mode():
            logits = self._model(torch.from_numpy(np.stack(images))) / self._temperature
            return list(torch.softmax(logits, dim=1).numpy())

    def as_json(self, probabilities: NDArray[np.float32]) -> dict[str, Any]:
        """An answer like those of `POST /predict`."""
        order = np.argsort(probabilities)[::-1][:5]
        top = [{"class": self._names[i], "confidence": float(probabilities[i])} for i in order]
        return {**top[0], "top_k": top}
