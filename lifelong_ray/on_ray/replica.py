"""What routes outside the ingress class reach of the front replica that they run in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from ray import serve
from ray.serve.handle import DeploymentHandle

from lifelong_ray.config import Config
from lifelong_ray.feedback import Secrets
from lifelong_ray.on_ray.front import Front
from lifelong_ray.storage import Store


@dataclass(frozen=True)
class Replica:
    """One front replica: what it answers with, and what is around it."""

    config: Config
    store: Store
    secrets: Secrets
    front: Front
    controller: DeploymentHandle[Any]


async def this_replica() -> Replica:
    """Return the replica of this process, which the ingress class keeps as `replica`."""
    ingress: Any = serve.get_replica_context().servable_object
    replica: Replica = ingress.replica
    return replica


ThisReplica = Annotated[Replica, Depends(this_replica)]
