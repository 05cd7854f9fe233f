"""Rows of the log in their plainest form, with whatever a test says about them."""

from __future__ import annotations

from typing import Any

from lifelong_ray.types import Comparison, Feedback, Prediction


def a_prediction(request_id: str, **more: Any) -> Prediction:
    """An answer of v1 to nobody in particular."""
    plain: dict[str, Any] = {
        "at_s": 1.0,
        "content_hash": "",
        "class_name": "cat",
        "scores": (0.9, 0.1),
        "class_names": ("cat", "dog"),
        "version": "v1",
        "variant": "stable",
        "user": "",
        "sampling_probability": 1.0,
        "audit": False,
        "model_ms": 1.0,
    }
    return Prediction(request_id=request_id, **(plain | more))


def a_comparison(
    request_id: str, stable: str = "cat", candidate: str = "cat", **more: Any
) -> Comparison:
    """What v1 and v1.1 said to one request; an empty class is no answer."""
    plain: dict[str, Any] = {
        "at_s": 1.0,
        "rollout_id": "r1",
        "stable_version": "v1",
        "stable_confidence": 0.9,
        "candidate_version": "v1.1",
        "candidate_confidence": 0.9,
        "stable_ms": 1.0,
        "candidate_ms": 1.0,
        "audit": True,
    }
    return Comparison(
        request_id=request_id, stable_class=stable, candidate_class=candidate, **(plain | more)
    )


def a_label(request_id: str, label: str, at_s: float = 2.0, **more: Any) -> Feedback:
    """What somebody says the answer to a request should have been."""
    plain: dict[str, Any] = {
        "feedback_id": f"{request_id}-{at_s}",
        "kind": "feedback",
        "content_hash": "",
        "user": "",
        "audit": True,
    }
    return Feedback(request_id=request_id, label=label, at_s=at_s, **(plain | more))
