"""Models in a process of their own, beside the one that takes HTTP.

Python runs one thread of a process at a time. Where decoding and a model's many small operations
share a process with the event loop, the two wait for each other; here they run side by side, and
what crosses is one message per batch and one back. The process belongs to the replica that
started it: it ends when the other end of its connection does, however that came about.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from lifelong_ray.config import Config, ImageConfig, Precision, config_from
from lifelong_ray.feedback import CleanImage, PreparedImage, SentImage
from lifelong_ray.on_ray.models import Loaded, Models, VersionAnswer
from lifelong_ray.release import Registry
from lifelong_ray.storage import open_store
from lifelong_ray.types import ModelHostGoneError

logger = logging.getLogger(__name__)

_END_S = 5.0
_Wire = tuple[bytes, str | None] | PreparedImage


class ModelProcess:
    """A `ModelHost` in a process of its own, which is started when the first version is loaded.

    One thread may answer while another loads. A process that died is started again by the next
    load; what it held has to be loaded again.
    """

    def __init__(self, config: Config, precision: Precision) -> None:
        self._config = config
        self._precision = precision
        self._lock = threading.Lock()  # guards which process it is
        self._lines: tuple[_Line, _Line] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: dict[str, Loaded] = {}

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return self._process.pid if self._process is not None else None

    def load(self, version: str) -> Loaded:
        """Load a version and warm it up.

        Raises:
            ModelHostGoneError: If the process ended meanwhile.
        """
        with self._lock:
            if self._lines is None:
                self._start()
            assert self._lines is not None
            line = self._lines[1]
        loaded: Loaded = self._ask(line, "load", version)
        self._loaded[version] = loaded
        return loaded

    def forget(self, version: str) -> None:
        """Let go of a version."""
        lines = self._lines
        if lines is not None:
            self._ask(lines[1], "forget", version)

    def answer(self, version: str, images: list[SentImage]) -> list[VersionAnswer | Exception]:
        """Answer a batch.

        Raises:
            ModelHostGoneError: If the process ended, now or before.
        """
        lines = self._lines
        if lines is None:
            raise ModelHostGoneError("the process of the models is being started again")
        sent = [self._wired(version, image) for image in images]
        found = self._ask(lines[0], "answer", version, sent)
        answers: list[VersionAnswer | Exception] = []
        for image, (answer, clean) in zip(images, found, strict=True):
            if clean is not None:
                image.become(clean)
            answers.append(answer)
        return answers

    def _wired(self, version: str, image: SentImage) -> _Wire:
        """What the process has to know: bytes to decode, or what came of pixels that are here."""
        if image.data and not image.is_clean:
            return image.data, image.content_type
        model = self._loaded[version]
        return PreparedImage(
            image.content_hash, image.model_input(model.image_size, model.channels)
        )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        descriptors = [end.fileno() for end in theirs]
        # What Ray has added to this process's path, the other one needs as well.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", __name__, *map(str, descriptors)]
        self._process = subprocess.Popen(command, pass_fds=descriptors, env=environ)
        for end in theirs:
            end.close()
        answering, loading = (_Line(Connection(end.detach())) for end in ours)
        try:
            loading.ask(self._config.model_dump(mode="json"), self._precision)
        except (EOFError, OSError):
            process = self._process
            self._end()
            raise ModelHostGoneError(
                f"the process of the models ended as it started, with exit code "
                f"{process.returncode}; its output has the reason"
            ) from None
        self._lines = answering, loading

    def _end(self) -> None:
        process, lines = self._process, self._lines
        self._process = self._lines = None
        for line in lines or ():
            line.close()
        if process is not None:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, line: _Line, *question: Any) -> Any:
        try:
            return line.ask(*question)
        except (EOFError, OSError) as error:
            with self._lock:
                if self._lines is not None and line in self._lines:
                    code = self._process.poll() if self._process is not None else None
                    logger.error("the process of the models ended (%r, exit code %s)", error, code)
                    self._end()
            raise ModelHostGoneError(
                "the process of the models ended; it is started again"
            ) from None


class _Line:
    """Questions to the process and its answers, one at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def ask(self, *question: Any) -> Any:
        """Return the answer, or raise what went wrong over there."""
        with self._lock:
            self._connection.send_bytes(pickle.dumps(question, pickle.HIGHEST_PROTOCOL))
            answer = pickle.loads(self._connection.recv_bytes())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Hang up, also where somebody is waiting."""
        with (
            suppress(OSError),  # There may be nobody any more.
            socket.socket(fileno=os.dup(self._connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._connection.close()


def _serve(answering: Connection, loading: Connection) -> None:
    """Answer questions on both lines until the other end hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Meant for the replica, which ends this one.
    logging.basicConfig(level=logging.WARNING)
    tree, precision = pickle.loads(loading.recv_bytes())
    config = config_from(tree)
    models = Models(Registry(open_store(config.store)), config.serving, precision)
    _reply(loading, None)
    threading.Thread(target=_talk, args=(loading, models, config.images), daemon=True).start()
    _talk(answering, models, config.images)


def _talk(line: Connection, models: Models, limits: ImageConfig) -> None:
    while True:
        try:
            verb, *arguments = pickle.loads(line.recv_bytes())
        except EOFError:
            os._exit(0)  # The replica is gone, and nobody waits for the other line either.
        try:
            answer = (
                _answered(models, limits, *arguments)
                if verb == "answer"
                else getattr(models, verb)(*arguments)
            )
        except Exception as error:  # noqa: BLE001 - is raised at the other end
            answer = _sendable(error)
        _reply(line, answer)


def _answered(
    models: Models, limits: ImageConfig, version: str, sent: list[_Wire]
) -> list[tuple[VersionAnswer | Exception, CleanImage | None]]:
    images = [one if isinstance(one, PreparedImage) else SentImage(*one, limits) for one in sent]
    found: list[tuple[VersionAnswer | Exception, CleanImage | None]] = []
    for answer, image in zip(models.answer(version, images), images, strict=True):
        if isinstance(answer, Exception):
            found.append((_sendable(answer), None))
        else:
            found.append((answer, image.clean() if isinstance(image, SentImage) else None))
    return found


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - such as one whose parts are no arguments of its class
        return RuntimeError(repr(error))
    return error


def _reply(line: Connection, answer: object) -> None:
    try:
        line.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    _serve(*(Connection(int(descriptor)) for descriptor in sys.argv[1:3]))
