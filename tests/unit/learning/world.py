"""Small, quick data, models and workers for the learning tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lifelong_ray.config import (
    AnalyticConfig,
    DistillationConfig,
    EwcConfig,
    LearningConfig,
    ModelConfig,
    ReplayConfig,
    TrainerConfig,
    UpdateConfig,
)
from lifelong_ray.learning import Classifier, Collective, EpochReport, Labelled

T = TypeVar("T")

MODEL = ModelConfig(widths=(8, 16), image_size=8)
CONFIG = LearningConfig(
    seed=3,
    base=TrainerConfig(epochs=4, batch_size=16, learning_rate=1e-2, max_shift_px=1),
    analytic=AnalyticConfig(num_features=64, mirror=False),
    update=UpdateConfig(
        frozen_stages=1,
        trainer=TrainerConfig(epochs=2, batch_size=16, learning_rate=5e-3, max_shift_px=0),
        ewc=EwcConfig(num_fisher_examples=24, num_update_fisher_examples=8),
        distillation=DistillationConfig(),
        replay=ReplayConfig(memory_per_class=6),
    ),
)


def make_images(labels: list[int], seed: int) -> Labelled:
    """Bright bars on noise; the class decides where the bar is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (len(labels), 1, 8, 8), generator=generator)
    for image, label in zip(images, labels, strict=True):
        if label < 4:
            image[0, 2 * label : 2 * label + 2] += 150
        else:
            image[0, :, 2 * (label - 4) : 2 * (label - 4) + 2] += 150
    return images.to(torch.uint8), torch.tensor(labels)


@dataclass
class TickingClock:
    """Every look at it costs a second."""

    now_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@dataclass
class _Meeting:
    barrier: threading.Barrier
    sums: dict[int, list[list[Tensor]]] = field(default_factory=dict)


class ThreadWorker:
    """One of several workers that are threads of this process."""

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = world_size
        self._meeting = meeting

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up in the order of the ranks."""
        meeting = self._meeting
        meeting.sums[self.rank] = [[tensor.detach().clone() for tensor in tensors]]
        meeting.barrier.wait()
        for index, tensor in enumerate(tensors):
            total = sum(meeting.sums[rank][0][index] for rank in range(self.world_size))
            tensor.detach().copy_(total)
        meeting.barrier.wait()


def on_workers(world_size: int, work: Callable[[Collective], T]) -> list[T]:
    """Run `work` on that many thread workers at once and return their results by rank."""
    meeting = _Meeting(threading.Barrier(world_size, timeout=30))
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorker(rank, world_size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world_size)]


class WorkerLostError(Exception):
    """A worker that was lost."""


class InterruptAfter:
    """Keep the checkpoint of one epoch, then fail."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.checkpoint = b""

    def __call__(self, report: EpochReport, checkpoint: Callable[[], bytes]) -> bool:
        if report.epoch == self.epoch:
            self.checkpoint = checkpoint()
            raise WorkerLostError
        return False


def assert_same_weights(one: Classifier, other: Classifier, *, tolerance: float = 0.0) -> None:
    """Compare every weight and buffer; a tolerance of 0 means to the bit."""
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        if tolerance:
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(value, theirs[name]), name
