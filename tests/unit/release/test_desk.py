"""The desk: one document, many writers, no change without its record."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from lifelong_ray.config import RolloutConfig
from lifelong_ray.release import (
    GateReport,
    Intent,
    Manifest,
    Observation,
    Pairs,
    Registry,
    ReleaseDesk,
    ReleaseDocument,
    advance,
)
from lifelong_ray.types import (
    ConflictError,
    GateRefusedError,
    NotFoundError,
    RolloutError,
    VersionError,
)
from tests.fakes import MemoryStore

NOTHING_SEEN = Observation(now_s=100.0, fronts=(), pairs=Pairs(), slot_ready=False)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def a_desk(store: MemoryStore, clock: Clock | None = None) -> ReleaseDesk:
    return ReleaseDesk(store, clock or Clock(), sleep=lambda _: None)


def register(store: MemoryStore, version: str, *, passed: bool | None = True) -> None:
    gate = None if passed is None else GateReport(passed=passed, checks=(), num_examples=0)
    Registry(store).register(
        Manifest(
            version=version,
            kind="base",
            path="base",
            class_names=("a",),
            created_at_s=0.0,
            run_id="run",
            gate=gate,
        ),
        {"model": b"x"},
    )


def a_store() -> MemoryStore:
    """A store whose stable version is v1 and which has a gated v2 and a refused v3."""
    store = MemoryStore()
    register(store, "v1")
    register(store, "v2")
    register(store, "v3", passed=False)
    a_desk(store).create_if_missing("v1", "trainer")
    return store


def a_start(candidate: str = "v2", *, intent_id: str = "i1", force: bool = False) -> Intent:
    return Intent(
        id=intent_id, verb="start", actor="ann", at_s=1.0, candidate=candidate, force=force
    )


def a_wish(verb: str, intent_id: str = "w1") -> Intent:
    return Intent.model_validate({"id": intent_id, "verb": verb, "actor": "ann", "at_s": 1.0})


def an_experiment(*versions: str, intent_id: str = "e1") -> Intent:
    arms = [{"version": version, "weight": 100 // len(versions)} for version in versions]
    return Intent.model_validate(
        {"id": intent_id, "verb": "start_experiment", "actor": "ann", "at_s": 1.0}
        | {"experiment": {"arms": arms, "end_s": 1e12}}
    )


def tick(desk: ReleaseDesk) -> ReleaseDocument:
    """One look of a controller that sees nothing."""
    document, tag = desk.read()
    document, _ = advance(document, NOTHING_SEEN, RolloutConfig())
    desk.swap(document, tag)
    return desk.read()[0]


# ---------------------------------------------------------------- creation


def test_before_the_first_release_the_document_is_empty() -> None:
    assert a_desk(MemoryStore()).read() == (ReleaseDocument(), None)


def test_the_first_gated_version_becomes_stable_on_the_record() -> None:
    store = MemoryStore()
    register(store, "v1")

    a_desk(store).create_if_missing("v1", "trainer")

    document, _ = a_desk(store).read()
    assert (document.stable, document.previous, document.seq) == ("v1", None, 1)
    [event] = a_desk(store).audit_trail()
    assert (event.what, event.who, event.from_version, event.to_version) == (
        "created",
        "trainer",
        None,
        "v1",
    )


@pytest.mark.parametrize("passed", [False, None])
def test_a_version_without_a_passed_gate_cannot_be_the_first(passed: bool | None) -> None:
    store = MemoryStore()
    register(store, "v1", passed=passed)

    with pytest.raises(GateRefusedError, match="v1 has not passed the gate"):
        a_desk(store).create_if_missing("v1", "trainer")

    assert a_desk(store).read() == (ReleaseDocument(), None)


def test_creating_again_changes_nothing() -> None:
    store = a_store()
    before = dict(store.objects)

    a_desk(store).create_if_missing("v2", "somebody else")

    assert store.objects == before


def test_of_many_first_versions_one_wins() -> None:
    store = MemoryStore()
    for number in range(1, 9):
        register(store, f"v{number}")

    with ThreadPoolExecutor(8) as threads:
        documents = list(
            threads.map(lambda n: a_desk(store).create_if_missing(f"v{n}", "t"), range(1, 9))
        )

    assert len({document.stable for document in documents}) == 1
    assert len(a_desk(store).audit_trail()) == 1


# ---------------------------------------------------------------- intents


def test_a_wish_lies_in_the_document_until_a_controller_handles_it() -> None:
    store = a_store()

    a_desk(store).request(a_start())
    waiting, _ = a_desk(store).read()
    handled = tick(a_desk(store))

    assert [intent.id for intent in waiting.intents] == ["i1"]
    assert handled.intents == ()
    assert handled.rollout is not None
    assert handled.rollout.candidate == "v2"


def test_asking_twice_with_one_id_is_asking_once() -> None:
    store = a_store()
    desk = a_desk(store)

    desk.request(a_start())
    desk.request(a_start())
    waiting, _ = desk.read()
    tick(desk)
    desk.request(a_start())
    after, _ = desk.read()

    assert len(waiting.intents) == 1
    assert after.intents == ()


def test_no_wish_is_lost_among_concurrent_writers() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())
    tick(desk)
    wishes = [a_wish("pause" if n % 2 else "resume", f"w{n}") for n in range(24)]

    def ask(wish: Intent) -> bool:
        try:
            a_desk(store).request(wish)
        except RolloutError:  # refused because of those before it, which is an answer too
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        accepted = [
            wish.id for wish, ok in zip(wishes, threads.map(ask, wishes), strict=True) if ok
        ]
        for _ in range(10):
            try:
                tick(desk)
            except ConflictError:
                continue
    final = tick(desk)

    assert accepted
    assert set(accepted) <= set(final.handled)
    assert "refused" not in {event.what for event in desk.audit_trail()}


@pytest.mark.parametrize(
    ("intent", "error", "message"),
    [
        (a_start("v9"), VersionError, "there is no version 'v9'"),
        (a_start("v3"), GateRefusedError, "v3 has not passed the gate"),
        (a_start("v1"), RolloutError, "v1 is stable already"),
        (a_wish("rollback"), RolloutError, "no version before v1 to roll back to"),
        (a_wish("abort"), RolloutError, "no rollout is in progress"),
        (a_wish("promote"), RolloutError, "nothing to promote"),
        (an_experiment("v1", "v9"), VersionError, "there is no version 'v9'"),
        (an_experiment("v1", "v3"), GateRefusedError, "v3 has not passed the gate"),
        (an_experiment("v2", "v2.1"), VersionError, "there is no version 'v2.1'"),
        (a_wish("end_experiment"), RolloutError, "nothing to end"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused_at_once(
    intent: Intent, error: type[Exception], message: str
) -> None:
    store = a_store()
    before = store.read("current.json")

    with pytest.raises(error, match=message):
        a_desk(store).request(intent)

    assert store.read("current.json") == before


def test_a_forced_start_needs_no_gate_and_is_marked() -> None:
    store = a_store()

    a_desk(store).request(a_start("v3", force=True))
    document = tick(a_desk(store))

    assert document.rollout is not None
    assert document.rollout.forced
    assert a_desk(store).audit_trail()[-1].why == "rollout asked without a passed gate"


def test_an_experiment_and_a_rollout_refuse_each_other_while_one_of_them_waits() -> None:
    desk = a_desk(a_store())
    desk.request(an_experiment("v1", "v2"))

    with pytest.raises(RolloutError, match="is under way; end it before v2"):
        desk.request(a_start("v2"))

    desk.request(a_wish("end_experiment"))
    desk.request(a_start("v2"))
    document = tick(desk)
    assert (document.experiment, document.rollout is None) == (None, False)
    with pytest.raises(RolloutError, match="the rollout of v2 is in progress"):
        desk.request(an_experiment("v1", "v2", intent_id="e2"))


def test_the_record_of_an_experiment_has_its_history_and_how_it_ended() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(an_experiment("v1", "v2"))
    tick(desk)
    desk.request(a_wish("end_experiment"))
    tick(desk)

    record = json.loads(store.read("experiments/experiment-e1.json"))

    assert [row["what"] for row in record["history"]] == ["experiment_started", "experiment_ended"]
    ended = desk.experiment("experiment-e1")
    assert (ended.ended_by, ended.ended_why) == ("ann", "asked")
    assert ended.result is not None
    assert [event.what for event in desk.audit_trail()][-1] == "experiment_ended"
    with pytest.raises(NotFoundError, match="never an experiment"):
        desk.experiment("../current")


def test_a_second_start_is_refused_while_the_first_waits_or_runs() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())

    with pytest.raises(RolloutError, match="the rollout of v2 is in progress"):
        desk.request(a_start(intent_id="i2"))
    tick(desk)
    with pytest.raises(RolloutError, match="the rollout of v2 is in progress"):
        desk.request(a_start(intent_id="i2"))


def test_a_start_may_follow_an_abort_that_still_waits() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())
    tick(desk)

    desk.request(a_wish("abort"))
    desk.request(a_start(intent_id="i2"))
    document = tick(desk)

    assert document.rollout is not None
    assert document.rollout.id == "v2-i2"


def test_without_a_release_wishes_are_answered_with_what_to_do_first() -> None:
    with pytest.raises(RolloutError, match="train and release a base version first"):
        a_desk(MemoryStore()).request(a_wish("rollback"))


def test_too_many_waiting_wishes_ask_for_the_controller() -> None:
    store = a_store()
    desk = a_desk(store)
    document, tag = desk.read()
    desk.swap(document.changed(intents=(a_wish("abort"),) * 50), tag)

    with pytest.raises(RolloutError, match="50 intents wait already; is the controller running"):
        desk.request(a_start())


@pytest.mark.parametrize(
    "fields",
    [
        {"verb": "start"},
        {"verb": "abort", "candidate": "v2"},
        {"verb": "abort", "force": True},
        {"verb": "explode"},
        {"verb": "abort", "id": "../x"},
        {"verb": "abort", "actor": ""},
    ],
)
def test_a_malformed_wish_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Intent.model_validate({"actor": "ann", "at_s": 1.0} | fields)


# ---------------------------------------------------------------- swap and audit


def test_a_writer_that_is_late_loses() -> None:
    store = a_store()
    document, tag = a_desk(store).read()
    a_desk(store).swap(document, tag)

    with pytest.raises(ConflictError):
        a_desk(store).swap(document.changed(stable="v2"), tag)


def test_a_document_that_returns_to_earlier_values_still_invalidates_earlier_tags() -> None:
    store = a_store()
    desk = a_desk(store)
    document, first_tag = desk.read()

    tag = desk.swap(document.changed(message="x"), first_tag)
    desk.swap(desk.read()[0].changed(message=""), tag)

    with pytest.raises(ConflictError):
        desk.swap(document, first_tag)


def test_a_client_that_repeats_its_own_successful_write_has_won() -> None:
    class RepeatingStore(MemoryStore):
        """Repeats every swap, as a client does that did not hear of its success."""

        def swap(self, key: str, data: bytes, expected: str | None) -> str:
            super().swap(key, data, expected)
            return super().swap(key, data, expected)

    store = RepeatingStore()
    register(store, "v1")

    a_desk(store).create_if_missing("v1", "trainer")

    assert a_desk(store).read()[0].stable == "v1"
    assert len(a_desk(store).audit_trail()) == 1


def test_every_change_is_one_audit_record_without_gaps() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())
    tick(desk)
    desk.request(a_wish("abort"))
    tick(desk)

    assert store.list("audit/") == [f"audit/{n:09d}.json" for n in (1, 2, 3)]
    assert [event.what for event in desk.audit_trail()] == ["created", "started", "aborted"]
    assert [event.what for event in desk.audit_trail(last=1)] == ["aborted"]


def test_audit_records_are_never_overwritten() -> None:
    store = a_store()
    desk = a_desk(store)
    [event] = desk.audit_trail()
    before = store.read("audit/000000001.json")

    desk.write_audit(event.model_copy(update={"who": "mallory"}))

    assert store.read("audit/000000001.json") == before


def test_a_writer_that_dies_before_its_audit_has_it_written_by_the_next() -> None:
    class DyingStore(MemoryStore):
        dying = False

        def put_new(self, key: str, data: bytes) -> None:
            if self.dying and key.startswith("audit/"):
                raise KeyboardInterrupt
            super().put_new(key, data)

    store = DyingStore()
    store.objects = a_store().objects
    a_desk(store).request(a_start())
    store.dying = True
    with pytest.raises(KeyboardInterrupt):
        tick(a_desk(store))
    store.dying = False
    assert [event.what for event in a_desk(store).audit_trail()] == ["created"]

    a_desk(store).request(a_wish("abort"))

    assert [event.what for event in a_desk(store).audit_trail()] == ["created", "started"]


def test_a_change_that_lost_the_race_leaves_no_audit() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())
    document, tag = desk.read()
    loser, _ = advance(document, NOTHING_SEEN, RolloutConfig())
    a_desk(store).swap(document.changed(message="first"), tag)

    with pytest.raises(ConflictError):
        desk.swap(loser, tag)

    assert [event.what for event in desk.audit_trail()] == ["created"]


def test_the_outbox_is_emptied_once_it_was_written() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())

    document = tick(desk)
    following = tick(desk)

    assert [event.what for event in document.outbox] == ["started"]
    assert following.outbox == ()


def test_the_record_of_a_rollout_has_its_history_and_how_it_ended() -> None:
    store = a_store()
    desk = a_desk(store)
    desk.request(a_start())
    tick(desk)
    desk.request(a_wish("abort"))
    tick(a_desk(store))

    record = json.loads(store.read("rollouts/v2-i1.json"))

    assert record["rollout"]["phase"] == "Degraded"
    assert [event["what"] for event in record["history"]] == ["started", "aborted"]


def test_a_document_of_another_kind_is_refused_by_name() -> None:
    store = MemoryStore()
    store.put_new("current.json", b'{"stable": "v1", "colour": "red"}')

    with pytest.raises(RolloutError, match=r"current\.json in memory:// is not a release document"):
        a_desk(store).read()


# ---------------------------------------------------------------- lease


def test_one_controller_holds_the_lease_until_it_falls_silent() -> None:
    store, clock = a_store(), Clock()
    desk = a_desk(store, clock)
    document, tag = desk.read()

    held = desk.with_lease(document, "one", 10.0)
    assert held is not None
    desk.swap(held, tag)
    document, _ = desk.read()

    assert desk.with_lease(document, "two", 10.0) is None
    clock.now_s += 10
    taken = desk.with_lease(document, "two", 10.0)
    assert taken is not None
    assert taken.lease is not None
    assert taken.lease.holder == "two"


def test_a_fresh_lease_is_not_written_again() -> None:
    clock = Clock()
    desk = a_desk(a_store(), clock)
    held = desk.with_lease(desk.read()[0], "one", 10.0)
    assert held is not None

    assert desk.with_lease(held, "one", 10.0) is held
    clock.now_s += 6
    renewed = desk.with_lease(held, "one", 10.0)

    assert renewed is not None
    assert renewed.lease is not None
    assert renewed.lease.expires_at_s == 116.0


def test_of_two_controllers_that_take_a_free_lease_one_wins() -> None:
    desk = a_desk(a_store())
    document, tag = desk.read()
    first, second = (desk.with_lease(document, name, 10.0) for name in ("one", "two"))
    assert first is not None
    assert second is not None

    desk.swap(first, tag)

    with pytest.raises(ConflictError):
        desk.swap(second, tag)


def test_a_lease_alone_asks_no_front_to_acknowledge() -> None:
    desk = a_desk(a_store())
    document, tag = desk.read()
    held = desk.with_lease(document, "one", 10.0)
    assert held is not None

    desk.swap(held, tag)

    assert desk.read()[0].seq == document.seq


# ---------------------------------------------------------------- what could not be read back


@pytest.mark.parametrize(
    "changes",
    [{"stable": "\ud800"}, {"seq": "many"}, {"lease": {"holder": "c"}}],
    ids=["surrogate", "word", "half a lease"],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_document_that_could_not_be_read_back_is_never_stored(changes: dict[str, object]) -> None:
    desk = a_desk(a_store())
    before, tag = desk.read()

    with pytest.raises(RolloutError, match="could not be read back, so it is not stored"):
        desk.swap(before.changed(**changes), tag)

    assert desk.read() == (before, tag)


def test_an_endless_pause_is_no_step_of_an_intent() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Intent.model_validate(
            {"verb": "start", "actor": "ann", "at_s": 1.0, "candidate": "v2"}
            | {"steps": [{"pause": float("inf")}]}
        )


def test_a_time_of_an_intent_is_finite() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Intent(verb="abort", actor="ann", at_s=float("nan"))
