"""One turn of the loop: log to examples, examples to a version, version to a release.

Knows the order of the steps and writes what each decided under ``runs/<id>/``, so that
a run that was interrupted can be taken up again by its id: its configuration, its parent
and its snapshot stay what they were. Does not know where training runs: `fit` is passed in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import lifelong_ray
from lifelong_ray.config import Config, Precision, config_from
from lifelong_ray.datasets import LabelledImages, natural_order
from lifelong_ray.examples import (
    arrays_of,
    curate_snapshot,
    import_examples,
    put_once,
    snapshot_of,
    split_validation,
    thinned,
    used_by,
    without_thin_classes,
    write_examples,
)
from lifelong_ray.feedback import uuid7
from lifelong_ray.fitting import Arrays, FitJob, FitOutcome, Trainer
from lifelong_ray.learning import Calibration, Learner, Light, Predictor, calibrate, with_light
from lifelong_ray.release import (
    GateReport,
    Intent,
    Manifest,
    Registry,
    ReleaseDesk,
    judge_base,
    judge_update,
    refused,
)
from lifelong_ray.storage import Store
from lifelong_ray.types import (
    AlreadyExistsError,
    DataError,
    Example,
    Json,
    LearningError,
    NotFoundError,
    RolloutError,
    VersionError,
)

logger = logging.getLogger(__name__)

Clock = Callable[[], float]
_KEPT_SCORES = 1_000  # rows of the reference that drift is measured against


@dataclass(frozen=True)
class CycleReport:
    """What one turn of the loop did, as JSON under ``runs/<id>/report.json``.

    `released` says whether the version was offered; if not, `why_not_released` has the reason.
    `gate_at` has the gate's checks at the precisions of serving that are not that of training,
    `cascade` when a light model answers and what that was measured to cost, if there is one.
    """

    run_id: str
    kind: str
    version: str
    parent: str | None
    path: str
    reason: str
    gate_passed: bool
    snapshot_id: str
    num_training: int
    num_validation: int
    num_holdout: int
    dropped: Mapping[str, int]
    class_names: tuple[str, ...]
    paths: Mapping[str, Json]
    prepare_seconds: float
    gate: Json
    released: bool
    why_not_released: str
    gate_at: Mapping[str, Json] = field(default_factory=dict)
    cascade: Json | None = None

    def to_json(self) -> Json:
        """Plain values."""
        plain: Json = json.loads(json.dumps(asdict(self)))
        return plain


def new_run_id(now_s: float) -> str:
    """A name for a run that sorts by time."""
    return f"run-{uuid7(now_s)}"


# -- the two kinds of turn -----------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Everything that is decided before training starts.

    Attributes:
        job: What is trained on what.
        parent: The version an update continues; None for a base training.
        snapshot_id: The log as it was seen.
        training, validation, holdout: The examples, as `job` has them in arrays.
        dropped: Label rows that were not used, by reason.
        prepare_seconds: Time from the log to the arrays.
    """

    job: FitJob
    parent: Manifest | None
    snapshot_id: str
    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    holdout: tuple[Example, ...]
    dropped: Mapping[str, int]
    prepare_seconds: float


def run_base(
    config: Config,
    store: Store,
    fit: Trainer,
    images: LabelledImages,
    *,
    run_id: str,
    now_s: Clock,
    release: bool = True,
) -> CycleReport:
    """Import labelled images, train a base version on the whole log, gate it, offer it.

    Only the classes of `images` are trained; whatever else the log knows of them is used.
    A run that has finished is not repeated: its report is returned.
    """
    finished = read_report(store, run_id)
    if finished is not None:
        return finished
    _begin(store, run_id, config, "base", None)
    import_examples(store, images, config, now_s=now_s)
    turn = prepare(config, store, images.class_names, None, run_id=run_id, now_s=now_s)
    return carry_out(turn, store, fit, now_s=now_s, release=release)


def run_update(
    config: Config,
    store: Store,
    fit: Trainer,
    *,
    run_id: str,
    now_s: Clock,
    release: bool = True,
) -> CycleReport:
    """Learn what the log has gained since the stable version, gate it, offer it.

    A run that has finished is not repeated: its report is returned.

    Raises:
        VersionError: If there is no stable version to update.
        DataError: If too little is new.
    """
    finished = read_report(store, run_id)
    if finished is not None:
        return finished
    turn = prepare_update(config, store, run_id=run_id, now_s=now_s)
    return carry_out(turn, store, fit, now_s=now_s, release=release)


def prepare_update(config: Config, store: Store, *, run_id: str, now_s: Clock) -> Turn:
    """Collect what an update of the stable version would learn; see `run_update`."""
    document, _ = ReleaseDesk(store, now_s).read()
    if document.stable is None:
        raise VersionError(
            f"{store.url} has no stable version to update; make the first one with --base"
        )
    # A resumed run continues the version that was stable when it began.
    pinned = _begin(store, run_id, config, "update", document.stable)
    parent = Registry(store).manifest(pinned or document.stable)
    turn = prepare(config, store, parent.class_names, parent, run_id=run_id, now_s=now_s)
    num_new = len(turn.training) + len(turn.validation)
    needed = config.learning.update.min_new_examples
    if num_new < needed:
        raise DataError(
            f"the log has {num_new} new examples, an update needs {needed} "
            f"(learning.update.min_new_examples); left out: {dict(turn.dropped)}"
        )
    return turn


def prepare(
    config: Config,
    store: Store,
    class_names: tuple[str, ...],
    parent: Manifest | None,
    *,
    run_id: str,
    now_s: Clock,
) -> Turn:
    """Turn the log into a training job.

    Args:
        config: The tree; an update takes its parent's architecture instead.
        store: Where the log is.
        class_names: Classes to train; an update adds what is new.
        parent: The version to continue, if any; what it knows is not learned again.
        run_id: Names the run; its snapshot is taken once.
        now_s: The clock.
    """
    started_s = now_s()
    registry = Registry(store)
    snapshot = snapshot_of(store, run_id, now_s)
    parent_files: dict[str, bytes] | None = None
    used: frozenset[tuple[str, str]] = frozenset()
    if parent is not None:
        _, parent_files = registry.load(parent.version)
        config = _with_model_of(config, parent_files)
        used = used_by(registry, store, parent)
    curation = curate_snapshot(store, snapshot, config, used=used)
    if parent is not None:
        curation = without_thin_classes(curation, class_names)
        unknown = {e.label for e in curation.training} - set(class_names)
        class_names = (*class_names, *sorted(unknown, key=natural_order))
    training, validation = split_validation(
        [e for e in curation.training if e.label in class_names],
        config.learning.update.validation_share,
    )
    if parent is not None:  # The images of a base training are thinned where they are loaded.
        training = thinned(training, config.data.fraction)
    holdout = tuple(e for e in curation.holdout if e.label in class_names)
    job = FitJob(
        kind="base" if parent is None else "update",
        run_id=run_id,
        class_names=class_names,
        training=arrays_of(training, class_names, config.model),
        validation=arrays_of(validation, class_names, config.model),
        parent_files=parent_files,
        config=config,
    )
    return Turn(
        job=job,
        parent=parent,
        snapshot_id=snapshot.snapshot_id,
        training=tuple(training),
        validation=tuple(validation),
        holdout=holdout,
        dropped=dict(curation.dropped),
        prepare_seconds=now_s() - started_s,
    )


def carry_out(
    turn: Turn, store: Store, fit: Trainer, *, now_s: Clock, release: bool
) -> CycleReport:
    """Train, let the gate choose among the paths, register the winner and offer it."""
    job, parent, run_id = turn.job, turn.parent, turn.job.run_id
    registry = Registry(store)
    outcome = fit(job)
    judged = {
        path: judge(fitted.files, job.parent_files, turn.holdout, job.config)
        for path, fitted in outcome.paths.items()
    }
    path, reason = _choose(outcome, judged)
    # Before the version exists, so that no version is without the record of what it learned.
    write_examples(store, run_id, turn.training, turn.validation, turn.holdout)
    manifest = _register(
        registry,
        Manifest(
            version=_next_version(registry, parent.version if parent else None),
            parent=parent.version if parent else None,
            kind=job.kind,
            path=path,
            class_names=job.class_names,
            created_at_s=now_s(),
            run_id=run_id,
            snapshot_id=turn.snapshot_id,
            gate=judged[path].gate,
            gate_at=judged[path].gate_at,
            metrics=judged[path].metrics(),
            config=job.config.model_dump(mode="json"),
            code_version=lifelong_ray.__version__,
        ),
        judged[path].files,
    )
    if not judged[path].gate.passed:
        why_not = "its gate refused it"
    elif not release:
        why_not = "it was asked not to be"
    else:
        why_not = _offer(store, manifest, run_id, now_s)
    report = CycleReport(
        run_id=run_id,
        kind=job.kind,
        version=manifest.version,
        parent=manifest.parent,
        path=path,
        reason=reason,
        gate_passed=judged[path].gate.passed,
        snapshot_id=turn.snapshot_id,
        num_training=len(turn.training),
        num_validation=len(turn.validation),
        num_holdout=len(turn.holdout),
        dropped=turn.dropped,
        class_names=job.class_names,
        paths={
            name: {
                **fitted.report,
                "holdout_accuracy": judged[name].accuracy,
                "gate_passed": judged[name].gate.passed,
            }
            for name, fitted in outcome.paths.items()
        },
        prepare_seconds=turn.prepare_seconds,
        gate=judged[path].gate.model_dump(mode="json"),
        released=not why_not,
        why_not_released=why_not,
        gate_at={p: gate.model_dump(mode="json") for p, gate in judged[path].gate_at.items()},
        cascade=judged[path].cascade(),
    )
    _write_json(store, f"runs/{run_id}/report.json", report.to_json())
    return report


def _offer(store: Store, manifest: Manifest, run_id: str, now_s: Clock) -> str:
    """Make the first version stable; ask for a rollout of any later one.

    Returns:
        Why it could not be offered, such as a rollout under way; empty when it was.
    """
    desk = ReleaseDesk(store, now_s)
    document, _ = desk.read()
    if document.stable is None:
        desk.create_if_missing(manifest.version, actor=run_id)
        return ""
    intent = Intent(
        id=str(uuid7(now_s())),
        verb="start",
        actor=run_id,
        reason=f"{manifest.kind} {manifest.version} passed the gate",
        at_s=now_s(),
        candidate=manifest.version,
    )
    try:
        desk.request(intent)
    except RolloutError as error:  # the version is good; it can be offered later
        logger.warning("%s is not offered: %s", manifest.version, error)
        return str(error)
    return ""


# -- judging -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A candidate on the hold-out.

    Attributes:
        files: Of the version, with what is known of its light model.
        calibration: When that one answers; None without one.
        gate: The checks.
        gate_at: The same checks by precision, where answers are given in another than training's.
        accuracy: Over all hold-out images.
        scores: Probabilities by image and class: what drift is measured against.
    """

    files: Mapping[str, bytes]
    calibration: Calibration | None
    gate: GateReport
    gate_at: dict[str, GateReport]
    accuracy: float
    scores: list[list[float]]

    def metrics(self) -> dict[str, Any]:
        """What the manifest keeps."""
        cascade = {} if self.calibration is None else {"cascade": self.cascade()}
        return {
            "holdout_accuracy": self.accuracy,
            "holdout_scores": self.scores[:_KEPT_SCORES],
            **cascade,
        }

    def cascade(self) -> Json | None:
        """When the light model answers, as plain values."""
        return None if self.calibration is None else asdict(self.calibration)

    def check(self, name: str) -> float | None:
        """The value of one check of the gate."""
        return next((c.value for c in self.gate.checks if c.name == name), None)


def judge(
    files: Mapping[str, bytes],
    parent_files: Mapping[str, bytes] | None,
    holdout: Sequence[Example],
    config: Config,
) -> Judged:
    """Score a candidate and its parent on the same hold-out and ask the gate.

    The candidate is judged as it will be served: with its light model, where that one is found
    good enough, and at the precisions that answers are given in. Its parent stands for what could
    be done at best, without either, so that small losses do not add up over many updates.

    Raises:
        DataError: If there is no hold-out to judge by.
    """
    if not holdout:
        raise DataError(
            "the hold-out is empty; send trusted labels (POST /examples) or raise "
            "feedback.holdout_share"
        )
    candidate = Learner.from_files(files)
    held = arrays_of(holdout, candidate.class_names, config.model)
    parent = Learner.from_files(parent_files) if parent_files is not None else None
    parent_scores = _scores(parent, held) if parent is not None else None

    def gate(scores: NDArray[np.float32]) -> GateReport:
        names = candidate.class_names
        if parent is None or parent_scores is None:
            return judge_base(held.labels, scores, names, config.gate)
        known = parent.class_names
        return judge_update(held.labels, parent_scores, scores, known, names, config.gate)

    scores = _scores(candidate, held)
    verdict = gate(scores)
    light = Light.from_files(files)
    if light is not None:
        light = _calibrated(light, scores, held, holdout, config)
        together = _scores(candidate, held, light)
        verdict_together = gate(together)
        if verdict.passed and not verdict_together.passed:
            light = _untrusted(light, f"the gate refuses its answers: {verdict_together.reason}")
        else:
            scores, verdict = together, verdict_together
        files = {**files, **light.to_files()}

    def gate_at(precision: Precision) -> GateReport:
        try:
            return gate(_scores(candidate, held, light, precision))
        except LearningError as error:
            return refused(f"answers_in_{precision}", str(error))

    return Judged(
        files=files,
        calibration=None if light is None else light.calibration,
        gate=verdict,
        gate_at={precision: gate_at(precision) for precision in config.serving.precisions_to_prove},
        accuracy=float((scores.argmax(1) == held.labels).mean()),
        scores=np.round(scores, 4).tolist(),
    )


def _scores(
    learner: Learner, held: Arrays, light: Light | None = None, precision: Precision = "fp32"
) -> NDArray[np.float32]:
    heavy = Predictor(learner, precision=precision)
    return with_light(heavy, light).predict(held.images).probabilities


def _calibrated(
    light: Light,
    heavy_scores: NDArray[np.float32],
    held: Arrays,
    holdout: Sequence[Example],
    config: Config,
) -> Light:
    calibration = calibrate(
        Predictor(light).predict(held.images).probabilities,
        heavy_scores,
        held.labels,
        np.array([_chooses(example) for example in holdout]),
        config.learning.cascade,
    )
    if calibration.threshold is None:
        logger.warning("the light model is not trusted: %s", calibration.reason)
    return replace(light, calibration=calibration)


def _chooses(example: Example) -> bool:
    """Whether a hold-out image has a say in the light model's threshold; half of them have."""
    digest = hashlib.sha256(f"cascade:{example.content_hash}".encode()).digest()
    return digest[0] % 2 == 0


def _untrusted(light: Light, reason: str) -> Light:
    assert light.calibration is not None
    logger.warning("the light model is not trusted: %s", reason)
    return replace(light, calibration=light.calibration.without_threshold(reason))


def register_candidate(
    store: Store,
    files: Mapping[str, bytes],
    parent: str,
    config: Config,
    *,
    run_id: str,
    now_s: Clock,
) -> Manifest:
    """Gate and register a version that was made elsewhere, as an update of `parent`.

    It is registered whether or not it passes; only a passed gate makes it a candidate.
    """
    registry = Registry(store)
    manifest, parent_files = registry.load(parent)
    names = Learner.from_files(files).class_names
    snapshot = snapshot_of(store, run_id, now_s)
    used = used_by(registry, store, manifest)
    holdout = curate_snapshot(store, snapshot, config, used=used).holdout
    judged = judge(
        files,
        parent_files,
        [e for e in holdout if e.label in names],
        _with_model_of(config, parent_files),
    )
    return _register(
        registry,
        Manifest(
            version=_next_version(registry, parent),
            parent=parent,
            kind="update",
            path="external",
            class_names=names,
            created_at_s=now_s(),
            run_id=run_id,
            snapshot_id=snapshot.snapshot_id,
            gate=judged.gate,
            gate_at=judged.gate_at,
            metrics=judged.metrics(),
            config=manifest.config,
            code_version=lifelong_ray.__version__,
        ),
        judged.files,
    )


def _next_version(registry: Registry, parent: str | None) -> str:
    return registry.next_base() if parent is None else registry.next_update(parent)


def _register(registry: Registry, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Register under the manifest's name, or a later one if another run was first."""
    while True:
        try:
            return registry.register(manifest, files)
        except AlreadyExistsError:
            name = _next_version(registry, manifest.parent)
            if name == manifest.version:
                raise
            manifest = manifest.model_copy(update={"version": name})


def _choose(outcome: FitOutcome, judged: Mapping[str, Judged]) -> tuple[str, str]:
    """The path the gate finds better, and why.

    A passed gate first; then the mean of hold-out accuracy (what must be kept) and
    validation accuracy (what was to be learned).
    """

    def merit(path: str) -> tuple[bool, float]:
        validation = outcome.paths[path].report.get("validation_accuracy")
        parts = [judged[path].accuracy]
        if isinstance(validation, float):
            parts.append(validation)
        return judged[path].gate.passed, sum(parts) / len(parts)

    best = max(outcome.paths, key=merit)
    shown = ", ".join(
        f"{path} {merit(path)[1]:.3f}{'' if merit(path)[0] else ' (gate refused)'}"
        for path in outcome.paths
    )
    return best, f"{outcome.reason}; mean of hold-out and validation accuracy: {shown}"


# -- what a run leaves behind -----------------------------------------------------------------


def _with_model_of(config: Config, files: Mapping[str, bytes]) -> Config:
    """An update inherits its parent's architecture."""
    model = Learner.from_files(files).model_config
    return config.model_copy(update={"model": model})


def _begin(
    store: Store,
    run_id: str,
    config: Config,
    kind: Literal["base", "update"],
    parent: str | None,
) -> str | None:
    """Fix what a run does when it starts; return the parent it has had since then.

    Raises:
        DataError: If the run began as another kind of training.
    """
    _write_json(store, f"runs/{run_id}/config.json", config.model_dump(mode="json"))
    _write_json(store, f"runs/{run_id}/plan.json", {"kind": kind, "parent": parent})
    plan = json.loads(store.read(f"runs/{run_id}/plan.json"))
    if plan["kind"] != kind:
        raise DataError(
            f"run {run_id} began as a training of kind {plan['kind']} and cannot go on as {kind}; "
            "start a new run"
        )
    pinned: str | None = plan["parent"]
    return pinned


def _write_json(store: Store, key: str, value: Any) -> None:
    put_once(store, key, json.dumps(value, indent=1).encode())


def read_run_config(store: Store, run_id: str) -> Config:
    """The configuration a run was started with.

    Raises:
        NotFoundError: If there is no such run.
    """
    return config_from(json.loads(_read_of_run(store, run_id, "config.json")))


def read_run_kind(store: Store, run_id: str) -> str:
    """``base`` or ``update``.

    Raises:
        NotFoundError: If there is no such run, or it has not begun yet.
    """
    kind: str = json.loads(_read_of_run(store, run_id, "plan.json"))["kind"]
    return kind


def read_report(store: Store, run_id: str) -> CycleReport | None:
    """The report of a run; None while it has not finished."""
    key = f"runs/{run_id}/report.json"
    if not store.exists(key):
        return None
    plain = json.loads(store.read(key))
    return CycleReport(**{**plain, "class_names": tuple(plain["class_names"])})


def _read_of_run(store: Store, run_id: str, name: str) -> bytes:
    try:
        return store.read(f"runs/{run_id}/{name}")
    except NotFoundError:
        raise NotFoundError(
            f"{store.url} has no run {run_id} to continue; a run prints its id when it starts"
        ) from None
