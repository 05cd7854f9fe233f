"""LitServe with its batching: decode, batch, predict, unbatch, encode.

Without postponed annotations: LitServe reads them at run time. Images come as a multipart field.
"""

import os
from typing import Any

import litserve
from fastapi import Request
from model import MAX_BATCH, WAIT_S, Model


class Api(litserve.LitAPI):
    """As LitServe's documentation writes it."""

    def setup(self, device: str) -> None:
        self._model = Model()

    def decode_request(self, request: Request) -> Any:
        return self._model.decode(request["image"].file.read())

    def predict(self, images: Any) -> Any:
        return self._model.predict(list(images))

    def batch(self, inputs: Any) -> Any:
        return inputs

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return self._model.as_json(output)


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=int(os.environ["PEER_PORT"]), host="127.0.0.1", generate_client_file=False)
