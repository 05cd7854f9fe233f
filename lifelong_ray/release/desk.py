"""Where the release document lies: reading it, asking for changes, writing its audit.

Knows keys and compare-and-swap; takes no decision. A change and its audit events are
written in one swap (the events lie in the document's outbox) and copied to
``audit/`` and ``rollouts/`` afterwards, by whoever comes next if the writer dies between.
So no change is without its record, and no record without its change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from lifelong_ray.config import StepConfig
from lifelong_ray.release.document import Event, Intent, Lease, ReleaseDocument, Rollout
from lifelong_ray.release.experiment import Experiment
from lifelong_ray.release.registry import Registry
from lifelong_ray.release.transitions import applied, objection
from lifelong_ray.storage import Store
from lifelong_ray.types import (
    AlreadyExistsError,
    ConflictError,
    GateRefusedError,
    NotFoundError,
    RolloutError,
)

DOCUMENT_KEY = "current.json"

_NUM_ATTEMPTS = 100
_LONGEST_WAIT_S = 0.2
_MAX_WAITING_INTENTS = 50
_STATES = {"rollout", "experiment"}  # of an event; they have records of their own
_ANY_STEPS = (StepConfig(setWeight=1),)


class ReleaseDesk:
    """The one place that reads and writes the release document of a store.

    Args of the constructor: the store, the clock (Unix seconds), and how to wait between
    attempts when several writers meet.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._registry = Registry(store)
        self._audited_through = 0

    def read(self) -> tuple[ReleaseDocument, str | None]:
        """Return the document and its tag; an empty document and None before the first.

        Raises:
            RolloutError: If what is stored is not a release document of this version.
        """
        try:
            data, tag = self._store.read_tagged(DOCUMENT_KEY)
        except NotFoundError:
            return ReleaseDocument(), None
        try:
            return ReleaseDocument.model_validate_json(data), tag
        except ValidationError as error:
            raise RolloutError(
                f"{DOCUMENT_KEY} in {self._store.url} is not a release document that this version "
                f"understands: {_first_problem(error)}; "
                "run the version that wrote it, or restore it"
            ) from error

    def swap(self, document: ReleaseDocument, tag: str | None) -> str:
        """Store the next document, then the audit of its changes.

        Args:
            document: Made from the one that was read under `tag`.
            tag: From `read`; None means that there must be no document yet.

        Returns:
            The tag of what was stored.

        Raises:
            ConflictError: If somebody else wrote first; read again and decide anew.
            RolloutError: If the document could not be read back; nothing is stored then.
        """
        kept = tuple(e for e in document.outbox if e.number > self._audited_through)
        document = document.changed(outbox=kept, revision=document.revision + 1)
        data = _readable(document)
        try:
            tag = self._store.swap(DOCUMENT_KEY, data, tag)
        except ConflictError:
            # A client that repeats a write whose success it did not hear of loses to itself.
            found, tag = self._find(data)
            if not found:
                raise
        self._settle(document)
        assert tag is not None
        return tag

    def create_if_missing(self, version: str, actor: str) -> ReleaseDocument:
        """Make the first gated version stable; a store with a stable version stays as it is.

        Raises:
            VersionError: If the version does not exist.
            GateRefusedError: If it has not passed the gate.
        """
        for attempt in range(_NUM_ATTEMPTS):
            document, tag = self.read()
            if document.stable is not None:
                return document
            self._require_gate(version)
            created = document.changed(stable=version).numbered_after(document)
            created = created.with_event(
                "created",
                who=actor,
                why=f"first version that passed the gate: {version}",
                at_s=self._clock(),
                from_version=None,
                to_version=version,
            )
            if self._try_swap(created, tag, attempt):
                return created
        raise _too_busy("create the release document")

    def request(self, intent: Intent) -> ReleaseDocument:
        """Leave a wish for the controller; asking twice with one id is asking once.

        Returns:
            The document that holds the wish, or has handled it already.

        Raises:
            VersionError: If the candidate, or an arm, does not exist.
            GateRefusedError: If it has not passed the gate and is not forced.
            RolloutError: If the document, after the wishes before this one, does not allow it.
        """
        for attempt in range(_NUM_ATTEMPTS):
            document, tag = self.read()
            if document.knows(intent.id):
                return document
            arms = intent.experiment.arms if intent.experiment is not None else ()
            if intent.candidate is not None:
                self._registry.manifest(intent.candidate)
                if not intent.force:
                    self._require_gate(intent.candidate)
            for version in (arm.version for arm in arms if arm.version != document.stable):
                self._require_gate(version)
            self._require_allowed(document, intent)
            asked = document.changed(intents=(*document.intents, intent))
            if self._try_swap(asked, tag, attempt):
                return asked
        raise _too_busy(f"leave the intent {intent.id}")

    def with_lease(
        self, document: ReleaseDocument, holder: str, lease_s: float
    ) -> ReleaseDocument | None:
        """Return the document with the lease taken or kept; None when another holds it.

        A lease with more than half its time left is not renewed, so that an idle controller
        seldom writes. What is returned takes effect with the next `swap`.
        """
        now_s = self._clock()
        lease = document.lease
        if lease is not None and lease.holder == holder:
            if lease.expires_at_s - now_s > lease_s / 2:
                return document
        elif lease is not None and lease.expires_at_s > now_s:
            return None
        return document.changed(lease=Lease(holder=holder, expires_at_s=now_s + lease_s))

    def write_audit(self, record: Event | Mapping[str, Any]) -> None:
        """Write one audit record; one that is there already stays as it is.

        `swap` does this for every event of the document.
        """
        event = Event.model_validate(record)
        data = event.model_dump_json(indent=1, exclude=_STATES).encode()
        with suppress(AlreadyExistsError):
            self._store.put_new(f"audit/{event.number:09d}.json", data)

    def record_rollout(
        self, rollout: Rollout, history: Sequence[Event | Mapping[str, Any]]
    ) -> None:
        """Write the state of a rollout and add to its history; events already there stay.

        `swap` does this for every event that a rollout took part in.
        """
        self._record(f"rollouts/{rollout.id}.json", "rollout", rollout, history)

    def record_experiment(
        self, experiment: Experiment, history: Sequence[Event | Mapping[str, Any]]
    ) -> None:
        """Write the state of an experiment, as `record_rollout` does that of a rollout."""
        self._record(f"experiments/{experiment.id}.json", "experiment", experiment, history)

    def _record(
        self,
        key: str,
        name: str,
        state: Rollout | Experiment,
        history: Sequence[Event | Mapping[str, Any]],
    ) -> None:
        rows = {e.number: e for e in (Event.model_validate(item) for item in history)}
        for attempt in range(_NUM_ATTEMPTS):
            known: dict[int, dict[str, Any]] = {}
            tag = None
            try:
                data, tag = self._store.read_tagged(key)
                known = {row["number"]: row for row in json.loads(data)["history"]}
            except NotFoundError:
                pass
            new = {n: e.model_dump(mode="json", exclude=_STATES) for n, e in rows.items()}
            if tag is not None and new.keys() <= known.keys():
                return
            merged = known | new
            record = {
                name: state.model_dump(mode="json"),
                "history": [merged[number] for number in sorted(merged)],
            }
            try:
                self._store.swap(key, json.dumps(record, indent=1).encode(), tag)
                return
            except ConflictError:
                self._wait(attempt)
        raise _too_busy(f"write {key}")

    def rollout(self, rollout_id: str) -> Rollout:
        """Return a rollout, under way or ended, as its record has it.

        Raises:
            NotFoundError: If there was never one of that id.
        """
        try:
            data = self._store.read(f"rollouts/{rollout_id}.json")
        except (NotFoundError, ValueError):  # an id that is no key names nothing either
            raise NotFoundError(f"there was never a rollout {rollout_id}") from None
        return Rollout.model_validate(json.loads(data)["rollout"])

    def experiment(self, experiment_id: str) -> Experiment:
        """Return an experiment, under way or ended, as its record has it.

        Raises:
            NotFoundError: If there was never one of that id.
        """
        try:
            data = self._store.read(f"experiments/{experiment_id}.json")
        except (NotFoundError, ValueError):  # as in `rollout`
            raise NotFoundError(f"there was never an experiment {experiment_id}") from None
        return Experiment.model_validate(json.loads(data)["experiment"])

    def audit_trail(self, last: int | None = None) -> list[Event]:
        """Return the audit in order, or its `last` records."""
        keys = self._store.list("audit/")
        keys = keys if last is None else keys[max(0, len(keys) - last) :]
        return [Event.model_validate_json(self._store.read(key)) for key in keys]

    def _require_gate(self, version: str) -> None:
        gate = self._registry.manifest(version).gate
        if gate is None or not gate.passed:
            why = gate.reason if gate is not None else "it was never judged"
            raise GateRefusedError(
                f"{version} has not passed the gate: {why}; train a better version, "
                "or force the rollout if you know why"
            )

    def _require_allowed(self, document: ReleaseDocument, intent: Intent) -> None:
        if document.stable is None and document.rollout is None and intent.candidate is None:
            raise RolloutError(
                f"nothing is released yet, so there is nothing to {intent.verb}; "
                "train and release a base version first"
            )
        if len(document.intents) >= _MAX_WAITING_INTENTS:
            raise RolloutError(
                f"{len(document.intents)} intents wait already; is the controller running?"
            )
        expected = document
        for waiting in document.intents:
            # Which steps they are does not matter for what is allowed next.
            expected = applied(expected, waiting, at_s=waiting.at_s, default_steps=_ANY_STEPS)
        refusal = objection(expected, intent)
        if refusal is not None:
            raise RolloutError(refusal)

    def _settle(self, document: ReleaseDocument) -> None:
        """Copy a stored document's outbox to where history lies; may be repeated."""
        for event in document.outbox:
            self.write_audit(event)
            if event.rollout is not None:
                self.record_rollout(event.rollout, [event])
            if event.experiment is not None:
                self.record_experiment(event.experiment, [event])
            self._audited_through = max(self._audited_through, event.number)

    def _try_swap(self, document: ReleaseDocument, tag: str | None, attempt: int) -> bool:
        try:
            self.swap(document, tag)
        except ConflictError:
            self._wait(attempt)
            return False
        return True

    def _find(self, data: bytes) -> tuple[bool, str | None]:
        try:
            stored, tag = self._store.read_tagged(DOCUMENT_KEY)
        except NotFoundError:
            return False, None
        return stored == data, tag

    def _wait(self, attempt: int) -> None:
        self._sleep(min(_LONGEST_WAIT_S, 0.005 * (attempt + 1)))


def _readable(document: ReleaseDocument) -> bytes:
    """Serialise a document that `ReleaseDesk.read` will understand.

    Checked here because `changed` takes any value, and one unreadable document stops everything.
    """
    try:
        data = document.model_dump_json(indent=1).encode()
        ReleaseDocument.model_validate_json(data)
    except (ValidationError, PydanticSerializationError) as error:
        problem = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise RolloutError(
            f"the next {DOCUMENT_KEY} could not be read back, so it is not stored: {problem}"
        ) from error
    return data


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{first['msg']} at {first['loc']}"


def _too_busy(what: str) -> RolloutError:
    return RolloutError(
        f"could not {what} in {_NUM_ATTEMPTS} attempts because others kept writing; try again"
    )
