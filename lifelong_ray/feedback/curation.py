"""From raw labels to examples that may be trained on, and to the hold-out.

A user's label is a vote; an operator's or an import's is trusted. Nothing a user sends can
reach the hold-out, and no image of the hold-out is trained on. Pure: takes rows and images,
gives examples, and accounts for every row.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lifelong_ray.config import FeedbackConfig
from lifelong_ray.types import Example, Feedback, Pixels, Prediction

DropReason = Literal[
    "repeated_row",
    "empty_label",
    "unknown_request",
    "missing_image",
    "blank_image",
    "known_broken",
    "user_cap",
    "superseded",
    "conflict",
    "overruled",
    "holdout_image",
    "too_few_votes",
    "already_used",
    "merged",
]


@dataclass(frozen=True)
class Curation:
    """What an update may use.

    One example stands for one row; the rest of the rows are in `dropped`, so the three
    always add up to the rows that came in.

    Attributes:
        training: Examples to train on, sorted by content hash.
        holdout: Trusted examples that are never trained on, sorted by content hash.
        dropped: Rows left out, by reason: ``repeated_row`` (same feedback id twice),
            ``empty_label``, ``unknown_request`` (no such prediction in the log),
            ``missing_image``, ``blank_image`` (one constant value), ``known_broken``,
            ``user_cap``, ``superseded`` (the same person said something later),
            ``conflict`` (labels of equal standing differ), ``overruled`` (a trusted label
            differs), ``holdout_image`` (a vote on a hold-out image), ``too_few_votes``,
            ``already_used`` (an earlier version learned it), ``merged`` (another row with
            the same image and label stands for it).
    """

    training: tuple[Example, ...]
    holdout: tuple[Example, ...]
    dropped: Mapping[str, int]


def is_holdout(content_hash: str, share: float) -> bool:
    """Tell whether an image belongs to the hold-out once its label is trusted.

    A function of the pixels alone, so that every version agrees.

    >>> is_holdout("ab", 0.0), is_holdout("ab", 1.0)
    (False, True)
    """
    digest = hashlib.sha256(b"holdout:" + content_hash.encode()).digest()
    return int.from_bytes(digest[:6], "big") < share * 2**48


def curate(
    predictions: Iterable[Prediction],
    feedback: Sequence[Feedback],
    images: Mapping[str, Pixels],
    used: Collection[tuple[str, str]],
    config: FeedbackConfig,
    known_broken: Collection[str] = (),
) -> Curation:
    """Clean the labels of a snapshot. The order of the rows does not matter.

    Args:
        predictions: Answers, to find the image a vote is about.
        feedback: All label rows of the snapshot, those already learned included: old votes
            still count where new ones contradict them.
        images: Pixels by content hash.
        used: (content hash, label) of everything that earlier versions were trained on. An
            image in it stays out of the hold-out even if its label is trusted later.
        config: Hold-out share, votes needed, rows per user.
        known_broken: Content hashes never to use again, such as withdrawn images.
    """
    hash_of = {row.request_id: row.content_hash for row in predictions}
    dropped: Counter[str] = Counter()
    used = frozenset(used)
    trained = {name for name, _ in used}
    broken = frozenset(known_broken)

    by_image: dict[str, list[Feedback]] = defaultdict(list)
    seen_ids: set[str] = set()
    new_rows_of: Counter[str] = Counter()
    for row in sorted(feedback, key=_age):
        is_vote = row.kind == "feedback"
        name = hash_of.get(row.request_id, "") if is_vote else row.content_hash
        reason = _unusable(row, name, images, broken)
        if row.feedback_id in seen_ids:
            reason = "repeated_row"
        seen_ids.add(row.feedback_id)
        if reason is None and is_vote and (name, row.label) not in used:
            new_rows_of[row.user] += 1
            if new_rows_of[row.user] > config.max_votes_per_user:
                reason = "user_cap"
        if reason is not None:
            dropped[reason] += 1
        else:
            by_image[name].append(row)

    training: list[Example] = []
    holdout: list[Example] = []
    for name in sorted(by_image):
        if not images[name].size or (images[name] == images[name][0, 0]).all():
            dropped["blank_image"] += len(by_image[name])
            continue
        rows = _latest_of_each(by_image[name], dropped)
        agreed = _agreed(rows, dropped, config.votes_needed)
        if not agreed:
            continue
        kept = agreed[-1]
        source = [row for row in agreed if row.kind != "feedback"] or agreed
        audit = any(row.audit for row in source)
        example = Example(name, kept.label, images[name], kept.kind, audit)
        trusted = kept.kind != "feedback"
        if trusted and is_holdout(name, config.holdout_share) and name not in trained:
            votes = len(agreed) - len(source)
            dropped["holdout_image"] += votes
            dropped["merged"] += len(source) - 1
            holdout.append(example)
        elif (name, kept.label) in used:
            dropped["already_used"] += len(agreed)
        else:
            dropped["merged"] += len(agreed) - 1
            training.append(example)
    return Curation(
        tuple(training), tuple(holdout), {k: n for k, n in sorted(dropped.items()) if n}
    )


def _age(row: Feedback) -> tuple[float, str]:
    return row.at_s, row.feedback_id


def _unusable(
    row: Feedback, name: str, images: Mapping[str, Pixels], broken: frozenset[str]
) -> DropReason | None:
    if not row.label.strip():
        return "empty_label"
    if row.kind == "feedback" and not name:
        return "unknown_request"
    if name in broken:
        return "known_broken"
    if name not in images:
        return "missing_image"
    return None


def _latest_of_each(rows: list[Feedback], dropped: Counter[str]) -> list[Feedback]:
    """Keep the last word of every person; nameless votes are not known to be one person's."""
    last: dict[tuple[str, str], Feedback] = {}
    for row in rows:
        if row.kind != "feedback":
            who = ("trusted", row.user)
        else:
            who = ("user", row.user) if row.user else ("nameless", row.feedback_id)
        if who in last:
            dropped["superseded"] += 1
        last[who] = row
    return sorted(last.values(), key=_age)


def _agreed(rows: list[Feedback], dropped: Counter[str], votes_needed: int) -> list[Feedback]:
    """Rows that share the one label of an image, a trusted one last; [] if there is none."""
    trusted = [row for row in rows if row.kind != "feedback"]
    votes = [row for row in rows if row.kind == "feedback"]
    if len({row.label for row in trusted or votes}) > 1:
        dropped["conflict"] += len(rows)
        return []
    if not trusted:
        voters = len({row.user for row in votes})
        if voters < votes_needed:
            dropped["too_few_votes"] += len(rows)
            return []
        return votes
    agreeing = [row for row in votes if row.label == trusted[0].label]
    dropped["overruled"] += len(votes) - len(agreeing)
    return agreeing + trusted
