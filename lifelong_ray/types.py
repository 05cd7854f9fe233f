"""The records that travel between the parts, and the tree of errors.

Knows nothing of files, models, HTTP or Ray; everything else may import it.

Error tree::

    LifelongError
    ├── ConfigError              a setting is unknown, malformed or contradicts another
    ├── StorageError             the store cannot do what was asked
    │   ├── NotFoundError        no object under that key
    │   ├── AlreadyExistsError   a create-only write found an object
    │   ├── ConflictError        a compare-and-swap lost against another writer
    │   └── StorageFullError     no space left
    ├── DataError                a data source is missing, empty or malformed
    ├── BadImageError            bytes that are not an acceptable image (carries code, HTTP status)
    ├── BadRequestIdError        a request id that this system did not issue
    ├── VersionError             a model version is missing
    │   └── VersionDamagedError  ... or does not match its checksums
    ├── LearningError            training cannot give a usable model from this input
    ├── GateRefusedError         a version without a passed gate was offered for release
    ├── RolloutError             the release document does not allow what was asked
    ├── OverloadedError          a bounded queue is full; try again later
    └── ServingError             the application cannot be started or reached
        └── ModelHostGoneError   ... or its models died and are being loaded again
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""Clean pixels, shape (height, width, channels) with 1 or 3 channels."""

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
Json = dict[str, JsonValue]


class LifelongError(Exception):
    """Root of every error that a caller of this package may want to handle."""


class ConfigError(LifelongError):
    """A setting is unknown, malformed or contradicts another."""


class StorageError(LifelongError):
    """The store cannot do what was asked."""


class NotFoundError(StorageError):
    """No object is stored under the key."""


class AlreadyExistsError(StorageError):
    """A create-only write found an object under its key."""


class ConflictError(StorageError):
    """A compare-and-swap found another state than the caller had read."""


class StorageFullError(StorageError):
    """The disk or bucket takes no more bytes; nothing was written."""


class DataError(LifelongError):
    """A data source is missing, empty or malformed."""


class BadImageError(LifelongError):
    """Bytes that are not an acceptable image.

    Attributes:
        code: Stable machine-readable reason, such as ``not_an_image``.
        status: The HTTP status that fits.
    """

    def __init__(self, code: str, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception would be made anew from its message alone.
        return partial(BadImageError, status=self.status), (self.code, str(self))


class BadRequestIdError(LifelongError):
    """A request id that this system did not issue, or that was altered."""


class VersionError(LifelongError):
    """A model version does not exist."""


class VersionDamagedError(VersionError):
    """A file of a version is missing or does not match its SHA-256."""


class LearningError(LifelongError):
    """Training cannot give a usable model from what it was given."""


class GateRefusedError(LifelongError):
    """A version without a passed gate was offered for release."""


class RolloutError(LifelongError):
    """The release document does not allow what was asked."""


class OverloadedError(LifelongError):
    """A bounded queue is full; the caller may try again later."""


class ServingError(LifelongError):
    """The application cannot be started or reached."""


class ModelHostGoneError(ServingError):
    """What held the models ended; they are being loaded again."""


@dataclass(frozen=True)
class ServedRequest:
    """What a request id proves about one answered request.

    Attributes:
        request_id: The signed id itself.
        version: The model version that answered.
        variant: The arm of the rollout or experiment the request was assigned to.
        class_name: The answer.
        audit: Whether the answer belongs to the random audit share.
        at_s: Unix time of the answer, to the millisecond.
        chosen: Whether a header named the arm, so that the answer tells nothing about shares.
        sticky: Whether it shares its arm with other images of a request or with all requests of a
            session, so that many answers are one draw.
    """

    request_id: str
    version: str
    variant: str
    class_name: str
    audit: bool
    at_s: float
    chosen: bool = False
    sticky: bool = False


@dataclass(frozen=True)
class Prediction:
    """One answered request, as the log keeps it.

    Attributes:
        request_id: Signed id, unique.
        at_s: Unix time of the answer.
        content_hash: SHA-256 (hex) of the decoded pixels; names the stored image.
        class_name: The answer.
        scores: Probability of every class, in the order of `class_names`.
        class_names: The classes of the answering version.
        version: The answering version.
        variant: ``stable``, ``candidate``, or the version of an experiment's arm.
        user: Keyed pseudonym of the user, or ``""``.
        sampling_probability: Probability with which this request's image was kept.
        audit: Whether the answer belongs to the random audit share.
        model_ms: Time inside the model, without the hop or the decoding.
    """

    request_id: str
    at_s: float
    content_hash: str
    class_name: str
    scores: tuple[float, ...]
    class_names: tuple[str, ...]
    version: str
    variant: str
    user: str
    sampling_probability: float
    audit: bool
    model_ms: float


FeedbackKind = Literal["feedback", "example", "import"]


@dataclass(frozen=True)
class Feedback:
    """A label for an image: a user's vote, or an operator's or an import's word.

    Attributes:
        feedback_id: Unique id of this row.
        at_s: Unix time of arrival.
        kind: ``feedback`` is a user's vote on an answered request; ``example`` (an
            operator's) and ``import`` are trusted labels of an image sent in.
        label: The class name given.
        request_id: The answered request, for ``feedback``; else ``""``.
        content_hash: The image, for ``example`` and ``import``; else ``""``.
        user: Keyed pseudonym of who gave it, or ``""``.
        audit: Whether the answer was flagged for the audit share.
    """

    feedback_id: str
    at_s: float
    kind: FeedbackKind
    label: str
    request_id: str
    content_hash: str
    user: str
    audit: bool


@dataclass(frozen=True)
class Comparison:
    """Both versions' answers to one request during a rollout.

    Attributes:
        request_id: The request.
        at_s: Unix time.
        rollout_id: The rollout it belongs to.
        stable_version: Version that users see; its class and confidence follow.
        candidate_version: Version on trial; its class (``""`` if it failed) follows.
        stable_ms: Time inside the stable model, milliseconds.
        candidate_ms: Time inside the candidate model, milliseconds.
        audit: Whether a label is asked for: only such pairs are evidence.
    """

    request_id: str
    at_s: float
    rollout_id: str
    stable_version: str
    stable_class: str
    stable_confidence: float
    candidate_version: str
    candidate_class: str
    candidate_confidence: float
    stable_ms: float
    candidate_ms: float
    audit: bool


@dataclass(frozen=True)
class Example:
    """A cleaned, labelled image that training or the hold-out may use.

    Attributes:
        content_hash: SHA-256 (hex) of the pixels.
        label: Class name.
        pixels: Shape (height, width, channels), uint8.
        kind: Where the label came from.
        audit: Whether the label belongs to the unbiased audit share.
    """

    content_hash: str
    label: str
    pixels: Pixels
    kind: FeedbackKind
    audit: bool
