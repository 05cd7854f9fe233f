"""The README's commands, run as they stand there, in order, with a home folder of their own.

Every ``sh`` block is run or stands in `ELSEWHERE` with the reason. What is replaced (`REPLACED`)
are ports and addresses that other programs of this machine may be using.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = "serve run serve_app:app"
ELSEWHERE = {
    "make demo": "tests/e2e/test_demo.py runs it",
    "make test": "it is what runs this test",
    "make install": "it makes the environment that this test runs in",
    "RAY_AUTH_MODE=token ray up cluster.yaml": "it needs an AWS account; "
    "tests/unit/test_cluster_yaml.py checks the file",
}
REPLACED = {
    "127.0.0.1:8000": "127.0.0.1:{http}",
    SERVER: SERVER + " serving.port={http}",
    "ray start --head": "ray start --head --port=0 --dashboard-port={dashboard} "
    "--dashboard-agent-listen-port={agent}",
    # `auto` may find another Ray, if there are several.
    "export RAY_ADDRESS=auto": "export RAY_ADDRESS=$(cat $RAY_TMPDIR/ray/ray_current_cluster) "
    "RAY_API_SERVER_ADDRESS=http://127.0.0.1:{dashboard}",
}
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Ran:
    """One block and what it printed."""

    block: str
    output: str


class Shell:
    """Runs blocks one after another; what one assigns or exports the next one sees.

    Everything that a block starts inherits `mark`, and is found by it at the end.
    """

    def __init__(self, folder: Path) -> None:
        # Apart from what changes while a job uploads the folder: logs, the store, Ray's files.
        self.repository = folder / "repository"
        self._folder = folder
        self.mark = f"LIFELONG_README_RUN={uuid.uuid4().hex}"
        self._state = folder / ".shell"
        self._ports = {name: free_port() for name in ("http", "dashboard", "agent")}
        self._server: subprocess.Popen[bytes] | None = None
        self.unused = set(REPLACED)
        name, _, value = self.mark.partition("=")
        self._environment = os.environ | {
            name: value,
            "HOME": str(folder / "home"),
            "RAY_TMPDIR": str(folder / "r"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "160",
        }

    def run(self, block: str) -> Ran:
        script = f"set -aeuo pipefail\n{self._here(block)}\nenv -0 > {self._state}\n"
        with (self._folder / "output.txt").open("w+", encoding="utf-8") as output:
            # A file, not a pipe: the Ray that a block leaves running would keep a pipe open.
            finished = subprocess.run(
                ["bash", "-c", script],
                cwd=self.repository,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=300,
                check=False,
            )
            output.seek(0)
            text = output.read()
        assert finished.returncode == 0, f"{block}\nended with {finished.returncode}:\n{text}"
        pairs = self._state.read_text(encoding="utf-8").split("\0")
        self._environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return Ran(block, text)

    def start_server(self) -> Ran:
        with (self._folder / "server.txt").open("w", encoding="utf-8") as output:
            server = self._server = subprocess.Popen(
                ["bash", "-c", f"exec {self._here(SERVER)}"],
                cwd=self.repository,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while not self._is_ready():
            said = (self._folder / "server.txt").read_text(encoding="utf-8")
            assert server.poll() is None, f"{SERVER} ended: {said[-3_000:]}"
            assert time.monotonic() < deadline, f"{SERVER} is not ready: {said[-3_000:]}"
            time.sleep(0.2)
        return Ran(SERVER, "ready")

    def end_everything(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5
            for pid in self._started():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._started() and time.monotonic() < deadline:
                time.sleep(0.1)
        if self._server is not None:
            self._server.wait(timeout=10)

    def _here(self, block: str) -> str:
        for original, ours in REPLACED.items():
            if original in block:
                self.unused.discard(original)
                block = block.replace(original, ours.format(**self._ports))
        return block

    def _is_ready(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self._ports['http']}/v2/health/ready"
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _started(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def readme_blocks() -> list[str]:
    return [b.strip() for b in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    # Not below pytest's folder: Ray's Unix sockets lie here, and their names may have 107 bytes.
    folder = Path(os.environ["HOME"]).parent / "readme"
    for name in ("home", "r"):
        (folder / name).mkdir(parents=True)
    # An answer that is an error ends the block; the README shows errors to people instead.
    (folder / "home" / ".curlrc").write_text("fail\nshow-error\n", encoding="utf-8")
    shell = Shell(folder)
    shell.repository.mkdir()
    for name in ("serve_app.py", "train_job.py", "tune_lambda.py", ".gitignore"):
        shutil.copy(ROOT / name, shell.repository / name)
    shutil.copytree(ROOT / "conf", shell.repository / "conf")
    try:
        yield shell
    finally:
        shell.end_everything()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ran(shell: Shell) -> list[Ran]:
    """Every block that is not tested elsewhere, in the README's order."""
    blocks = [b for b in readme_blocks() if b.splitlines()[0] not in ELSEWHERE]
    return [shell.start_server() if block == SERVER else shell.run(block) for block in blocks]


def output_of(ran: list[Ran], command: str) -> str:
    (output,) = [r.output for r in ran if command in r.block]
    return output


def test_blocks_that_are_tested_elsewhere_are_still_in_the_readme():
    firsts = {block.splitlines()[0] for block in readme_blocks()}

    assert firsts >= set(ELSEWHERE)


@pytest.mark.timeout(600)  # Its set-up runs them all.
def test_every_command_ends_well(ran: list[Ran], shell: Shell):
    assert SERVER in [r.block for r in ran]
    assert not shell.unused, "replacements that no longer fit the README"


def test_answers_name_class_and_version(ran: list[Ran]):
    answer = json.loads(output_of(ran, "003-3.png"))

    assert answer["class"] == "3"
    assert answer["model_version"] == "v1"


def test_a_correction_with_an_unknown_class_is_a_proposal(ran: list[Ran]):
    answer = json.loads(output_of(ran, "/feedback"))

    assert answer["status"] == "recorded"
    assert answer["new_class_proposal"] is True


def test_the_sweep_writes_a_configuration(ran: list[Ran], shell: Shell):
    assert "lambda_ewc" in output_of(ran, "tune_lambda.py")
    assert (shell.repository / "runs" / "best.yaml").exists()


def test_the_update_learns_the_new_digits_and_is_offered(ran: list[Ran], shell: Shell):
    report = json.loads((shell.repository / "runs" / "update.json").read_text(encoding="utf-8"))

    assert report["version"] == "v1.1"
    assert report["class_names"] == [str(digit) for digit in range(10)]
    assert report["released"] is True
    assert "v1.1" in output_of(ran, "lifelong versions")


def test_a_finished_run_prints_its_report_again(ran: list[Ran]):
    dry, resumed = output_of(ran, "--fraction 0.1"), output_of(ran, "--resume")

    assert "base v1" in dry
    assert "base v1" in resumed


def test_the_job_makes_the_next_version(ran: list[Ran]):
    output = output_of(ran, "ray job submit")

    assert "update v1.2" in output
    assert "succeeded" in output
