"""Who and what: signed request ids, pseudonyms, and the secrets behind them.

A request id proves, without a lookup, which version gave which answer, so that any replica
can check feedback and nobody can make one up. It is signed, not encrypted: version, variant,
class and time can be read from it. Knows nothing of HTTP.
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import os
import secrets
import struct
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from lifelong_ray.storage import LocalStore, Store
from lifelong_ray.types import (
    AlreadyExistsError,
    BadRequestIdError,
    ConfigError,
    NotFoundError,
    ServedRequest,
)

_SECRETS_KEY = "secrets.json"
_MIN_KEY_BYTES = 16
_MAX_ID_CHARS = 2_048
_MAC_BYTES = 16
_FETCHED_BYTES = 4_096
_AUDIT = 1
_CANDIDATE = 2
_ARM = 4  # of an experiment, which is called like its version
_CHOSEN = 8
_STICKY = 16


def uuid7(now_s: float, random: bytes | None = None) -> uuid.UUID:
    """Return a UUID that sorts by time.

    Args:
        now_s: Unix time; kept to the millisecond.
        random: Ten bytes; None draws them from the system.

    Source: RFC 9562, section 5.7.

    >>> str(uuid7(1_645_557_742.0, bytes(10)))
    '017f22e2-79b0-7000-8000-000000000000'
    """
    random = _RANDOM.draw(10) if random is None else random
    if len(random) != 10:
        raise ValueError(f"random has {len(random)} bytes, not 10")
    value = int(now_s * 1_000) << 80 | int.from_bytes(random, "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


class _RandomBytes:
    """The system's random bytes, fetched many at a time.

    Each time a thread asks the system, the others may run first, which takes longer than the rest
    of a request id.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream = io.BytesIO()
        os.register_at_fork(after_in_child=self._forget)  # else both would draw the same

    def draw(self, number: int) -> bytes:
        """Return so many bytes that nobody else gets."""
        with self._lock:
            drawn = self._stream.read(number)
            if len(drawn) < number:
                self._stream = io.BytesIO(os.urandom(_FETCHED_BYTES))
                drawn = self._stream.read(number)
            return drawn

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._stream = io.BytesIO()


_RANDOM = _RandomBytes()


class RequestIds:
    """Makes and checks request ids.

    An id is ``<UUIDv7>.<answer and signature>``, url-safe, and exactly one string stands for
    one answer: an id that says the same in another spelling is refused.

    Args:
        key: Signing key, the same in every replica.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < _MIN_KEY_BYTES:
            raise ValueError(f"the signing key has {len(key)} bytes; {_MIN_KEY_BYTES} are needed")
        self._hmac = hmac.new(_derive(key, b"request-id"), digestmod="sha256")

    def issue(
        self,
        now_s: float,
        version: str,
        variant: str,
        class_name: str,
        audit: bool,
        random: bytes | None = None,
        *,
        chosen: bool = False,
        sticky: bool = False,
    ) -> str:
        """Return the id of one answer.

        Args:
            now_s: Unix time of the answer.
            version: The version that answered.
            variant: ``stable``, ``candidate``, or the version itself, as an arm of an experiment.
            class_name: The answer.
            audit: Whether it belongs to the audit share.
            random: Ten bytes that make it unique; None draws them from the system.
            chosen: Whether a header named the arm.
            sticky: Whether a session did, with all its other requests.
        """
        if variant not in {"stable", "candidate", version}:
            raise ValueError(
                f"variant is {variant!r}; stable, candidate and the version are the variants"
            )
        flags = _AUDIT * audit | _CANDIDATE * (variant == "candidate") | _CHOSEN * chosen
        flags |= _STICKY * sticky | _ARM * (variant not in {"stable", "candidate"})
        version_bytes, class_bytes = version.encode(), class_name.encode()
        if len(version_bytes) > 255 or len(class_bytes) > 1_000:
            raise ValueError(
                f"version {version[:40]!r} or class {class_name[:40]!r} is too long for a "
                "request id; 255 and 1000 bytes are the limits"
            )
        body = struct.pack("BB", flags, len(version_bytes)) + version_bytes + class_bytes
        return self._sign(str(uuid7(now_s, random)), body)

    def verify(self, request_id: str) -> ServedRequest:
        """Return what the id proves.

        Raises:
            BadRequestIdError: If it was not issued with this key, or was altered.
        """
        unique, _, rest = request_id.partition(".")
        try:
            if len(request_id) > _MAX_ID_CHARS:
                raise ValueError
            body = base64.urlsafe_b64decode(rest + "=" * (-len(rest) % 4))[:-_MAC_BYTES]
            genuine = hmac.compare_digest(self._sign(unique, body).encode(), request_id.encode())
            if not genuine:
                raise ValueError
        except ValueError:
            raise BadRequestIdError(
                f"request id {request_id[:80]!r} was not issued here; "
                "send back request_id as /predict returned it"
            ) from None
        return _said(request_id, body, (uuid.UUID(unique).int >> 80) / 1_000)

    def _sign(self, unique: str, body: bytes) -> str:
        hmac_of_this = self._hmac.copy()  # hmac.digest would let other threads run for 1 us of work
        hmac_of_this.update(unique.encode() + b"." + body)
        signed = body + hmac_of_this.digest()[:_MAC_BYTES]
        return f"{unique}.{base64.urlsafe_b64encode(signed).decode().rstrip('=')}"


def read_request_id(request_id: str) -> ServedRequest:
    """Return what an id says, without proof: for ids that `RequestIds.verify` has seen before.

    Raises:
        BadRequestIdError: If it is no id at all.
    """
    unique, _, rest = request_id.partition(".")
    try:
        at_s = (uuid.UUID(unique).int >> 80) / 1_000
        body = base64.urlsafe_b64decode(rest + "=" * (-len(rest) % 4))[:-_MAC_BYTES]
        return _said(request_id, body, at_s)
    except (ValueError, IndexError):
        raise BadRequestIdError(f"{request_id[:80]!r} is no request id") from None


def _said(request_id: str, body: bytes, at_s: float) -> ServedRequest:
    flags, version_bytes = body[0], body[1]
    version = body[2 : 2 + version_bytes].decode()
    variant = version if flags & _ARM else "candidate" if flags & _CANDIDATE else "stable"
    return ServedRequest(
        request_id=request_id,
        version=version,
        variant=variant,
        class_name=body[2 + version_bytes :].decode(),
        audit=bool(flags & _AUDIT),
        at_s=at_s,
        chosen=bool(flags & _CHOSEN),
        sticky=bool(flags & _STICKY),
    )


def pseudonym(key: bytes, user: str) -> str:
    """Return a name for a user that only the holder of `key` can make; ``""`` for nobody.

    >>> pseudonym(b"k" * 16, "ada") == pseudonym(b"k" * 16, "ada")
    True
    >>> pseudonym(b"k" * 16, "")
    ''
    """
    if not user:
        return ""
    name = user.encode("utf-8", "surrogatepass")  # a stranger's text may hold anything
    return hmac.digest(_derive(key, b"pseudonym"), name, "sha256")[:16].hex()


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, b"lifelong/" + purpose, "sha256")


@dataclass(frozen=True)
class Secrets:
    """What only this system and its operators know.

    Attributes:
        signing_key: Signs request ids and makes pseudonyms.
        admin_token: Bearer token of the operators' endpoints.
    """

    signing_key: bytes = field(repr=False)
    admin_token: str = field(repr=False)


def load_secrets(store: Store, environ: Mapping[str, str]) -> Secrets:
    """Read the secrets from the environment, or on local disk make them once.

    Args:
        store: A `LocalStore` keeps missing ones in ``secrets.json``, readable by its owner.
        environ: May hold LIFELONG_SIGNING_KEY and LIFELONG_ADMIN_TOKEN, which win.

    Raises:
        ConfigError: If one is missing and the store is shared (S3), or is too short.
    """
    signing_key = environ.get("LIFELONG_SIGNING_KEY", "")
    admin_token = environ.get("LIFELONG_ADMIN_TOKEN", "")
    for variable, value in (
        ("LIFELONG_SIGNING_KEY", signing_key),
        ("LIFELONG_ADMIN_TOKEN", admin_token),
    ):
        if value and len(value.encode()) < _MIN_KEY_BYTES:
            raise ConfigError(f"{variable} is shorter than {_MIN_KEY_BYTES} bytes; set a long one")
        if not value and not isinstance(store, LocalStore):
            raise ConfigError(
                f"{variable} is not set, and a shared store ({store.url}) keeps no secrets; "
                "set it to a long random string, the same in every process"
            )
    if signing_key and admin_token:
        return Secrets(signing_key.encode(), admin_token)
    assert isinstance(store, LocalStore)
    kept = _kept_secrets(store)
    return Secrets(
        (signing_key or kept["signing_key"]).encode(), admin_token or kept["admin_token"]
    )


def _kept_secrets(store: LocalStore) -> dict[str, str]:
    try:
        found = store.read(_SECRETS_KEY)
    except NotFoundError:
        made = {"signing_key": secrets.token_hex(32), "admin_token": secrets.token_urlsafe(32)}
        try:
            store.put_new(_SECRETS_KEY, json.dumps(made).encode(), mode=0o600)
        except AlreadyExistsError:  # another process was first
            found = store.read(_SECRETS_KEY)
        else:
            return made
    try:
        kept = json.loads(found)
        return {name: str(kept[name]) for name in ("signing_key", "admin_token")}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{_SECRETS_KEY} in {store.url} is damaged; restore it, or delete it to make new "
            "secrets (request ids given out before are then refused)"
        ) from None
