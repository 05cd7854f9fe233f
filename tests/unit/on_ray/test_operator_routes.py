"""The routes of operators: who may call them, and what they see and wish through one front."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lifelong_ray.config import Config
from lifelong_ray.on_ray import operator_routes
from lifelong_ray.on_ray.http import install_error_handlers
from lifelong_ray.on_ray.replica import Replica, this_replica
from lifelong_ray.on_ray.serving import http
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import SECRETS, Scene, run
from tests.unit.on_ray.world import CLASSES, add_version, settings

OPERATOR = {"authorization": f"Bearer {SECRETS.admin_token}"}
WINDOW = settings(drift={"window_rows": 30})


async def call(
    scene: Scene,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] = OPERATOR,
    config: Config = WINDOW,
) -> httpx.Response:
    """What the replica of the scene's front answers."""

    async def replica() -> Replica:
        controller: Any = None
        return Replica(config, scene.store, SECRETS, scene.front, controller)

    app = FastAPI()
    install_error_handlers(app)
    app.include_router(operator_routes.router)
    app.dependency_overrides[this_replica] = replica
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://front"
    ) as client:
        return await client.request(method, path, json=body, headers=dict(headers))


ROUTES = [
    (method.upper(), path.replace("{verb}", "promote"))
    for path, methods in http.openapi()["paths"].items()
    for method, route in methods.items()
    if path.startswith("/admin")
]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer guessed"}])
def test_whoever_has_no_token_learns_nothing_not_even_what_was_wrong_with_the_request(
    store: MemoryStore, headers: dict[str, str]
) -> None:
    async def play(scene: Scene) -> None:
        before = dict(scene.store.objects)
        for method, path in ROUTES:
            answer = await call(scene, method, f"{path}?hours=-1", ["no object"], headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert scene.store.objects == before

    assert len(ROUTES) == 11
    run(play, store)


ARMS = [{"version": "v1", "weight": 60}, {"version": "v1.1", "weight": 40}]


@pytest.mark.parametrize(
    ("requests", "verbs"),
    [
        (
            [
                ("PUT", "/admin/rollout", {"candidate": "v1.1", "reason": "better"}),
                ("POST", "/admin/rollout/promote", {"force": True}),
            ],
            ["start", "promote"],
        ),
        (
            [
                ("PUT", "/admin/experiment", {"arms": ARMS, "end_s": time.time() + 3_600}),
                ("POST", "/admin/experiment/end", {"reason": "better"}),
            ],
            ["start_experiment", "end_experiment"],
        ),
    ],
)
def test_a_wish_is_in_the_document_when_it_is_accepted(
    store: MemoryStore, requests: list[tuple[str, str, Any]], verbs: list[str]
) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        accepted = [await call(scene, *request) for request in requests]

        assert [answer.status_code for answer in accepted] == [202, 202]
        wishes = scene.desk.read()[0].intents
        assert [wish.id for wish in wishes] == [one.json()["intent_id"] for one in accepted]
        assert [wish.verb for wish in wishes] == verbs
        assert {wish.reason for wish in wishes} == {"", "better"}

    run(play, store)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "/admin/rollout", {}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "weight": 5}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "force": "no"}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "reason": 7}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "steps": [{}]}, 422, "bad_steps"),
        ("PUT", "/admin/rollout", {"candidate": "v7"}, 404, "unknown_version"),
        ("POST", "/admin/rollout/destroy", {}, 404, "unknown_verb"),
        ("POST", "/admin/rollout/abort", {"force": True}, 422, "bad_request"),
        ("POST", "/admin/experiment/end", {"now": True}, 422, "bad_request"),
        ("PUT", "/admin/experiment", {}, 422, "bad_experiment"),
        ("GET", "/admin/experiment?id=e9", None, 404, "unknown_experiment"),
        ("GET", "/admin/comparisons?rollout=r9", None, 404, "unknown_rollout"),
        ("GET", "/admin/comparisons?hours=0", None, 422, "bad_request"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_says_why_and_changes_nothing(
    store: MemoryStore, method: str, path: str, body: Any, status: int, code: str
) -> None:
    async def play(scene: Scene) -> None:
        before = scene.store.objects["current.json"]

        answer = await call(scene, method, path, body)

        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert scene.store.objects["current.json"] == before

    run(play, store)


def test_drift_is_judged_once_there_are_enough_answers_of_the_stable_version(
    store: MemoryStore,
) -> None:
    async def play(scene: Scene) -> None:
        for number in range(30):
            if number == 29:
                scene.front.log.flush()
                early = (await call(scene, "GET", "/admin/drift")).json()
            await scene.answer(CLASSES[number % 3], key=str(number))
        scene.front.log.flush()
        judged = (await call(scene, "GET", "/admin/drift")).json()

        assert early == {"judged": False, "num_recent": 29}
        assert judged["judged"]

    run(play, store)


def test_the_page_lists_what_users_call_before_what_operators_do() -> None:
    told = [tag["name"] for tag in http.openapi()["tags"]]

    assert told == ["predict", "feedback", "open inference protocol", "operators"]
    routes = [route for methods in http.openapi()["paths"].values() for route in methods.values()]
    assert {tag for route in routes for tag in route["tags"]} == set(told)
