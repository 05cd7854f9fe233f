"""One S3 server in a process of its own, for all tests that need one."""

import http.client
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port

BUCKET = "lifelong"


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        connection.request("GET", "/moto-api/")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    program = shutil.which("moto_server", path=str(Path(sys.executable).parent))
    assert program, "moto_server is not installed beside this Python; install the dev extra"
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""},
        )
    try:
        deadline = time.monotonic() + 30
        while not answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"moto_server does not answer: {log.read_text()}"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


@pytest.fixture(scope="session")
def endpoint_url(server_port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=10)
    connection.request("PUT", f"/{BUCKET}", headers={"Authorization": "AWS test:test"})
    assert connection.getresponse().status == 200
    connection.close()
    return f"http://127.0.0.1:{server_port}"
