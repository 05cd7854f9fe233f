"""Versions and their release: registry, gate, evidence, and the decisions of a rollout.

Pure decisions over frozen records, and two thin classes that keep the records in a store:
`Registry` for versions, `ReleaseDesk` for the release document. Knows nothing of models,
HTTP or Ray.
"""

from lifelong_ray.release.comparisons import (
    ComparisonSummary,
    LabelledPairs,
    ModelLatency,
    summarise_comparisons,
)
from lifelong_ray.release.corrections import (
    Corrections,
    CorrectionVerdict,
    count_corrections,
    judge_corrections,
)
from lifelong_ray.release.desk import DOCUMENT_KEY, ReleaseDesk
from lifelong_ray.release.document import (
    Event,
    Intent,
    Lease,
    Phase,
    ReleaseDocument,
    Rollout,
    Verb,
)
from lifelong_ray.release.evidence import (
    Interval,
    Pairs,
    Verdict,
    confidence_sequence,
    count_pairs,
    e_inferior,
    e_not_inferior,
    judge_evidence,
)
from lifelong_ray.release.experiment import (
    Arm,
    ArmTally,
    Experiment,
    ExperimentPlan,
    ExperimentResult,
    choose_arm,
    thompson_weights,
)
from lifelong_ray.release.fronts import (
    LATENCY_BOUNDS_MS,
    Counter,
    FrontReport,
    Split,
    latency_quantile_ms,
)
from lifelong_ray.release.gate import Check, GateReport, judge_base, judge_update, refused
from lifelong_ray.release.registry import Manifest, Registry
from lifelong_ray.release.rollout import (
    Assignment,
    Observation,
    advance,
    assign,
    needed_versions,
    needs_slot,
)
from lifelong_ray.release.sample_ratio import SampleRatio, SplitCounts, sample_ratio

__all__ = [
    "DOCUMENT_KEY",
    "LATENCY_BOUNDS_MS",
    "Arm",
    "ArmTally",
    "Assignment",
    "Check",
    "ComparisonSummary",
    "CorrectionVerdict",
    "Corrections",
    "Counter",
    "Event",
    "Experiment",
    "ExperimentPlan",
    "ExperimentResult",
    "FrontReport",
    "GateReport",
    "Intent",
    "Interval",
    "LabelledPairs",
    "Lease",
    "Manifest",
    "ModelLatency",
    "Observation",
    "Pairs",
    "Phase",
    "Registry",
    "ReleaseDesk",
    "ReleaseDocument",
    "Rollout",
    "SampleRatio",
    "Split",
    "SplitCounts",
    "Verb",
    "Verdict",
    "advance",
    "assign",
    "choose_arm",
    "confidence_sequence",
    "count_corrections",
    "count_pairs",
    "e_inferior",
    "e_not_inferior",
    "judge_base",
    "judge_corrections",
    "judge_evidence",
    "judge_update",
    "latency_quantile_ms",
    "needed_versions",
    "needs_slot",
    "refused",
    "sample_ratio",
    "summarise_comparisons",
    "thompson_weights",
]
