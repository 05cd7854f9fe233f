"""Models in a process of their own, beside the one that takes HTTP.

Python runs one thread of a process at a time. Where decoding and a model's many small operations
share a process with the event loop, the two wait for each other; here they run side by side, and
what crosses is one message per batch and one back. The process belongs to the replica that
started it: it ends when the other end of its connection does, however that came about.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any, BinaryIO, cast

from lifelong_ray.config import Config, ImageConfig, Precision, config_from
from lifelong_ray.feedback import CleanImage, PreparedImage, SentImage
from lifelong_ray.on_ray.models import Loaded, Models, VersionAnswer
from lifelong_ray.release import Registry
from lifelong_ray.storage import open_store
from lifelong_ray.types import ModelHostGoneError

logger = logging.getLogger(__name__)

_END_S = 5.0
_LENGTH_BYTES = 8
_READ_AHEAD = 16 * 2**20  # Bytes taken in from the process before they are asked for.
_Wire = tuple[bytes, str | None] | CleanImage | PreparedImage


class ModelProcess:
    """A `ModelHost` in a process of its own, which is started when the first version is loaded.

    One event loop asks while one thread loads. A process that died is started again by the
    next load; what it held has to be loaded again.
    """

    def __init__(self, config: Config, precision: Precision) -> None:
        self._config = config
        self._precision = precision
        self._lock = threading.Lock()  # guards which process it is
        self._lines: tuple[_AnswerLine, _Line] | None = None
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

    async def answer(
        self, version: str, images: list[SentImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer a batch, after those that were asked for before.

        Raises:
            ModelHostGoneError: If the process ended, now or before.
        """
        lines = self._lines
        if lines is None:
            raise ModelHostGoneError("the process of the models is being started again")
        sent = [self._wired(version, image) for image in images]
        try:
            found = await lines[0].ask("answer", version, sent)
        except _HungUpError as error:
            await asyncio.to_thread(self._ended, lines[0], error)
            raise _gone() from None
        answers: list[VersionAnswer | Exception] = []
        for image, (answer, clean) in zip(images, found, strict=True):
            if clean is not None:
                image.become(clean)
            answers.append(answer)
        return answers

    def _wired(self, version: str, image: SentImage) -> _Wire:
        """What the process has to know: bytes to decode, or what came of pixels that are here."""
        if not image.is_decoded:
            return image.clean() if image.is_clean else (image.data, image.content_type)
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
        answering, loading = _AnswerLine(ours[0]), _Line(ours[1])
        try:
            loading.ask(self._config.model_dump(mode="json"), self._precision)
        except _HungUpError:
            process = self._process
            answering.close()
            loading.close()
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
        except _HungUpError as error:
            self._ended(line, error)
            raise _gone() from None

    def _ended(self, line: _AnswerLine | _Line, error: Exception) -> None:
        """Let go of the process at the other end of `line`, unless that is done already."""
        with self._lock:
            if self._lines is not None and line in self._lines:
                code = self._process.poll() if self._process is not None else None
                logger.error("the process of the models ended (%r, exit code %s)", error, code)
                self._end()


def _gone() -> ModelHostGoneError:
    return ModelHostGoneError("the process of the models ended; it is started again")


class _HungUpError(Exception):
    """Nobody is at the other end of a line any more."""


class _AnswerLine:
    """Batches to the process and their answers, in the order in which they were asked.

    Belongs to the event loop that asks first. No thread takes part: it would have to wait for the
    interpreter as soon as an answer is there.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._asked: deque[asyncio.Future[Any]] = deque()

    async def ask(self, *question: Any) -> Any:
        """Return the answer, or raise what went wrong over there.

        Raises:
            _HungUpError: If the process is gone.
        """
        async with self._opening:
            writer = self._writer or await self._open()
        if self._listener is None or self._listener.done():
            raise _HungUpError("the line is closed")
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append(answered)
        writer.write(_message(question))  # Who asks bounds how much is under way.
        return await answered

    def close(self) -> None:
        """Hang up, from any thread; whoever waits is told."""
        with suppress(OSError):  # It may be closed already.
            self._end.shutdown(socket.SHUT_RDWR)
        if self._listener is None:
            self._end.close()

    async def _open(self) -> asyncio.StreamWriter:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=self._end, limit=_READ_AHEAD)
        except OSError as error:
            raise _HungUpError(repr(error)) from None
        self._writer = writer
        self._listener = asyncio.create_task(self._listen(reader, writer))
        return writer

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
                answer = pickle.loads(await reader.readexactly(size))
                asked = self._asked.popleft()
                if asked.done():  # Nobody waits any more.
                    continue
                if isinstance(answer, Exception):
                    asked.set_exception(answer)
                else:
                    asked.set_result(answer)
        except Exception as error:  # noqa: BLE001 - whatever it is, no answer can be told apart now
            for asked in self._asked:
                if not asked.done():
                    asked.set_exception(_HungUpError(repr(error)))
        finally:
            writer.close()


class _Line:
    """Questions to the process and its answers, one at a time; every method blocks."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._stream = _stream(end)
        self._lock = threading.Lock()

    def ask(self, *question: Any) -> Any:
        """Return the answer, or raise what went wrong over there.

        Raises:
            _HungUpError: If the process is gone.
        """
        try:
            with self._lock:
                _tell(self._stream, question)
                answer = _heard(self._stream)
        except (EOFError, OSError, ValueError) as error:  # ValueError: closed at this end.
            raise _HungUpError(repr(error)) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Hang up, also where somebody is waiting."""
        with suppress(OSError):  # There may be nobody any more.
            self._end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            with suppress(OSError):  # What could not be sent is still in there.
                self._stream.close()
            self._end.close()


def _message(value: object) -> bytes:
    pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return len(pickled).to_bytes(_LENGTH_BYTES, "big") + pickled


def _stream(end: socket.socket) -> BinaryIO:
    return cast("BinaryIO", end.makefile("rwb"))


def _tell(stream: BinaryIO, value: object) -> None:
    stream.write(_message(value))
    stream.flush()


def _heard(stream: BinaryIO) -> Any:
    length = stream.read(_LENGTH_BYTES)
    pickled = stream.read(int.from_bytes(length, "big"))
    if len(length) < _LENGTH_BYTES or not pickled:
        raise EOFError("the other end has hung up")
    return pickle.loads(pickled)


def main(descriptors: list[str]) -> None:
    """Answer questions on both lines, for answers and for loads, until the other end hangs up."""
    answering, loading = (_stream(socket.socket(fileno=int(number))) for number in descriptors)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Meant for the replica, which ends this one.
    logging.basicConfig(level=logging.WARNING)
    tree, precision = _heard(loading)
    config = config_from(tree)
    models = Models(Registry(open_store(config.store)), config.serving, precision)
    _reply(loading, None)
    threading.Thread(target=_talk, args=(loading, models, config.images), daemon=True).start()
    _talk(answering, models, config.images)


def _talk(line: BinaryIO, models: Models, limits: ImageConfig) -> None:
    while True:
        try:
            verb, *arguments = _heard(line)
        except (EOFError, OSError):
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
    images = [_received(one, limits) for one in sent]
    found: list[tuple[VersionAnswer | Exception, CleanImage | None]] = []
    for answer, image in zip(models.answer(version, images), images, strict=True):
        if isinstance(answer, Exception):
            found.append((_sendable(answer), None))
        else:
            found.append((answer, image.clean() if isinstance(image, SentImage) else None))
    return found


def _received(wired: _Wire, limits: ImageConfig) -> SentImage | PreparedImage:
    if isinstance(wired, PreparedImage):
        return wired
    return SentImage.of(wired) if isinstance(wired, CleanImage) else SentImage(*wired, limits)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - such as one whose parts are no arguments of its class
        return RuntimeError(repr(error))
    return error


def _reply(line: BinaryIO, answer: object) -> None:
    try:
        _tell(line, answer)
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:3])
