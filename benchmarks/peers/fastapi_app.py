"""FastAPI with uvicorn: an endpoint in the thread pool, and one behind a hand-made batcher."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from model import MAX_BATCH, WAIT_S, Model

app = FastAPI()
model = Model()
waiting: list[tuple[bytes, asyncio.Future[dict[str, Any]]]] = []
work = asyncio.Event()
tasks: set[asyncio.Task[None]] = set()


async def _body(request: Request) -> bytes:
    return await request.body()


@app.post("/predict")
def predict(body: Annotated[bytes, Depends(_body)]) -> dict[str, Any]:
    """One image at a time, on a thread of the pool."""
    [answer] = model.predict([model.decode(body)])
    return model.as_json(answer)


@app.post("/batched")
async def batched(request: Request) -> dict[str, Any]:
    """As many images as wait, together."""
    if not tasks:
        tasks.add(asyncio.create_task(_work()))
    future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    waiting.append((await request.body(), future))
    work.set()
    return await future


async def _work() -> None:
    while True:
        await work.wait()
        if len(waiting) < MAX_BATCH:
            await asyncio.sleep(WAIT_S)
        batch = waiting[:MAX_BATCH]
        del waiting[:MAX_BATCH]
        if not waiting:
            work.clear()
        try:
            answers = await asyncio.to_thread(_answer, [body for body, _ in batch])
        except Exception as error:  # noqa: BLE001 - belongs to those who wait
            for _, future in batch:
                future.set_exception(error)
            continue
        for answer, (_, future) in zip(answers, batch, strict=True):
            future.set_result(answer)


def _answer(bodies: list[bytes]) -> list[dict[str, Any]]:
    return [model.as_json(one) for one in model.predict([model.decode(body) for body in bodies])]
