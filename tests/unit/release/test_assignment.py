"""Who answers: pure, sticky, monotone in the weight, the same in every process."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.config import StepConfig
from lifelong_ray.release import ReleaseDocument, Rollout, assign
from lifelong_ray.release.rollout import NUM_BUCKETS, _bucket
from lifelong_ray.types import RolloutError

keys = st.text(max_size=40)
weights = st.integers(0, 100)


def a_document(weight: int = 0, shadow: float = 0.0, salt: str = "salt") -> ReleaseDocument:
    return ReleaseDocument(
        stable="v1",
        rollout=Rollout(
            id="r",
            candidate="v1.1",
            steps=(StepConfig(setWeight=5),),
            step_index=0,
            weight=weight,
            shadow=shadow,
            salt=salt,
            started_at_s=0,
            step_started_at_s=0,
        ),
    )


@settings(deadline=None)
@given(keys, weights, st.floats(0, 1))
def test_assignment_is_a_function_of_document_and_key(key: str, weight: int, shadow: float) -> None:
    document = a_document(weight, shadow)
    reread = ReleaseDocument.model_validate_json(document.model_dump_json())

    assert assign(document, key) == assign(reread, key)


@settings(deadline=None)
@given(keys, weights, weights)
def test_raising_the_weight_moves_nobody_back(key: str, first: int, second: int) -> None:
    low, high = sorted((first, second))

    if assign(a_document(low), key).variant == "candidate":
        assert assign(a_document(high), key).variant == "candidate"


@settings(deadline=None)
@given(keys, st.floats(0, 1), st.floats(0, 1))
def test_raising_the_shadow_share_keeps_those_who_are_shadowed(
    key: str, first: float, second: float
) -> None:
    low, high = sorted((first, second))

    if assign(a_document(shadow=low), key).shadow:
        assert assign(a_document(shadow=high), key).shadow


@settings(deadline=None)
@given(keys)
def test_weights_of_zero_and_a_hundred_are_exact(key: str) -> None:
    assert assign(a_document(0, shadow=1.0), key).variant == "stable"
    assert assign(a_document(0, shadow=1.0), key).shadow
    assert assign(a_document(100), key).variant == "candidate"
    assert not assign(a_document(100, shadow=0.0), key).shadow


@settings(deadline=None)
@given(keys, weights, st.floats(0, 1))
def test_the_answering_version_is_that_of_the_variant(key: str, weight: int, shadow: float) -> None:
    assignment = assign(a_document(weight, shadow), key)

    assert assignment.version == {"stable": "v1", "candidate": "v1.1"}[assignment.variant]


@settings(deadline=None)
@given(keys, weights, st.sampled_from(["always", "ALWAYS", " always "]))
def test_always_gets_the_candidate_whatever_the_weight(
    key: str, weight: int, override: str
) -> None:
    assert assign(a_document(weight, shadow=0.5), key, override).variant == "candidate"


@settings(deadline=None)
@given(keys, weights, st.floats(0, 1))
def test_never_gets_stable_whatever_the_weight(key: str, weight: int, shadow: float) -> None:
    assert assign(a_document(weight, shadow), key, "never").variant == "stable"


@settings(deadline=None)
@given(keys, weights, st.text(max_size=10).filter(lambda t: t.strip().lower() not in (
    "always", "never")))  # fmt: skip
def test_any_other_override_changes_nothing(key: str, weight: int, override: str) -> None:
    document = a_document(weight, shadow=0.5)

    assert assign(document, key, override) == assign(document, key)


def test_always_waits_until_the_candidate_has_capacity() -> None:
    assert assign(a_document(weight=0, shadow=0.0), "ann", "always").variant == "stable"
    assert assign(ReleaseDocument(stable="v1"), "ann", "always").variant == "stable"


def test_shares_come_out_as_asked_and_variant_and_shadow_are_independent() -> None:
    document = a_document(weight=20, shadow=0.5)
    assignments = [assign(document, f"user-{n}") for n in range(10_000)]

    candidates = [a for a in assignments if a.variant == "candidate"]
    share = len(candidates) / len(assignments)
    shadowed = sum(a.shadow for a in assignments) / len(assignments)
    shadowed_candidates = sum(a.shadow for a in candidates) / len(candidates)

    assert share == pytest.approx(0.20, abs=0.015)
    assert shadowed == pytest.approx(0.50, abs=0.02)
    assert shadowed_candidates == pytest.approx(0.50, abs=0.04)


def test_of_a_hundred_thousand_keys_every_weight_gets_its_share_and_moves_nobody_back() -> None:
    users = [f"user-{n}" for n in range(100_000)]
    # The lowest weight at which a key gets the candidate, which is all that its hash decides.
    buckets = np.array([_bucket(b"variant", "salt", user) for user in users])
    lowest = buckets // (NUM_BUCKETS // 100) + 1

    for weight in range(101):
        document = a_document(weight, shadow=0.5)
        for user, needed in zip(users[:300], lowest[:300], strict=True):
            assert (assign(document, user).variant == "candidate") == (weight >= needed)
        chosen = int((lowest <= weight).sum())
        # Five standard deviations of a binomial share: 1 in 20,000 for all weights together.
        bound = 5 * math.sqrt(len(users) * weight / 100 * (1 - weight / 100))
        assert abs(chosen - len(users) * weight / 100) <= bound

    for weight in (0, 1, 50, 99, 100):
        document = a_document(weight, shadow=0.5)
        variants = np.array([assign(document, user).variant for user in users[:10_000]])
        assert ((variants == "candidate") == (lowest[:10_000] <= weight)).all()


def test_an_override_is_followed_by_every_key_at_every_weight() -> None:
    for weight in range(101):
        document = a_document(weight, shadow=0.5)
        for user in map(str, range(200)):
            assert assign(document, user, "always").variant == "candidate"
            assert assign(document, user, "never").variant == "stable"


def test_another_rollout_starts_with_other_users() -> None:
    first, second = (a_document(weight=10, salt=salt) for salt in ("r1", "r2"))
    users = [f"user-{n}" for n in range(5_000)]

    both = sum(assign(first, u).variant == assign(second, u).variant == "candidate" for u in users)

    assert both / len(users) == pytest.approx(0.01, abs=0.006)


def test_another_process_assigns_alike() -> None:
    code = (
        "import sys; from lifelong_ray.release import *;"
        "d = ReleaseDocument.model_validate_json(sys.argv[1]);"
        "print(''.join(assign(d, f'u{n}').variant[0] for n in range(200)))"
    )
    document = a_document(weight=50)

    elsewhere = subprocess.run(
        [sys.executable, "-c", code, document.model_dump_json()],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()

    assert elsewhere == "".join(assign(document, f"u{n}").variant[0] for n in range(200))


def test_without_a_release_there_is_nobody_to_answer() -> None:
    with pytest.raises(RolloutError, match="no version is released yet"):
        assign(ReleaseDocument(), "ann")
