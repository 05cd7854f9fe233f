"""The sections of the report on releases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import table
from report_parts import number, sections

_RELEASE = """## Releases under load

Requests to a tiny model in an open loop, at a share of the capacity found before, while versions
are promoted and rolled back, and while the slot of a shadow is stopped with a signal. Every answer
is checked to be of one version: its class, version and request id agree. Percentiles of `steady`
are of the stretches between changes in the same run.
"""
_EVIDENCE = """## False decisions of a rollout

Simulated rollouts of known truth under the default settings, judged after every label, as the
controller judges them at every look. A false decision promotes a candidate that loses the margin or
more, or takes back one that does not; its share is to stay below alpha, however often one looks.
Agreement is the share of requests on which both versions are right or both wrong. The median is
that of the labels, or corrections, after which half of the streams had decided.
"""


def release_sections(results: Path) -> Iterator[str]:
    """One section for each result that is there."""
    for _, _, text in sections(results, _SECTIONS):
        yield text


def _release(report: dict[str, Any]) -> str:
    changes, stall = report["changes"], report["stalled_shadow"]
    rows = [
        ["promotions", changes["promotions"], number(changes["p99_promotion_ms"], 1)],
        ["rollbacks", changes["rollbacks"], number(changes["p99_rollback_ms"], 1)],
        ["steady, between them", "-", number(changes["p99_steady_ms"], 1)],
        [
            "shadow's slot stalled",
            len(stall["dropped_copies"]),
            number(stall["p99_stalled_ms"], 1),
        ],
        ["alone, between stalls", "-", number(stall["p99_alone_ms"], 1)],
    ]
    steady = changes["stretches_p99_ms"]["steady"]
    requests, failed = (changes[key] + stall[key] for key in ("requests", "failed"))
    return "\n\n".join(
        [
            table(("stretches", "number", "p99, ms"), rows),
            f"Of {requests:,} requests {failed:,} failed or were answered inconsistently. From the "
            f"wish until the front followed, a promotion took {changes['promotion_s']:.1f} s and a "
            f"rollback {changes['rollback_s']:.1f} s. p99 around promotions was "
            f"{changes['p99_promotion_over_steady']:.2f} times, around rollbacks "
            f"{changes['p99_rollback_over_steady']:.2f} times that between changes, and "
            f"{stall['p99_stalled_over_alone']:.2f} times while the slot stalled. At "
            f"{changes['requests_per_s']:,.0f} requests/s on a machine that the client shares, p99 "
            f"of single steady stretches goes from {min(steady):.0f} to {max(steady):.0f} ms, so "
            "that a difference smaller than this is not shown. One machine: changes over several "
            "nodes were not measured.",
        ]
    )


def _evidence(report: dict[str, Any]) -> str:
    columns = ("evidence", "candidate", "agreement", "promoted", "aborted", "undecided")
    rows = _evidence_rows(report)
    worst = max(report["outcomes"], key=lambda one: float(one[one["is_false"]]))
    waits = max(report["outcomes"], key=lambda one: one["undecided"] * (one["truth"] == "equal"))
    setup = report["setup"]
    return "\n\n".join(
        [
            table((*columns, "median labels"), rows),
            f"Bold are the false decisions: at most {worst[worst['is_false']]:.3f}, of an alpha of "
            f"{setup['alpha']:g}. The price is time: of equal versions with an agreement of "
            f"{waits['agreement']:g}, {100 * waits['undecided']:.0f} % were undecided after "
            f"{setup['max_labels']:,} labels. Simulated labels are right and come at once; real "
            "ones do neither, and a rollout without enough of them waits.",
        ]
    )


def _evidence_rows(report: dict[str, Any]) -> list[list[object]]:
    return [
        [
            one["evidence"],
            one["truth"],
            "" if one["agreement"] is None else f"{one['agreement']:.2f}",
            *(
                f"**{one[kind]:.3f}**" if one["is_false"] == kind else f"{one[kind]:.3f}"
                for kind in ("promoted", "aborted", "undecided")
            ),
            "-" if one["median_labels"] is None else f"{one['median_labels']:,.0f}",
        ]
        for one in report["outcomes"]
    ]


_SECTIONS = (
    ("release_load", _RELEASE, _release),
    ("release_evidence", _EVIDENCE, _evidence),
)
