"""One turn of the loop after another, on a store in memory and without Ray."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lifelong_ray import cycle
from lifelong_ray.config import Config, config_from
from lifelong_ray.cycle import (
    CycleReport,
    read_report,
    read_run_config,
    read_run_kind,
    register_candidate,
    run_base,
    run_update,
)
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.examples import import_examples
from lifelong_ray.feedback import (
    CleanImage,
    LogWriter,
    content_hash,
    is_holdout,
    read_feedback,
    take_snapshot,
)
from lifelong_ray.fitting import FitJob, FitOutcome, fit_alone
from lifelong_ray.learning import (
    Answers,
    Calibration,
    Learner,
    Light,
    Predictor,
    with_light,
)
from lifelong_ray.release import Intent, Registry, ReleaseDesk, ReleaseDocument
from lifelong_ray.types import (
    DataError,
    GateRefusedError,
    NotFoundError,
    VersionError,
)
from tests.fakes import MemoryStore
from tests.rows import a_label, a_prediction

OLD = ("0", "1", "2", "3")
NEW = ("4", "5")
CONFIG = config_from(
    {
        "model": {"widths": [8, 16], "image_size": 8},
        "learning": {
            "base": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "max_shift_px": 0},
            "analytic": {"num_features": 64},
            "update": {"paths": "fast"},
        },
        "feedback": {"holdout_share": 0.25, "group_commit_s": 0.001},
    }
)


Fit = Callable[[FitJob], FitOutcome]


class Clock:
    """Every look at it costs a millisecond."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


def bars(labels: tuple[str, ...], num_each: int, seed: int) -> LabelledImages:
    """Bright bars on noise; the class decides where the bar is."""
    rng = np.random.default_rng(seed)
    images = []
    for label in labels * num_each:
        image = rng.integers(0, 90, (8, 8, 1), np.uint8)
        position = 2 * (int(label) % 4)
        if int(label) < 4:
            image[position : position + 2] += 150
        else:
            image[:, position : position + 2] += 150
        images.append(image)
    return LabelledImages(tuple(images), labels * num_each)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def after_base() -> tuple[MemoryStore, CycleReport]:
    store = MemoryStore()
    return store, base(store)


@pytest.fixture
def store(after_base: tuple[MemoryStore, CycleReport]) -> MemoryStore:
    """The store after the base training, for this test alone."""
    return copied(after_base[0])


def copied(store: MemoryStore) -> MemoryStore:
    copy = MemoryStore()
    copy.objects = dict(store.objects)
    return copy


def base(
    store: MemoryStore,
    run_id: str = "run-base",
    config: Config = CONFIG,
    fit: Fit = fit_alone,
    num_each: int = 25,
) -> CycleReport:
    """A base training on as many images of every old class."""
    images = bars(OLD, num_each, seed=1)
    return run_base(config, store, fit, images, run_id=run_id, now_s=Clock())


def update(
    store: MemoryStore,
    run_id: str = "run-update",
    config: Config = CONFIG,
    fit: Fit = fit_alone,
    **more: object,
) -> CycleReport:
    return run_update(config, store, fit, run_id=run_id, now_s=Clock(), **more)


def send(store: MemoryStore, images: LabelledImages, at_s: float = 1_700_000_100.0) -> None:
    import_examples(store, images, CONFIG, now_s=Clock(at_s))


def promote(store: MemoryStore, version: str) -> None:
    """Make a version stable, as the controller would after a rollout."""
    desk = ReleaseDesk(store, Clock())
    document, tag = desk.read()
    desk.swap(
        document.model_copy(update={"stable": version, "previous": document.stable, "intents": ()}),
        tag,
    )


def released(store: MemoryStore) -> ReleaseDocument:
    return ReleaseDesk(store, Clock()).read()[0]


def rows_of(store: MemoryStore, run_id: str) -> list[dict[str, str]]:
    table = pq.read_table(io.BytesIO(store.read(f"runs/{run_id}/examples.parquet")))
    rows: list[dict[str, str]] = table.to_pylist()
    return rows


def hashes(store: MemoryStore, run_id: str, *splits: str) -> set[str]:
    return {row["content_hash"] for row in rows_of(store, run_id) if row["split"] in splits}


# ---------------------------------------------------------------- the base training


def test_a_base_training_registers_v1_with_its_origin_and_releases_it(
    after_base: tuple[MemoryStore, CycleReport],
) -> None:
    store, report = after_base

    manifest = Registry(store).manifest("v1")

    assert report.version == "v1"
    assert report.gate_passed
    assert report.released
    assert (manifest.parent, manifest.kind, manifest.path) == (None, "base", "base")
    assert manifest.class_names == OLD
    assert manifest.run_id == "run-base"
    assert manifest.snapshot_id == report.snapshot_id
    assert manifest.config["model"]["widths"] == [8, 16]
    assert released(store).stable == "v1"
    assert report.num_training + report.num_validation + report.num_holdout == 100


def test_every_decision_of_a_run_is_found_under_its_id(
    after_base: tuple[MemoryStore, CycleReport],
) -> None:
    store, report = after_base

    names = {key.removeprefix("runs/run-base/") for key in store.list("runs/run-base/")}

    assert names == {
        "config.json",
        "plan.json",
        "snapshot.json",
        "examples.parquet",
        "report.json",
    }
    assert read_report(store, "run-base") == report
    assert read_run_config(store, "run-base") == CONFIG
    assert read_run_kind(store, "run-base") == "base"
    assert json.loads(store.read("runs/run-base/report.json"))["version"] == "v1"


def test_the_log_has_each_imported_image_once(store: MemoryStore) -> None:
    images = bars(OLD, 25, seed=1)

    again = import_examples(store, images, CONFIG, now_s=Clock())

    assert again == 0
    assert len(read_feedback(store, take_snapshot(store, 0.0)).rows) == 100


def test_a_second_base_training_is_a_candidate_beside_a_stable_version(
    store: MemoryStore,
) -> None:
    report = base(store, "run-2")

    document = released(store)
    assert report.version == "v2"
    assert report.released
    assert document.stable == "v1"
    assert [(intent.verb, intent.candidate) for intent in document.intents] == [("start", "v2")]


# ---------------------------------------------------------------- what an update needs


def test_an_update_without_a_stable_version_names_the_way_out() -> None:
    with pytest.raises(VersionError, match="--base"):
        update(MemoryStore())


def test_an_update_with_too_little_new_says_how_much_is_needed(store: MemoryStore) -> None:
    send(store, bars(NEW, 6, seed=2))

    with pytest.raises(DataError, match=r"new examples, an update needs 20 \(learning\.update"):
        update(store)

    assert Registry(store).versions() == ["v1"]


def test_new_classes_with_too_few_examples_wait(store: MemoryStore) -> None:
    send(store, bars(("0", "1", "2", "3", "4"), 20, seed=2))
    send(store, bars(("5",), 3, seed=3))

    report = update(store)

    assert report.class_names == (*OLD, "4")
    assert report.dropped["new_class_too_thin"] > 0
    assert {row["label"] for row in rows_of(store, "run-update")} == {*OLD, "4"}


# ---------------------------------------------------------------- what an update does


def test_an_update_learns_two_new_classes_and_offers_v1_1(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))

    report = update(store)

    manifest, files = Registry(store).load("v1.1")
    document = released(store)
    assert report.gate_passed, report.gate
    assert report.version == "v1.1"
    assert (manifest.parent, manifest.kind, manifest.path) == ("v1", "update", "fast")
    assert manifest.snapshot_id == report.snapshot_id
    assert manifest.class_names == (*OLD, *NEW)
    assert Learner.from_files(files).class_names == (*OLD, *NEW)
    assert report.released
    assert document.stable == "v1"
    assert document.intents[0].candidate == "v1.1"
    learned = {row["label"] for row in rows_of(store, "run-update") if row["split"] != "holdout"}
    assert learned == set(NEW)


def test_a_dry_run_of_an_update_trains_on_a_share_of_every_class(store: MemoryStore) -> None:
    send(store, bars(("4", "5"), 24, seed=2))
    half = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"fraction": 0.5})})

    whole = update(copied(store))
    dry = update(store, config=half)

    assert whole.num_training // 2 <= dry.num_training <= whole.num_training // 2 + 2
    assert (dry.num_validation, dry.num_holdout) == (whole.num_validation, whole.num_holdout)
    assert {row["label"] for row in rows_of(store, dry.run_id) if row["split"] == "training"} == {
        "4",
        "5",
    }


def test_an_update_does_not_learn_again_what_its_ancestors_learned(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))
    update(store, "run-1")
    promote(store, "v1.1")
    send(store, bars((*OLD, *NEW), 10, seed=3), at_s=1_700_000_200.0)

    report = update(store, "run-2")

    learned = [hashes(store, run, "training", "validation") for run in ("run-base", "run-1")]
    again = hashes(store, "run-2", "training", "validation")
    assert report.version == "v1.2"
    assert report.parent == "v1.1"
    assert again
    assert not again & (learned[0] | learned[1])
    assert report.dropped["already_used"] == len(learned[0] | learned[1])


def test_the_hold_out_is_in_the_training_of_no_version_and_only_grows(
    store: MemoryStore,
) -> None:
    send(store, bars(NEW, 25, seed=2))
    update(store, "run-1")
    promote(store, "v1.1")
    send(store, bars((*OLD, *NEW), 10, seed=3), at_s=1_700_000_200.0)
    update(store, "run-2")
    run_base(
        CONFIG, store, fit_alone, bars((*OLD, *NEW), 10, seed=3), run_id="run-3", now_s=Clock()
    )

    runs = ("run-base", "run-1", "run-2", "run-3")

    held = [hashes(store, run, "holdout") for run in runs]
    trained = [hashes(store, run, "training", "validation") for run in runs]
    assert held[0] < held[1] < held[2] == held[3]
    assert not set.union(*held) & set.union(*trained)
    assert all(is_holdout(name, 0.25) for name in held[2])


def test_users_votes_are_learned_but_never_held_out(store: MemoryStore) -> None:
    images = bars(NEW, 25, seed=2)
    writer = LogWriter(store, CONFIG.feedback, "front-1", Clock())
    for number, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
        answer = a_prediction(
            f"r{number}",
            at_s=1_700_000_100.0,
            content_hash=content_hash(pixels),
            class_name="0",
            scores=(1.0, 0.0, 0.0, 0.0),
            class_names=OLD,
        )
        writer.log_prediction(answer, CleanImage.of(pixels))
        vote = a_label(f"r{number}", label, 1_700_000_100.0, user=f"user-{number}", audit=False)
        writer.record_feedback([vote], ())
    writer.close()

    report = update(store)

    voted = {content_hash(pixels) for pixels in images.images}
    assert report.class_names == (*OLD, *NEW)
    assert voted == hashes(store, "run-update", "training", "validation")
    assert not voted & hashes(store, "run-update", "holdout")


def test_a_run_that_is_not_to_be_released_is_registered_only(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))

    report = update(store, release=False)

    document = released(store)
    assert report.gate_passed
    assert not report.released
    assert document.intents == ()
    assert Registry(store).versions() == ["v1", "v1.1"]


def test_an_update_during_a_rollout_is_registered_and_says_why_it_waits(
    store: MemoryStore,
) -> None:
    send(store, bars(NEW, 25, seed=2))
    update(store, "run-1")

    report = update(store, "run-2")

    document = released(store)
    assert report.version == "v1.2"
    assert report.gate_passed
    assert not report.released
    assert "v1.1" in report.why_not_released
    assert [intent.candidate for intent in document.intents] == ["v1.1"]


# ---------------------------------------------------------------- repeating a run


class LostError(Exception):
    """A training that was lost."""


def lost(job: FitJob) -> FitOutcome:
    raise LostError


def test_a_resumed_run_sees_the_same_log_and_the_same_parent(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))
    undisturbed = update(copied(store))
    with pytest.raises(LostError):
        update(store, fit=lost)
    send(store, bars(("0", "7"), 25, seed=4), at_s=1_700_000_200.0)
    base(store, "run-2")
    promote(store, "v2")

    resumed = update(store)

    assert resumed.snapshot_id == undisturbed.snapshot_id
    assert resumed.parent == "v1"
    assert resumed.class_names == (*OLD, *NEW)
    assert resumed.num_training == undisturbed.num_training


def test_a_resumed_base_training_sees_the_same_log() -> None:
    store = MemoryStore()
    with pytest.raises(LostError):
        base(store, fit=lost)
    send(store, bars(OLD, 5, seed=9))

    resumed = base(store)

    assert resumed.num_training + resumed.num_validation + resumed.num_holdout == 100


def test_a_finished_run_is_not_repeated(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))
    first = update(store)

    again = update(store, fit=lost)

    assert again == first
    assert Registry(store).versions() == ["v1", "v1.1"]


def test_a_run_cannot_go_on_as_another_kind(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))
    with pytest.raises(LostError):
        update(store, "run-1", fit=lost)

    with pytest.raises(DataError, match=r"run-1 began as .*update.* base; start a new run"):
        base(store, "run-1")


def test_an_unknown_run_is_named() -> None:
    with pytest.raises(NotFoundError, match="has no run run-x to continue"):
        read_run_config(MemoryStore(), "run-x")
    with pytest.raises(NotFoundError, match="has no run run-x to continue"):
        read_run_kind(MemoryStore(), "run-x")
    assert read_report(MemoryStore(), "run-x") is None


@pytest.mark.parametrize("paths", ["fast", "slow"])
def test_the_same_snapshot_seed_and_parent_give_the_same_bytes(
    store: MemoryStore, paths: str
) -> None:
    send(store, bars(NEW, 25, seed=2))
    changed = CONFIG.learning.update.model_copy(update={"paths": paths})
    learning = CONFIG.learning.model_copy(update={"update": changed})
    config = CONFIG.model_copy(update={"learning": learning})
    one, other = copied(store), copied(store)

    update(one, "run-1", config)
    update(other, "run-2", config)

    assert Registry(one).load("v1.1")[1] == Registry(other).load("v1.1")[1]
    assert Registry(one).manifest("v1.1").path == paths


# ---------------------------------------------------------------- the gate


def test_a_version_that_fails_the_gate_is_registered_but_not_offered(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))

    report = update(store, fit=spoiling)

    document = released(store)
    assert not report.gate_passed
    assert not report.released
    assert report.why_not_released == "its gate refused it"
    assert Registry(store).versions() == ["v1", "v1.1"]
    assert (document.stable, document.intents) == ("v1", ())


def test_a_base_version_that_fails_the_gate_is_not_made_stable() -> None:
    store = MemoryStore()

    report = base(store, fit=spoiling)

    assert not report.gate_passed
    assert released(store).stable is None
    with pytest.raises(VersionError, match="--base"):
        update(store)


def test_a_version_that_failed_leaves_its_examples_to_the_next(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))
    update(store, "run-1", fit=spoiling)

    report = update(store, "run-2")

    splits = ("training", "validation")
    assert hashes(store, "run-2", *splits) == hashes(store, "run-1", *splits)
    assert report.version == "v1.2"
    assert report.parent == "v1"


def test_a_damaged_candidate_is_registered_and_refused(store: MemoryStore) -> None:
    _, files = Registry(store).load("v1")

    manifest = register_candidate(store, spoilt(files), "v1", CONFIG, run_id="run-x", now_s=Clock())

    assert manifest.version == "v1.1"
    assert manifest.path == "external"
    assert manifest.gate is not None
    assert not manifest.gate.passed
    start = Intent(id="i", verb="start", actor="a", reason="", at_s=0.0, candidate="v1.1")
    with pytest.raises(GateRefusedError, match=r"v1\.1 has not passed the gate"):
        ReleaseDesk(store, Clock()).request(start)


def test_an_unchanged_copy_passes_as_a_candidate(store: MemoryStore) -> None:
    _, files = Registry(store).load("v1")

    manifest = register_candidate(store, files, "v1", CONFIG, run_id="run-x", now_s=Clock())

    assert manifest.gate is not None
    assert manifest.gate.passed


def test_without_a_hold_out_nothing_is_judged() -> None:
    config = CONFIG.model_copy(
        update={"feedback": CONFIG.feedback.model_copy(update={"holdout_share": 0.0})}
    )

    with pytest.raises(DataError, match="the hold-out is empty"):
        base(MemoryStore(), config=config)


def spoilt(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A version whose classes have changed places."""
    learner = Learner.from_files(files)
    names = learner.class_names
    return replace(learner, class_names=(*names[1:], names[0])).to_files()


def spoiling(job: FitJob) -> FitOutcome:
    """Train, and shuffle what came out."""
    outcome = fit_alone(job)
    paths = {}
    for name, fitted in outcome.paths.items():
        learner = Learner.from_files(fitted.files)
        with torch.no_grad():
            for value in learner.model.state_dict().values():
                value.copy_(torch.zeros_like(value))
        paths[name] = replace(fitted, files=learner.to_files())
    return replace(outcome, paths=paths)


# ---------------------------------------------------------------- two at once


def test_two_updates_at_once_do_not_overwrite_one_another(store: MemoryStore) -> None:
    send(store, bars(NEW, 25, seed=2))

    def overtaken(job: FitJob) -> FitOutcome:
        outcome = fit_alone(job)
        if job.run_id == "run-1":
            update(store, "run-2")
        return outcome

    update(store, "run-1", fit=overtaken)

    runs = [Registry(store).manifest(v).run_id for v in Registry(store).versions()]
    assert runs == ["run-base", "run-2", "run-1"]


class OvertakingStore(MemoryStore):
    """Another run takes the name v1.1 just before this one writes its first file."""

    def put_new(self, key: str, data: bytes) -> None:
        if key.startswith("versions/v1.1/") and not self.list("versions/v1.1/"):
            super().put_new(key, b"another run's")
        super().put_new(key, data)


def test_a_name_that_another_run_takes_meanwhile_is_left_to_it(store: MemoryStore) -> None:
    contested = OvertakingStore()
    contested.objects = dict(store.objects)
    send(contested, bars(NEW, 25, seed=2))

    report = update(contested)

    assert report.version == "v1.2"
    assert Registry(contested).load("v1.2")[0].run_id == "run-update"


# ---------------------------------------------------------------- fewer bits


def in_precisions(front: str, slot: str, widths: tuple[int, ...] = (8, 16)) -> Config:
    model = CONFIG.model.model_copy(update={"widths": widths})
    serving = CONFIG.serving
    serving = serving.model_copy(
        update={
            "front": serving.front.model_copy(update={"precision": front}),
            "slot": serving.slot.model_copy(update={"precision": slot}),
        }
    )
    return CONFIG.model_copy(update={"model": model, "serving": serving})


def first_version(config: Config) -> tuple[MemoryStore, CycleReport]:
    store = MemoryStore()
    return store, base(store, config=config)


def test_the_gate_judges_at_every_precision_that_answers_are_given_in() -> None:
    store, report = first_version(in_precisions("bf16", "fp32"))

    manifest = Registry(store).manifest("v1")

    assert list(manifest.gate_at) == list(report.gate_at) == ["bf16"]
    assert manifest.gate_at["bf16"].passed
    assert [c.name for c in manifest.gate_at["bf16"].checks] == [
        c.name for c in manifest.gate.checks
    ]
    assert manifest.why_not_at("bf16") == manifest.why_not_at("fp32") == ""
    assert read_report(store, "run-base") == report


def test_an_update_is_held_against_its_parent_at_every_precision() -> None:
    config = in_precisions("bf16", "bf16")
    store, _ = first_version(config)
    send(store, bars(NEW, 25, seed=2))

    report = update(store, config=config)

    checks = {check["name"] for check in report.gate_at["bf16"]["checks"]}
    assert {"retention", "new_accuracy"} <= checks


def test_a_version_that_is_bad_in_fewer_bits_is_released_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class RoundsBadly(Predictor):
        def predict(self, images: np.ndarray) -> Answers:
            answers = super().predict(images)
            if self.precision == "fp32":
                return answers
            return replace(answers, probabilities=np.roll(answers.probabilities, 1, axis=1))

    monkeypatch.setattr(cycle, "Predictor", RoundsBadly)

    store, report = first_version(in_precisions("fp32", "bf16"))

    manifest = Registry(store).manifest("v1")
    assert report.released
    assert not manifest.gate_at["bf16"].passed
    assert "the gate refused v1 in bf16: accuracy" in manifest.why_not_at("bf16")


def test_a_version_that_has_nothing_to_round_to_int8_is_refused_at_int8() -> None:
    store, report = first_version(in_precisions("int8", "fp32", widths=(6, 12)))

    assert report.gate_passed
    assert "nothing of this model can answer in int8" in Registry(store).manifest("v1").why_not_at(
        "int8"
    )


# ---------------------------------------------------------------- a light model


def with_cascade(**changes: object) -> Config:
    """Losses of 5 % are allowed, which 59 images without a mistake can show."""
    settings = {"enabled": True, "widths": (8, 8), "max_accuracy_loss": 0.05, **changes}
    cascade = CONFIG.learning.cascade.model_copy(update=settings)
    learning = CONFIG.learning.model_copy(update={"cascade": cascade})
    return CONFIG.model_copy(update={"learning": learning})


def light_of(store: MemoryStore, version: str) -> Light:
    light = Light.from_files(Registry(store).load(version)[1])
    assert light is not None
    return light


def answers_of(store: MemoryStore, version: str, images: LabelledImages) -> tuple[float, float]:
    """Accuracy that a version loses to its light model, and the share that this answers."""
    learner = Learner.from_files(Registry(store).load(version)[1])
    inputs = np.stack([image.transpose(2, 0, 1) for image in images.images])
    heavy = Predictor(learner)
    alone, together = (
        answerer.predict(inputs)
        for answerer in (heavy, with_light(heavy, light_of(store, version)))
    )
    labels = np.array([learner.class_names.index(label) for label in images.labels])
    right = [(answers.probabilities.argmax(1) == labels).mean() for answers in (alone, together)]
    return float(right[0] - right[1]), float(together.light.mean())


@pytest.fixture(scope="module")
def after_cascade() -> tuple[MemoryStore, CycleReport]:
    store = MemoryStore()
    return store, base(store, config=with_cascade(), num_each=170)


def test_a_version_has_a_light_model_that_answers_a_share_within_the_allowed_loss(
    after_cascade: tuple[MemoryStore, CycleReport],
) -> None:
    store, report = after_cascade

    loss, share = answers_of(store, "v1", bars(OLD, 100, seed=77))

    assert report.cascade is not None
    assert report.cascade["threshold"] is not None, report.cascade["reason"]
    assert Registry(store).manifest("v1").metrics["cascade"] == report.cascade
    assert share >= 0.3
    assert share == pytest.approx(report.cascade["light_share"], abs=0.2)
    assert loss <= 0.05
    assert report.cascade["num_choosing"] + report.cascade["num_measuring"] == report.num_holdout


def test_an_update_teaches_the_light_model_its_new_classes(
    after_cascade: tuple[MemoryStore, CycleReport],
) -> None:
    store = copied(after_cascade[0])
    send(store, bars(NEW, 170, seed=2))

    report = update(store, config=with_cascade())

    light = light_of(store, "v1.1")
    loss, share = answers_of(store, "v1.1", bars((*OLD, *NEW), 60, seed=78))
    assert light.class_names == (*OLD, *NEW)
    assert light.model.shape.head_blocks == (4, 2)  # It went on from that of v1.
    assert report.cascade is not None
    assert report.cascade["threshold"] is not None, report.cascade["reason"]
    assert share >= 0.3
    assert loss <= 0.05


def test_a_small_hold_out_proves_no_light_model_and_the_report_says_so() -> None:
    store = MemoryStore()

    report = base(store, config=with_cascade())

    assert report.released
    assert report.cascade is not None
    assert report.cascade["threshold"] is None
    assert "even without a mistake they show no loss below" in report.cascade["reason"]
    assert answers_of(store, "v1", bars(OLD, 10, seed=77)) == (0, 0)


def test_a_light_model_that_learned_nothing_is_never_asked() -> None:
    store = MemoryStore()
    trainer = CONFIG.learning.cascade.trainer.model_copy(
        update={"iterations": 1, "learning_rate": 1e-9}
    )

    report = base(store, config=with_cascade(trainer=trainer), num_each=170)

    assert report.released
    assert report.cascade is not None
    assert report.cascade["threshold"] is None
    assert report.cascade["reason"]
    assert answers_of(store, "v1", bars(OLD, 10, seed=77))[1] == 0


def test_a_light_model_that_the_gate_refuses_leaves_the_version_to_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trusting(*_: object, **__: object) -> Calibration:
        return Calibration(0.0, "blindly", 1.0, 0.0, 0.0, 1, 1)

    monkeypatch.setattr(cycle, "calibrate", trusting)
    trainer = CONFIG.learning.cascade.trainer.model_copy(
        update={"iterations": 1, "learning_rate": 1e-9}
    )
    store = MemoryStore()

    report = base(store, config=with_cascade(trainer=trainer), num_each=40)

    assert report.gate_passed
    assert report.cascade is not None
    assert report.cascade["threshold"] is None
    assert "the gate refuses its answers: accuracy" in report.cascade["reason"]
    assert light_of(store, "v1").threshold is None


def test_the_gate_judges_both_models_together_at_the_precisions_of_serving(
    after_cascade: tuple[MemoryStore, CycleReport],
) -> None:
    store, _ = after_cascade
    serving = in_precisions("bf16", "fp32").serving
    config = with_cascade().model_copy(update={"serving": serving})
    _, files = Registry(store).load("v1")

    manifest = register_candidate(
        copied(store), files, "v1", config, run_id="run-outside", now_s=Clock()
    )

    assert manifest.gate_at["bf16"].passed
    assert manifest.metrics["cascade"]["threshold"] is not None
