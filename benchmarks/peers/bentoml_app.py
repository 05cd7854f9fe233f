"""BentoML with its adaptive batching; images come as a multipart field."""

# Without postponed annotations: BentoML reads them when the class is made.

import os
from typing import Any

import bentoml
from model import MAX_BATCH, Model
from PIL.Image import Image


@bentoml.service(workers=1, threads=int(os.environ.get("PEER_THREADS", "1")))
class Classifier:
    """As BentoML's documentation writes it."""

    def __init__(self) -> None:
        self._model = Model()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10_000)
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        """Answer as many images as were waiting."""
        answers = self._model.predict([self._model.fit(image) for image in images])
        return [self._model.as_json(answer) for answer in answers]
