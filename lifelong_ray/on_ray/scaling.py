"""How many replicas a deployment should have: Ray's own rule, within bounds that change.

The bounds follow the clock (off-peak hours) and, for the slot, the release document: with a
candidate that it must answer for it needs a replica before any request comes, else it may sleep.
Runs inside Serve's controller, several times a second, so that reading the document is left to a
thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext
from ray.serve.config import AutoscalingPolicy as PolicyReference

from lifelong_ray.config import AutoscalingConfig, Config, OffPeakConfig, config_from
from lifelong_ray.release import ReleaseDesk, needs_slot
from lifelong_ray.storage import open_store

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


def bounds_at(scaling: AutoscalingConfig, at_s: float) -> tuple[int, int]:
    """Fewest and most replicas at a Unix time."""
    off_peak = scaling.off_peak
    if off_peak is not None and is_off_peak(off_peak, datetime.fromtimestamp(at_s, UTC)):
        return off_peak.min_replicas, off_peak.max_replicas
    return scaling.min_replicas, scaling.max_replicas


def is_off_peak(off_peak: OffPeakConfig, now: datetime) -> bool:
    """Whether a time in UTC lies in the quiet hours, which may go on past midnight.

    The days are those on which they begin.
    """
    start, end = off_peak.start, off_peak.end
    time_of_day = f"{now:%H:%M}"
    if start < end:
        return f"{now:%a}" in off_peak.days and start <= time_of_day < end
    if time_of_day >= start:
        return f"{now:%a}" in off_peak.days
    return time_of_day < end and f"{now - timedelta(days=1):%a}" in off_peak.days


class FollowingPolicy:
    """Ray's queue-length rule within bounds that follow the clock and the release document.

    Made once by Serve's controller, with plain values.
    """

    def __init__(
        self,
        config_tree: dict[str, Any],
        deployment: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the deployment's branch of the configuration: ``front`` or ``slot``."""
        config = config_from(config_tree)
        self._scaling: AutoscalingConfig = getattr(config.serving, deployment)
        self._clock = clock
        self._floor = 0
        if deployment == "slot":
            threading.Thread(
                target=self._follow, args=(config,), daemon=True, name="slot-scaling"
            ).start()

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas wanted; Serve applies delays and the outer bounds."""
        wanted, state = replica_queue_length_autoscaling_policy(context)
        low, high = bounds_at(self._scaling, self._clock())
        return min(max(wanted, low, self._floor), max(high, self._floor)), state

    def _follow(self, config: Config) -> None:
        desk: ReleaseDesk | None = None
        while True:
            try:
                desk = desk or ReleaseDesk(open_store(config.store), self._clock)
                document, _ = desk.read()
                self._floor = int(needs_slot(document, config.rollout))
            except Exception as error:  # noqa: BLE001 - a thread that ends would never wake the slot
                logger.warning("the release document could not be read for scaling: %r", error)
            time.sleep(_LOOK_EVERY_S)


def autoscaling(config: Config, deployment: str) -> dict[str, Any]:
    """Return what Ray Serve is told about the scaling of ``front`` or ``slot``."""
    scaling: AutoscalingConfig = getattr(config.serving, deployment)
    quiet = scaling.off_peak
    fewest = [scaling.min_replicas, *([quiet.min_replicas] if quiet else [])]
    most = [scaling.max_replicas, *([quiet.max_replicas] if quiet else [])]
    follows = deployment == "slot" or quiet is not None
    told: dict[str, Any] = {
        "min_replicas": min(fewest),
        "initial_replicas": scaling.min_replicas,
        "max_replicas": max(most),
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }
    if follows:
        told["policy"] = PolicyReference(  # type: ignore[no-untyped-call]  # Ray gives it no types
            policy_function=FollowingPolicy,
            policy_kwargs={
                "config_tree": config.model_dump(mode="json"),
                "deployment": deployment,
            },
        )
    return told
