"""What a front replica does with one image, apart from HTTP.

Assigns the request, answers it with exactly one version, names that version,
logs it, and afterwards has the other version answer too where the rollout wants
a comparison. Follows the release document. Does not know HTTP; reaches the slot
and the controller through two small protocols, so that it runs without Ray.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from lifelong_ray.config import Config
from lifelong_ray.feedback import (
    CleanImage,
    LogWriter,
    RequestIds,
    Secrets,
    SentImage,
    pseudonym,
    uuid7,
)
from lifelong_ray.on_ray.models import ModelHost, VersionAnswer
from lifelong_ray.on_ray.slots import CandidateSlot, Copies, SlotInTime
from lifelong_ray.on_ray.warm import WarmVersion, WarmVersions
from lifelong_ray.release import (
    Assignment,
    Counter,
    FrontReport,
    Registry,
    ReleaseDesk,
    ReleaseDocument,
    Split,
    assign,
    needed_versions,
)
from lifelong_ray.storage import Store
from lifelong_ray.types import (
    BadImageError,
    Comparison,
    Feedback,
    ModelHostGoneError,
    OverloadedError,
    Prediction,
    ServingError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SAY_NOTHING = (OverloadedError, ModelHostGoneError)  # about the version that was asked
_AFTER_LOSS_S = 0.25
MAX_LABEL_CHARS = 200
MAX_REASON_CHARS = 500


class NoVersionError(ServingError):
    """Nothing is registered yet that could answer."""


@dataclass(frozen=True)
class Served:
    """One answered request."""

    request_id: str
    answer: VersionAnswer
    variant: str
    audit: bool


class ReportSink(Protocol):
    """Takes the heartbeats of a front."""

    def report(self, report: FrontReport) -> None:
        """Take one report; must not block."""


class Front:
    """One front replica's state: the document it follows, warm versions, the log.

    Args:
        config: The whole tree.
        store: Registry, document and log.
        secrets: For request ids and pseudonyms.
        host: Holds the models.
        slot: Answers for a candidate.
        controller: Is told what this front does.
        now_s: Unix time.
        rng: Draws the audit share.
        on_look: Called whenever the front looks at the document.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        secrets: Secrets,
        host: ModelHost,
        slot: CandidateSlot,
        controller: ReportSink,
        *,
        now_s: Callable[[], float],
        rng: random.Random,
        on_look: Callable[[], None] | None = None,
    ) -> None:
        self._config = config
        self._on_look = on_look
        self._slot = SlotInTime(slot, config.serving.slot_timeout_s)
        self._controller = controller
        self._now_s = now_s
        self._rng = rng
        self._secrets = secrets
        self.front_id = str(uuid7(now_s()))
        self._ids = RequestIds(secrets.signing_key)
        self.registry = Registry(store)
        self.desk = ReleaseDesk(store, now_s)
        self.log = LogWriter(store, config.feedback, f"front-{self.front_id[-12:]}", now_s)
        self._warm = WarmVersions(host, config.serving, now_s=now_s)
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="front")
        self._counters: dict[str, Counter] = {}
        self._assigned: dict[Split, tuple[int, ...]] = {}
        self._by_arm: dict[str, tuple[int, ...]] = {}
        self._comparing: set[asyncio.Task[None]] = set()
        self._comparing_bytes = 0
        self._copies = Copies(self._slot, most=config.serving.max_batch)
        self.dropped_comparisons = 0
        self.document = ReleaseDocument()
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what the document names, warm it up, and begin to follow the document."""
        self.log.start()
        await self._follow_once()
        await self._warm.settled()
        await self._follow_once()
        self._follower = asyncio.create_task(self._follow())

    def close(self) -> None:
        """Write out the log; the replica is going away."""
        if self._follower is not None:
            self._follower.cancel()
        self._warm.close()
        self.log.close()

    @property
    def stable(self) -> WarmVersion | None:
        """The version users see; None as long as none can answer."""
        stable = self.document.stable
        return self._warm.get(stable) if stable in self._warm.names else None

    def sent(self, data: bytes, content_type: str | None) -> SentImage:
        """Take the bytes of an image, unchecked."""
        return SentImage(data, content_type, self._config.images)

    async def answer(
        self, image: SentImage, *, key: str, override: str | None = None, user: str = ""
    ) -> Served:
        """Answer one image with the version its `key` is assigned to.

        Args:
            image: What to classify.
            key: Whom the version sticks to; drawn at random where there is no `user`.
            override: As `assign` takes it.
            user: Who asks; empty means nobody in particular.

        Raises:
            BadImageError: If it is not an acceptable image.
            NoVersionError: If nothing can answer yet.
            OverloadedError: If too many images are waiting.
        """
        [served] = await self.answer_together([image], key=key, override=override, user=user)
        return served

    async def answer_together(
        self, images: Sequence[SentImage], *, key: str, override: str | None = None, user: str = ""
    ) -> list[Served]:
        """Answer several images, all with one version; see `answer`."""
        document = self.document  # one document for the whole request, whatever comes meanwhile
        if document.stable is None:
            raise NoVersionError(
                "; ".join(self._warm.failures.values())
                or "no version is released yet; run train_job.py --base to make the first"
            )
        assignment = assign(document, key, override)
        self._count_assigned(document, assignment, len(images), by_chance=not user)
        variant, answers = await self._ask_assigned(document, assignment, images)
        sticky = bool(user) or len(images) > 1
        return [
            self._log(document, assignment, variant, answer, image.clean(), user, sticky=sticky)
            for answer, image in zip(answers, images, strict=True)
        ]

    def _count_assigned(
        self, document: ReleaseDocument, assignment: Assignment, num_images: int, *, by_chance: bool
    ) -> None:
        """Count images, and one toss of chance, for an arm, whoever answers in the end."""
        trial = document.trial
        if trial is None or assignment.chosen:
            return
        arm, nothing = trial.variants.index(assignment.variant), (0,) * len(trial.variants)
        self._by_arm[trial.id] = _added(self._by_arm.get(trial.id, nothing), arm, num_images)
        split = trial.split
        if by_chance and split is not None:
            self._assigned[split] = _added(self._assigned.get(split, nothing), arm, 1)

    def _log(
        self,
        document: ReleaseDocument,
        assignment: Assignment,
        variant: str,
        answer: VersionAnswer,
        image: CleanImage,
        user: str,
        *,
        sticky: bool,
    ) -> Served:
        audit = self._rng.random() < self._config.feedback.audit_share
        now_s = self._now_s()
        request_id = self._ids.issue(
            now_s,
            answer.version,
            variant,
            answer.class_name,
            audit,
            chosen=assignment.chosen,
            sticky=sticky,
        )
        self.log.log_prediction(
            Prediction(
                request_id=request_id,
                at_s=now_s,
                content_hash=image.content_hash,
                class_name=answer.class_name,
                scores=answer.probabilities,
                class_names=answer.class_names,
                version=answer.version,
                variant=variant,
                user=pseudonym(self._secrets.signing_key, user) if user else "",
                sampling_probability=1.0,
                audit=audit,
                model_ms=answer.model_ms,
            ),
            image,
        )
        served = Served(request_id, answer, variant, audit)
        rollout = document.rollout
        # Before its first share the candidate may still be loading: no answer of it is no evidence.
        has_capacity = rollout is not None and (rollout.weight > 0 or rollout.shadow > 0)
        if has_capacity and (audit or assignment.shadow):
            self._compare_later(document, served, image)
        return served

    async def record_feedback(self, request_id: str, label: str, user: str) -> None:
        """Record a label for an answered request; durable when it returns.

        Raises:
            BadRequestIdError: If the id was not issued here.
            StorageFullError: If it could not be made durable.
        """
        request = self._ids.verify(request_id)
        row = Feedback(
            feedback_id=str(uuid7(self._now_s())),
            at_s=self._now_s(),
            kind="feedback",
            label=label,
            request_id=request_id,
            content_hash="",
            user=pseudonym(self._secrets.signing_key, user) if user else "",
            audit=request.audit,
        )
        await self._in_thread(self.log.record_feedback, [row], ())

    async def record_example(self, sent: SentImage, label: str, user: str) -> str:
        """Record an operator's labelled image; durable when it returns its content hash.

        Raises:
            BadImageError: If it is not an acceptable image.
            StorageFullError: If it could not be made durable.
        """
        image = await self._in_thread(sent.clean)
        row = Feedback(
            feedback_id=str(uuid7(self._now_s())),
            at_s=self._now_s(),
            kind="example",
            label=label,
            request_id="",
            content_hash=image.content_hash,
            user=pseudonym(self._secrets.signing_key, user) if user else "",
            audit=False,
        )
        await self._in_thread(self.log.record_feedback, [row], [image])
        return image.content_hash

    def status(self) -> dict[str, Any]:
        """What this front holds, follows and has seen, for operators."""
        stats = self.log.stats
        return {
            "front_id": self.front_id,
            "doc_seq": self.document.seq,
            "warm_versions": list(self._warm.names),
            "precisions": self._warm.precisions,
            "failed_versions": dict(self._warm.failures),
            "dropped_comparisons": self.dropped_comparisons + stats.dropped_comparisons,
            "dropped_predictions": stats.dropped_predictions,
            "queued_log_bytes": stats.queued_bytes,
        }

    async def in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Run blocking work off the event loop."""
        return await self._in_thread(function, *args)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *args)
        )

    # -- asking versions ---------------------------------------------------------------

    async def _ask_assigned(
        self, document: ReleaseDocument, assignment: Assignment, images: Sequence[SentImage]
    ) -> tuple[str, list[VersionAnswer]]:
        if assignment.variant != "stable":
            candidate = assignment.version
            try:
                return assignment.variant, await each(
                    [self._ask_candidate(document, candidate, image) for image in images]
                )
            except BadImageError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, stable answers instead
                logger.warning("version %s did not answer: %r", candidate, error)
        stable = str(document.stable)
        try:
            return "stable", await each([self._ask_held(stable, image) for image in images])
        except ModelHostGoneError:
            # A front that fails at once looks idle, so that a balancer which counts connections
            # would send it nearly everything.
            await asyncio.sleep(_AFTER_LOSS_S)
            return "stable", await each([self._ask_held(stable, image) for image in images])

    async def _ask_held(self, version: str, image: SentImage) -> VersionAnswer:
        return await self._counted(version, self._warm.get(version).answer(image))

    async def _ask_candidate(
        self, document: ReleaseDocument, version: str, image: SentImage
    ) -> VersionAnswer:
        if document.experiment is not None:
            return await self._ask_held(version, image)  # no slot holds an arm
        if self._answers_in_process(document, version):
            return await self._ask_held(version, image)
        clean = image.clean() if image.is_clean else await self._in_thread(image.clean)
        return await self._counted(version, self._slot.ask(version, clean))

    def _answers_in_process(self, document: ReleaseDocument, version: str) -> bool:
        rollout = document.rollout
        is_large = rollout is not None and rollout.weight > self._config.rollout.slot_max_weight
        return is_large and version in self._warm.names

    async def _counted(self, version: str, asked: Awaitable[VersionAnswer]) -> VersionAnswer:
        counter = self._counters.get
        try:
            answer = await asked
        except (BadImageError, *_SAY_NOTHING):
            raise
        except Exception:
            self._counters[version] = counter(version, Counter()).failed()
            raise
        before = counter(version, Counter())
        self._counters[version] = (
            before.answered_as_before() if answer.cached else before.answered(answer.model_ms)
        )
        return answer

    # -- comparing, after the answer ---------------------------------------------------

    def _compare_later(self, document: ReleaseDocument, served: Served, image: CleanImage) -> None:
        bytes_then = self._comparing_bytes + image.size_bytes
        if (
            len(self._comparing) >= self._config.serving.shadow_queue
            or bytes_then > self._config.feedback.max_queue_bytes
        ):
            self.dropped_comparisons += 1
            return
        self._comparing_bytes = bytes_then
        task = asyncio.create_task(self._compare(document, served, image))
        self._comparing.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._comparing.discard(task)
            self._comparing_bytes -= image.size_bytes

        task.add_done_callback(done)

    async def _compare(self, document: ReleaseDocument, served: Served, image: CleanImage) -> None:
        rollout = document.rollout
        assert rollout is not None
        stable, candidate = served.answer, None
        try:
            if served.variant == "candidate":
                sent = SentImage.of(image)
                stable, candidate = await self._ask_held(str(document.stable), sent), stable
            elif self._answers_in_process(document, rollout.candidate):
                candidate = await self._ask_held(rollout.candidate, SentImage.of(image))
            else:
                asked = self._copies.ask(rollout.candidate, image)
                candidate = await self._counted(rollout.candidate, asked)
        except Exception as error:  # noqa: BLE001 - a comparison may never hurt the front
            if served.variant == "candidate" or isinstance(error, _SAY_NOTHING):
                self.dropped_comparisons += 1
                logger.debug("comparison dropped: %r", error)
                return
            logger.debug("candidate %s did not answer: %r", rollout.candidate, error)
        self.log.log_comparison(
            Comparison(
                request_id=served.request_id,
                at_s=self._now_s(),
                rollout_id=rollout.id,
                stable_version=stable.version,
                stable_class=stable.class_name,
                stable_confidence=stable.confidence,
                candidate_version=rollout.candidate,
                candidate_class=candidate.class_name if candidate else "",
                candidate_confidence=candidate.confidence if candidate else 0.0,
                stable_ms=stable.model_ms,
                candidate_ms=candidate.model_ms if candidate else 0.0,
                audit=served.audit,
            )
        )

    # -- following the document --------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_once()
            except Exception as error:  # noqa: BLE001 - a front that stops following is lost
                logger.warning("the release document could not be followed: %r", error)
            await asyncio.sleep(self._config.serving.poll_interval_s)

    async def _follow_once(self) -> None:
        if self._on_look is not None:
            self._on_look()
        document, _ = await self._in_thread(self.desk.read)
        wanted = needed_versions(document, self._config.rollout)
        # The document in force keeps its versions until the new one is followed.
        current = self.document.stable
        wanted |= {current} if current else set()
        # What users see first: it may be all of them that are loaded anew.
        first = current or document.stable
        self._warm.hold(sorted(wanted, key=lambda version: version != first))
        if document.stable is None or document.stable in self._warm.names:
            self.document = document
        self._forget_ended_trials()
        self._controller.report(
            FrontReport(
                front_id=self.front_id,
                at_s=self._now_s(),
                doc_seq=self.document.seq,
                warm_versions=self._warm.names,
                counters=dict(self._counters),
                assigned=dict(self._assigned),
                requests_by_arm=dict(self._by_arm),
            )
        )

    def _forget_ended_trials(self) -> None:
        trial = self.document.trial.id if self.document.trial is not None else None
        self._assigned = {s: n for s, n in self._assigned.items() if s.trial == trial}
        self._by_arm = {name: n for name, n in self._by_arm.items() if name == trial}


def _added(counts: tuple[int, ...], arm: int, number: int) -> tuple[int, ...]:
    return (*counts[:arm], counts[arm] + number, *counts[arm + 1 :])


async def each(asked: Sequence[Awaitable[T]]) -> list[T]:
    """Wait for all; where one fails the others are dropped, as nobody waits for them any more."""
    if len(asked) == 1:
        return [await asked[0]]  # needs no task of its own
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def clean_label(label: object) -> str:
    """A label as the log keeps it.

    >>> clean_label("  Ankle boot ")
    'Ankle boot'

    Raises:
        ValueError: If it is not a string of 1 to `MAX_LABEL_CHARS` printable characters.
    """
    text = label.strip() if isinstance(label, str) else ""
    # U+FFFD stands where bytes of a URL were not UTF-8; what was meant is lost.
    is_readable = text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
    if not text or len(text) > MAX_LABEL_CHARS or not is_readable:
        raise ValueError(
            f"label must be a printable string of 1 to {MAX_LABEL_CHARS} characters, "
            f"got {label!r:.80}"
        )
    return text


def clean_reason(reason: object) -> str:
    """An operator's reason as the audit keeps it; may be empty.

    Raises:
        ValueError: If it is not a string of at most `MAX_REASON_CHARS` characters, or holds
            lone surrogates, which no file can store.
    """
    if (
        isinstance(reason, str)
        and len(reason) <= MAX_REASON_CHARS
        and not any("\ud800" <= character <= "\udfff" for character in reason)
    ):
        return reason
    raise ValueError(
        f"reason must be a string of at most {MAX_REASON_CHARS} Unicode characters, "
        f"got {reason!r:.80}"
    )


def top_k(answer: VersionAnswer, k: int) -> list[Mapping[str, Any]]:
    """The `k` most probable classes, best first."""
    names, probabilities = answer.class_names, answer.probabilities
    best = heapq.nlargest(k, range(len(probabilities)), key=probabilities.__getitem__)
    return [{"class": names[i], "confidence": round(probabilities[i], 6)} for i in best]
