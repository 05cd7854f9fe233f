"""A port that is taken is refused before Serve starts."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest
from ray import serve

from lifelong_ray.on_ray.serving import require_free_port, start_app
from lifelong_ray.types import ServingError
from tests.unit.on_ray.world import settings


@pytest.mark.parametrize("listens", [True, False], ids=["listening", "only bound"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_refused_before_serve_starts(
    host: str, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("Serve was started")

    monkeypatch.setattr(serve, "start", refuse)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        port = other.getsockname()[1]

        with pytest.raises(ServingError, match=f"port {port} on {host} cannot be used"):
            start_app(settings(serving={"host": host, "port": port}))


def test_a_port_whose_last_connection_just_ended_is_free() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # this side closes first, and keeps the port in TIME_WAIT
        client.close()

    require_free_port("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ServingError, match="cannot be used"):
        require_free_port("192.0.2.1", 8000)
