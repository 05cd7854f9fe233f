"""The data loop: images, request ids, the log, curation and drift.

Knows nothing of models, HTTP or Ray; `learning` and `release` know nothing of it.
"""

from lifelong_ray.feedback.curation import Curation, curate, is_holdout
from lifelong_ray.feedback.drift import DriftReport, detect_drift
from lifelong_ray.feedback.first_labels import FirstLabels
from lifelong_ray.feedback.identity import (
    RequestIds,
    Secrets,
    load_secrets,
    pseudonym,
    read_request_id,
    uuid7,
)
from lifelong_ray.feedback.images import (
    CleanImage,
    PreparedImage,
    SentImage,
    content_hash,
    decode_image,
    decode_png,
    encode_png,
    to_model_input,
)
from lifelong_ray.feedback.log import LogStats, LogWriter
from lifelong_ray.feedback.snapshot import (
    LogTail,
    Rows,
    Snapshot,
    read_comparisons,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
)

__all__ = [
    "CleanImage",
    "Curation",
    "DriftReport",
    "FirstLabels",
    "LogStats",
    "LogTail",
    "LogWriter",
    "PreparedImage",
    "RequestIds",
    "Rows",
    "Secrets",
    "SentImage",
    "Snapshot",
    "content_hash",
    "curate",
    "decode_image",
    "decode_png",
    "detect_drift",
    "encode_png",
    "is_holdout",
    "load_secrets",
    "pseudonym",
    "read_comparisons",
    "read_feedback",
    "read_images",
    "read_predictions",
    "read_request_id",
    "take_snapshot",
    "to_model_input",
    "uuid7",
]
