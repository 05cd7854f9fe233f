"""Ray Serve alone: one deployment with a FastAPI ingress that decodes, batches and infers."""

import os

from fastapi import FastAPI, Request
from model import MAX_BATCH, WAIT_S, Model
from ray import serve

http = FastAPI()


@serve.deployment(
    num_replicas=int(os.environ.get("PEER_REPLICAS", "1")),
    max_ongoing_requests=128,
    ray_actor_options={"num_cpus": 0.2},
)
@serve.ingress(http)
class Bare:
    """As Ray's documentation writes it."""

    def __init__(self) -> None:
        self._model = Model()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S)
    async def _predict(self, bodies: list[bytes]) -> list[dict]:
        answers = self._model.predict([self._model.decode(body) for body in bodies])
        return [self._model.as_json(answer) for answer in answers]

    @http.post("/predict")
    async def predict(self, request: Request) -> dict:
        return await self._predict(await request.body())


app = Bare.bind()
