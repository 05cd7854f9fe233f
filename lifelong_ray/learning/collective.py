"""Sums over the workers of one training.

The same learning code runs in one process and in many: whatever must be shared is a
sum of tensors. Does not know who starts the workers or how they find each other.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class Collective(Protocol):
    """The workers of one training, seen from one of them.

    Attributes:
        rank: This worker, from 0.
        world_size: How many there are.
    """

    rank: int
    world_size: int

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all workers, in place.

        Every worker calls it equally often, with the same shapes and types.
        """


class Alone:
    """One worker: every sum is already complete."""

    rank = 0
    world_size = 1

    def sum(self, tensors: list[Tensor]) -> None:
        """Leave `tensors` as they are."""


class TorchDistributed:
    """The workers of the default process group of `torch.distributed`."""

    def __init__(self) -> None:
        if not torch.distributed.is_initialized():
            raise ValueError(
                "torch.distributed has no process group; call init_process_group first, "
                "or use Alone() for a single worker"
            )
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def sum(self, tensors: list[Tensor]) -> None:
        """Sum over the process group, with one message per element type."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        # NCCL moves nothing that lies on a CPU, where the analytic sums are kept.
        only_gpu = torch.distributed.get_backend() == "nccl"
        for group in by_type.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            flat = flat.cuda() if only_gpu else flat
            torch.distributed.all_reduce(flat)
            first = 0
            for tensor in group:
                part = flat[first : first + tensor.numel()]
                tensor.detach().copy_(part.view_as(tensor))
                first += tensor.numel()
