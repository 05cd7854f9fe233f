"""The Python client of the HTTP API.

Knows the wire format and the errors. Does not know Ray, models or the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

from lifelong_ray.types import LifelongError, ServingError


class ApiError(LifelongError):
    """The server refused a request.

    Attributes:
        status: HTTP status.
        code: The server's machine-readable reason.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


@dataclass(frozen=True)
class ClientPrediction:
    """An answer of ``POST /predict``.

    Attributes:
        request_id: Quote it to give feedback.
        class_name: The answer.
        confidence: Its probability.
        model_version: The version that answered.
        variant: The arm of the rollout or experiment.
        audit: Whether the server asks for a label of this answer.
    """

    request_id: str
    class_name: str
    confidence: float
    model_version: str
    variant: str
    audit: bool


class LifelongClient:
    """Speaks to one running application; safe to use from several threads.

    Example::

        with LifelongClient("http://127.0.0.1:8000") as client:
            answer = client.predict(Path("seven.png").read_bytes(), "image/png")
            client.feedback(answer.request_id, "7")
    """

    def __init__(self, base_url: str, *, admin_token: str = "", timeout_s: float = 30.0) -> None:
        """Operators pass `admin_token`; everybody else need not."""
        headers = {"authorization": f"Bearer {admin_token}"} if admin_token else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        """Use as a context manager to close the connections."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        image: bytes,
        content_type: str = "image/png",
        *,
        session_id: str = "",
        canary: str = "",
        variant: str = "",
    ) -> ClientPrediction:
        """Classify one encoded image.

        Args:
            image: The file's bytes.
            content_type: Its media type.
            session_id: Sticky key: the same key stays with the same variant.
            canary: ``always`` or ``never`` overrides the split.
            variant: The arm that shall answer, which overrides it too.

        Raises:
            ApiError: If the server refuses it.
            ServingError: If it cannot be reached, as of every method.
        """
        headers = {"content-type": content_type}
        if session_id:
            headers["x-session-id"] = session_id
        if canary:
            headers["x-canary"] = canary
        if variant:
            headers["x-variant"] = variant
        body = self._call("POST", "/predict", content=image, headers=headers)
        return ClientPrediction(
            request_id=body["request_id"],
            class_name=body["class"],
            confidence=body["confidence"],
            model_version=body["model_version"],
            variant=body["variant"],
            audit=body["audit"],
        )

    def feedback(self, request_id: str, label: str, *, user: str = "") -> None:
        """Correct or confirm an answer; it is durable when this returns."""
        self._call(
            "POST", "/feedback", json={"request_id": request_id, "label": label, "user": user}
        )

    def add_example(self, image: bytes, label: str, content_type: str = "image/png") -> str:
        """Operators: add a trusted labelled image; returns its content hash."""
        body = self._call(
            "POST",
            "/examples",
            content=image,
            headers={"content-type": content_type},
            params={"label": label},
        )
        return str(body["content_hash"])

    def status(self) -> dict[str, Any]:
        """Operators: the release document, this front, what the controller has seen."""
        return self._call("GET", "/admin/status")

    def start_rollout(
        self,
        candidate: str,
        *,
        steps: list[Mapping[str, Any]] | None = None,
        force: bool = False,
        reason: str = "",
    ) -> None:
        """Operators: begin a rollout; `force` goes past a gate that did not pass."""
        body = {"candidate": candidate, "force": force, "reason": reason}
        if steps is not None:
            body["steps"] = steps
        self._call("PUT", "/admin/rollout", json=body)

    def rollout(self, verb: str, *, reason: str = "", force: bool = False) -> None:
        """Operators: promote (`force`: without evidence), abort, pause, resume or rollback."""
        body: dict[str, Any] = {"reason": reason}
        if force:
            body["force"] = True
        self._call("POST", f"/admin/rollout/{verb}", json=body)

    def start_experiment(
        self,
        weights: Mapping[str, int],
        *,
        end_s: float,
        metric: str = "accuracy",
        adaptive: bool = False,
        reason: str = "",
    ) -> None:
        """Operators: divide requests among versions, and measure.

        Args:
            weights: Per cent by version, stable among them; they add up to 100.
            end_s: Unix time at which it ends by itself.
            metric: ``accuracy`` or ``corrections``, what adaptive weights go by.
            adaptive: Whether weights follow what was seen.
            reason: Kept in the audit record.
        """
        body = {
            "arms": [{"version": version, "weight": w} for version, w in weights.items()],
            "end_s": end_s,
            "metric": metric,
            "adaptive": adaptive,
            "reason": reason,
        }
        self._call("PUT", "/admin/experiment", json=body)

    def end_experiment(self, *, reason: str = "") -> None:
        """Operators: end the experiment; stable stays, and the result is stored."""
        self._call("POST", "/admin/experiment/end", json={"reason": reason})

    def experiment(self, experiment_id: str = "") -> dict[str, Any] | None:
        """Operators: the experiment under way, or an ended one, with its result so far."""
        params = {"id": experiment_id} if experiment_id else {}
        shown = self._call("GET", "/admin/experiment", params=params)["experiment"]
        return dict(shown) if shown is not None else None

    def comparisons(
        self, *, rollout: str = "", hours: float = 1.0, last: int = 100
    ) -> dict[str, Any]:
        """Operators: what both versions answered, of one rollout or of the last `hours`."""
        wanted: dict[str, Any] = {"rollout": rollout} if rollout else {"hours": hours}
        return self._call("GET", "/admin/comparisons", params={**wanted, "last": last})

    def drift(self) -> dict[str, Any]:
        """Operators: whether the traffic has changed."""
        return self._call("GET", "/admin/drift")

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as cause:
            raise ServingError(
                f"{self._http.base_url} does not answer {method} {path}: {cause}; "
                "is the application running there?"
            ) from cause
        try:
            body = response.json()
        except ValueError:
            body = None  # a proxy's page, or another server altogether
        if response.is_success and isinstance(body, dict):
            return body
        error = body.get("error", {}) if isinstance(body, dict) else {}
        if not isinstance(error, dict):
            error = {"message": str(error)}
        raise ApiError(
            response.status_code,
            str(error.get("code", "http_error")),
            str(error.get("message", response.text[:200])),
        )
