"""What every test needs: a closed environment, and one local Ray for those that ask for it.

Set before anything imports Ray, so that its processes inherit it. Tests talk to loopback only, have
a home folder of their own, and leave no process behind: whatever they start inherits a variable by
which it is found again.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# A short path: Ray's Unix sockets lie below it, and their names may have 107 bytes.
SCRATCH = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))
RUN_MARK = f"LIFELONG_TEST_RUN={uuid.uuid4().hex}"

_HAPROXY = SCRATCH / "haproxy"
_ENVIRONMENT = {
    "LIFELONG_TEST_RUN": RUN_MARK.partition("=")[2],
    "HOME": str(SCRATCH / "home"),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    # Ray: token authentication is on or off on purpose, never because a token was found.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(_HAPROXY / "haproxy.cfg"),
    "RAY_SERVE_HAPROXY_SOCKET_PATH": str(_HAPROXY / "admin.sock"),
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(_HAPROXY),
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(_HAPROXY / "server-state"),
    # Libraries that would otherwise look for a network.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
os.environ.update(_ENVIRONMENT)
for _name in [*os.environ]:
    # Settings of the person who runs the tests; and Ray may not join a cluster of theirs.
    if _name in {"RAY_ADDRESS", "AWS_PROFILE"} or (
        _name.startswith("LIFELONG_") and _name not in {"LIFELONG_TEST_RUN", "LIFELONG_CI_RUN"}
    ):
        del os.environ[_name]
for _folder in (SCRATCH / "home", _HAPROXY):
    _folder.mkdir()


@dataclass(frozen=True)
class RaySession:
    """One local Ray: its address, its dashboard (which takes jobs) and its folder."""

    address: str
    dashboard_url: str
    folder: Path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """A local Ray with four CPUs, for tests/cluster and tests/e2e; stopped at the end."""
    import ray

    folder = SCRATCH / "ray"
    dashboard_port = free_port()
    context = ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port,
        object_store_memory=256 * 1024 * 1024,
        log_to_driver=False,
        _temp_dir=str(folder),
    )
    try:
        yield RaySession(
            address=context.address_info["gcs_address"],
            dashboard_url=f"http://127.0.0.1:{dashboard_port}",
            folder=folder,
        )
    finally:
        if ray.is_initialized():
            from ray import serve

            serve.shutdown()
        ray.shutdown()
        # `ray.shutdown` returns before its processes have ended, and leaves HAProxy behind.
        end_started_processes(patience_s=10)


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    left = end_started_processes(patience_s=5)
    assert not left, "tests left these processes, which were ended: " + "; ".join(left.values())


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def started_processes(mark: str = RUN_MARK) -> dict[int, str]:
    """Command lines, by id, of the living processes that have `mark` in their environment.

    By default of all that this test run started.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile, or another user's
            continue
        # Python's own helper for shared memory lives as long as this process.
        if mark.encode() in environment.split(b"\0") and "resource_tracker" not in command:
            found[int(entry.name)] = command.strip()
    return found


def end_started_processes(patience_s: float) -> dict[int, str]:
    """Wait for what this test run started, then kill it; returns what had to be killed."""
    deadline = time.monotonic() + patience_s
    while (left := started_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (alive := started_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive, f"processes survive SIGKILL: {alive}"
    return left


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they are in, with the time that folder allows."""
    timeouts_s = {"unit": 60, "integration": 120, "cluster": 300, "e2e": 900}
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue  # a doctest
        folder = item.path.relative_to(here).parts[0]
        if folder in timeouts_s and item.get_closest_marker("proof") is None:
            if folder != "unit":
                item.add_marker(folder)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(timeouts_s[folder]))


def pytest_unconfigure() -> None:
    """Remove the scratch folder."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
