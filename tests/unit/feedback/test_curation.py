"""Labels become examples only when they may, and every row is accounted for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.config import FeedbackConfig
from lifelong_ray.feedback import Curation, curate, is_holdout
from lifelong_ray.types import Feedback, FeedbackKind, Pixels, Prediction

CONFIG = FeedbackConfig(holdout_share=0.5)
NAMES = [f"image-{n}" for n in range(8)]
HELD = next(name for name in NAMES if is_holdout(name, 0.5))
FREE = next(name for name in NAMES if not is_holdout(name, 0.5))
PIXELS: Pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
BLANK: Pixels = np.full((2, 2, 3), (1, 2, 3), np.uint8)
IMAGES = dict.fromkeys(NAMES, PIXELS)
PREDICTIONS = [
    Prediction(f"ask-{name}-{n}", 0.0, name, "cat", (), (), "v1", "stable", "", 1.0, False, 0.0)
    for name in NAMES
    for n in range(2)
]


def vote(n: int, name: str, label: str, user: str = "", request: int = 0) -> Feedback:
    return Feedback(f"f{n}", float(n), "feedback", label, f"ask-{name}-{request}", "", user, False)


def trusted(
    n: int, name: str, label: str, kind: FeedbackKind = "example", user: str = "op"
) -> Feedback:
    return Feedback(f"f{n}", float(n), kind, label, "", name, user, False)


def curated(
    *rows: Feedback,
    used: frozenset[tuple[str, str]] = frozenset(),
    images: dict[str, Pixels] = IMAGES,
    known_broken: frozenset[str] = frozenset(),
    **settings: float,
) -> Curation:
    config = CONFIG.model_copy(update=settings)
    return curate(PREDICTIONS, rows, images, used, config, known_broken)


def labels(examples: tuple[object, ...]) -> list[tuple[str, str]]:
    return [(e.content_hash, e.label) for e in examples]  # type: ignore[attr-defined]  # of any curation


def test_a_vote_becomes_a_training_example() -> None:
    result = curated(vote(1, HELD, "dog"))

    (example,) = result.training
    assert (example.content_hash, example.label, example.kind) == (HELD, "dog", "feedback")
    assert not result.holdout
    assert not result.dropped


def test_trusted_labels_are_split_by_the_image_alone() -> None:
    result = curated(trusted(1, HELD, "dog"), trusted(2, FREE, "dog", "import"))

    assert labels(result.holdout) == [(HELD, "dog")]
    assert labels(result.training) == [(FREE, "dog")]


def test_a_vote_on_a_held_out_image_is_never_trained_on() -> None:
    result = curated(vote(1, HELD, "dog"), trusted(2, HELD, "dog"), vote(3, HELD, "cat"))

    assert not result.training
    assert labels(result.holdout) == [(HELD, "dog")]
    assert result.dropped == {"holdout_image": 1, "overruled": 1}


def test_an_image_that_was_trained_on_stays_out_of_the_holdout() -> None:
    used = frozenset({(HELD, "dog")})

    same = curated(vote(1, HELD, "dog"), trusted(2, HELD, "dog"), used=used)
    corrected = curated(vote(1, HELD, "dog"), trusted(2, HELD, "cat"), used=used)

    assert same.dropped == {"already_used": 2}
    assert not same.holdout
    assert not corrected.holdout
    assert labels(corrected.training) == [(HELD, "cat")]


def test_what_was_learned_is_not_learned_again_but_the_holdout_stays() -> None:
    used = frozenset({(FREE, "dog")})

    result = curated(trusted(1, FREE, "dog"), trusted(2, HELD, "cat"), used=used)

    assert not result.training
    assert labels(result.holdout) == [(HELD, "cat")]
    assert result.dropped == {"already_used": 1}


def test_votes_that_contradict_each_other_are_dropped() -> None:
    result = curated(vote(1, FREE, "dog", "ada"), vote(2, FREE, "cat", "bob", request=1))

    assert not result.training
    assert result.dropped == {"conflict": 2}


def test_the_last_word_of_a_person_counts() -> None:
    result = curated(vote(1, FREE, "dog", "ada"), vote(2, FREE, "cat", "ada"))

    assert labels(result.training) == [(FREE, "cat")]
    assert result.dropped == {"superseded": 1}


def test_nameless_votes_do_not_correct_one_another() -> None:
    assert curated(vote(1, FREE, "dog"), vote(2, FREE, "cat")).dropped == {"conflict": 2}


def test_a_trusted_label_wins_over_any_number_of_votes() -> None:
    votes = [vote(n, FREE, "dog", f"user-{n}") for n in range(5)]

    result = curated(*votes, trusted(9, FREE, "cat"))

    assert labels(result.training) == [(FREE, "cat")]
    assert result.training[0].kind == "example"
    assert result.dropped == {"overruled": 5}


def test_operators_who_disagree_settle_nothing() -> None:
    result = curated(trusted(1, FREE, "dog", user="a"), trusted(2, FREE, "cat", user="b"))

    assert result.dropped == {"conflict": 2}


def test_votes_must_come_from_enough_different_people() -> None:
    one = curated(vote(1, FREE, "dog", "ada"), vote(2, FREE, "dog", "ada", 1), votes_needed=2)
    two = curated(vote(1, FREE, "dog", "ada"), vote(2, FREE, "dog", "bob"), votes_needed=2)
    nameless = curated(vote(1, FREE, "dog"), vote(2, FREE, "dog"), votes_needed=2)

    assert one.dropped == {"superseded": 1, "too_few_votes": 1}
    assert labels(two.training) == [(FREE, "dog")]
    assert two.dropped == {"merged": 1}
    assert nameless.dropped == {"too_few_votes": 2}


def test_a_flood_by_one_person_is_capped_oldest_first() -> None:
    flood = [vote(n, name, "dog", "ada") for n, name in enumerate(NAMES)]

    result = curated(*flood, vote(100, NAMES[-1], "dog", "bob"), max_votes_per_user=3)

    assert labels(result.training) == sorted((name, "dog") for name in [*NAMES[:3], NAMES[-1]])
    assert result.dropped == {"user_cap": len(NAMES) - 3}


def test_what_was_learned_before_does_not_count_against_the_cap() -> None:
    used = frozenset((name, "dog") for name in NAMES[:3])
    votes = [vote(n, name, "dog", "ada") for n, name in enumerate(NAMES[:4])]

    result = curated(*votes, used=used, max_votes_per_user=1)

    assert labels(result.training) == [(NAMES[3], "dog")]


def test_unusable_rows_are_counted_by_reason() -> None:
    images = {**IMAGES, FREE: BLANK}
    del images[HELD]
    broken = next(name for name in NAMES if name not in {FREE, HELD})

    result = curated(
        vote(1, "never-asked", "dog"),
        vote(2, HELD, "dog"),
        vote(3, FREE, "dog"),
        vote(4, broken, "dog"),
        trusted(5, "", "dog"),
        vote(6, FREE, " "),
        vote(3, FREE, "dog"),
        images=images,
        known_broken=frozenset({broken}),
    )

    assert result.dropped == {
        "blank_image": 1,
        "empty_label": 1,
        "known_broken": 1,
        "missing_image": 2,
        "repeated_row": 1,
        "unknown_request": 1,
    }


def test_the_audit_flag_of_any_agreeing_vote_is_kept() -> None:
    flagged = Feedback("f9", 0.0, "feedback", "dog", f"ask-{FREE}-1", "", "bob", True)

    (example,) = curated(flagged, vote(1, FREE, "dog", "ada")).training

    assert example.audit


def test_the_holdout_share_is_about_what_was_asked_for() -> None:
    share = sum(is_holdout(f"{n:064x}", 0.2) for n in range(5_000)) / 5_000

    assert abs(share - 0.2) < 0.03


ROWS = st.lists(
    st.builds(
        Feedback,
        feedback_id=st.integers(0, 60).map(str),
        at_s=st.integers(0, 5).map(float),
        kind=st.sampled_from(["feedback", "feedback", "example", "import"]),
        label=st.sampled_from(["cat", "dog", ""]),
        request_id=st.sampled_from([*(p.request_id for p in PREDICTIONS), "unknown"]),
        content_hash=st.sampled_from([*NAMES, "absent"]),
        user=st.sampled_from(["", "ada", "bob"]),
        audit=st.booleans(),
    ),
    max_size=40,
)
USED = st.frozensets(st.tuples(st.sampled_from(NAMES), st.sampled_from(["cat", "dog"])), max_size=5)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, used=USED, votes_needed=st.integers(1, 2), cap=st.integers(1, 5))
def test_every_row_is_accounted_for_and_the_invariants_hold(
    rows: list[Feedback], used: frozenset[tuple[str, str]], votes_needed: int, cap: int
) -> None:
    images = {**IMAGES, NAMES[0]: BLANK}

    result = curated(
        *rows, used=used, images=images, votes_needed=votes_needed, max_votes_per_user=cap
    )

    training, holdout = labels(result.training), labels(result.holdout)
    assert len(training) + len(holdout) + sum(result.dropped.values()) == len(rows)
    assert not {name for name, _ in training} & {name for name, _ in holdout}
    assert not set(training) & used
    assert not {name for name, _ in holdout} & {name for name, _ in used}
    assert all(e.kind != "feedback" and is_holdout(e.content_hash, 0.5) for e in result.holdout)
    without_votes = curated(*(r for r in rows if r.kind != "feedback"), used=used, images=images)
    if len({r.feedback_id for r in rows}) == len(rows):
        assert labels(without_votes.holdout) == holdout, "votes changed the hold-out"


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, data=st.data())
def test_the_order_of_the_rows_does_not_matter(rows: list[Feedback], data: st.DataObject) -> None:
    unique = list({row.feedback_id: row for row in rows}.values())
    shuffled = data.draw(st.permutations(unique))

    first, second = curated(*unique), curated(*shuffled)

    assert labels(first.training) == labels(second.training)
    assert labels(first.holdout) == labels(second.holdout)
    assert first.dropped == second.dropped
