"""The one gradient loop: labels' loss plus any terms, resumable, on any number of workers.

Knows nothing of why a term is there. What a step does follows from the seed and the
step alone: not from the number of workers (up to rounding), and not from how often the
training was interrupted (to the bit, on as many workers).

Axes: N examples, B examples of a batch, C classes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.config import TrainerConfig
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.model import Classifier
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

_WARM_UP_SHARE = 0.3
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
_BETA_1 = (0.95, 0.85)
_BETA_2 = 0.999
_PROGRESS = "progress"


@dataclass(frozen=True)
class ExampleTerm:
    """A loss that every example has, such as distillation.

    Attributes:
        name: Names it in reports.
        weight: Multiplies it; 0 leaves it out entirely.
        loss: From logits (B, C) and the examples' positions in the training set to (B,).
    """

    name: str
    weight: float
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WeightTerm:
    """A loss of the weights alone, such as EWC.

    Attributes:
        name: Names it in reports.
        weight: Multiplies it; 0 leaves it out entirely.
        loss: From the model to a scalar.
    """

    name: str
    weight: float
    loss: Callable[[Classifier], Tensor]


LossTerm = ExampleTerm | WeightTerm


@dataclass(frozen=True)
class EpochReport:
    """One pass over the examples.

    Attributes:
        epoch: From 1.
        num_epochs: Epochs planned.
        losses: Mean over the epoch's steps by term, weights included; ``labels`` is the
            cross-entropy.
        samples_seen: Examples shown in gradient steps since the start.
        seconds: Training time since the start, without validation and checkpoints.
        validation_accuracy: None when there is nothing to validate on.
    """

    epoch: int
    num_epochs: int
    losses: dict[str, float]
    samples_seen: int
    seconds: float
    validation_accuracy: float | None


@dataclass(frozen=True)
class TrainReport:
    """One gradient training.

    Attributes:
        epochs: Every epoch, including those before an interruption.
        samples_seen: Examples shown in gradient steps.
        seconds: Training time, including that before an interruption.
        stopped_early: Whether `on_epoch` asked to stop.
    """

    epochs: tuple[EpochReport, ...]
    samples_seen: int
    seconds: float
    stopped_early: bool


OnEpoch = Callable[[EpochReport, Callable[[], bytes]], bool]
"""Called after every epoch on every worker with the report and a function that gives the
checkpoint's bytes; True stops the training there."""


def one_cycle(step: int, num_steps: int, peak: float) -> tuple[float, float]:
    """Return learning rate and first momentum of a step, from 0.

    Source: Smith and Topin 2018, arXiv:1708.07120; the numbers are those of
    `torch.optim.lr_scheduler.OneCycleLR`, which has no closed form to resume from.

    >>> [round(one_cycle(step, 100, 0.25)[0], 3) for step in (0, 29, 99)]
    [0.01, 0.25, 0.0]
    """
    top = max(_WARM_UP_SHARE * num_steps - 1, 0.0)
    start = peak / _START_DIVISOR
    if step <= top and top > 0:
        share = step / top
        return _cosine(start, peak, share), _cosine(_BETA_1[0], _BETA_1[1], share)
    share = (step - top) / max(num_steps - 1 - top, 1.0)
    return _cosine(peak, start / _END_DIVISOR, share), _cosine(_BETA_1[1], _BETA_1[0], share)


def train(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    *,
    config: TrainerConfig,
    seed: int,
    clock: Clock,
    terms: tuple[LossTerm, ...] = (),
    batches: Callable[[torch.Generator], list[Tensor]] | None = None,
    start: int = 0,
    collective: Collective | None = None,
    validate: Callable[[Classifier], float] | None = None,
    resume: bytes | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainReport:
    """Train the linear head and whatever of the backbone requires gradients, in place.

    Every worker passes the same arguments. Each batch is cut into `config.num_shards`
    logical shards which the workers share out; gradients are added up.

    Args:
        model: Trained in place.
        inputs: uint8 images, or activations entering stage `start`.
        labels: Classes (N,).
        config: How to train.
        seed: Decides order and shifts.
        clock: Gives seconds; only differences are used.
        terms: Further losses; those of weight 0 are not computed.
        batches: From a generator to one epoch's batches of positions, always equally many;
            None means random batches of `config.batch_size`.
        start: Stages that `inputs` have passed already.
        collective: The workers; None means this one alone.
        validate: Gives an accuracy after every epoch.
        resume: Bytes of a checkpoint of this very training.
        on_epoch: See `OnEpoch`.

    Raises:
        LearningError: If a loss is not finite, there is nothing to train on, or `resume` is
            not a checkpoint of this training.
    """
    if not len(inputs):
        raise LearningError("there are no examples to train on")
    if start and config.max_shift_px:
        raise ValueError(
            f"activations of stage {start} cannot be shifted as images are; pass the images, "
            "or set max_shift_px to 0"
        )
    loop = _Loop(model, inputs, labels, config, seed, terms, batches, start, collective)
    if resume is not None:
        loop.restore(resume)
    stopped = False
    while loop.epoch < config.epochs and not stopped:
        began_s = clock()
        losses = loop.run_epoch()
        loop.seconds += clock() - began_s
        report = EpochReport(
            epoch=loop.epoch,
            num_epochs=config.epochs,
            losses=losses,
            samples_seen=loop.samples_seen,
            seconds=loop.seconds,
            validation_accuracy=validate(model) if validate else None,
        )
        loop.reports.append(report)
        if on_epoch is not None:
            stopped = loop.agree(on_epoch(report, loop.checkpoint))
    return TrainReport(tuple(loop.reports), loop.samples_seen, loop.seconds, stopped)


class _Loop:
    """State of one training between epochs."""

    def __init__(
        self,
        model: Classifier,
        inputs: Tensor,
        labels: Tensor,
        config: TrainerConfig,
        seed: int,
        terms: tuple[LossTerm, ...],
        batches: Callable[[torch.Generator], list[Tensor]] | None,
        start: int,
        collective: Collective | None,
    ) -> None:
        self.epoch = 0
        self.samples_seen = 0
        self.seconds = 0.0
        self.reports: list[EpochReport] = []
        self._model = model
        self._inputs = inputs
        self._labels = labels
        self._config = config
        self._seed = seed
        self._example_terms = [t for t in terms if isinstance(t, ExampleTerm) and t.weight]
        self._weight_terms = [t for t in terms if isinstance(t, WeightTerm) and t.weight]
        self._batches = batches or self._random_batches
        self._start = start
        self._group = collective or Alone()
        if self._group.world_size > config.num_shards and self._group.rank == 0:
            logger.warning(
                "%d workers share %d shards, so some have nothing to do; raise num_shards",
                self._group.world_size,
                config.num_shards,
            )
        self._weights = [w for w in model.parameters() if w.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._steps_per_epoch = len(self._batches(generator_for(seed, "batches", 0)))

    def run_epoch(self) -> dict[str, float]:
        """Run one epoch and return the mean losses by term."""
        batches = self._batches(generator_for(self._seed, "batches", self.epoch))
        assert len(batches) == self._steps_per_epoch
        self._model.train()
        totals: dict[str, float] = {}
        for index, batch in enumerate(batches):
            step = self.epoch * self._steps_per_epoch + index
            for name, value in self._step(step, batch).items():
                totals[name] = totals.get(name, 0.0) + value
            self.samples_seen += len(batch)
        self._model.eval()
        self.epoch += 1
        return {name: total / len(batches) for name, total in totals.items()}

    def _step(self, step: int, batch_B: Tensor) -> dict[str, float]:
        self._optimizer.zero_grad()
        mine = self._mine(len(batch_B))
        losses = {"labels": torch.zeros((), device=self._model.device)}
        losses |= {term.name: torch.zeros_like(losses["labels"]) for term in self._example_terms}
        if len(mine):
            losses = self._example_losses(step, batch_B, mine)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        shared = torch.stack([loss.detach() for loss in losses.values()])
        self._group.sum([*(w.grad for w in self._weights if w.grad is not None), shared])
        values = dict(zip(losses, shared.tolist(), strict=True))
        for term in self._weight_terms:
            penalty = term.weight * term.loss(self._model)
            penalty.backward()  # type: ignore[no-untyped-call]
            values[term.name] = float(penalty.detach())
        rate, momentum = one_cycle(
            step, self._config.epochs * self._steps_per_epoch, self._config.learning_rate
        )
        for name, value in values.items():
            if not math.isfinite(value):
                raise LearningError(
                    f"the {name} loss is {value} at step {step}, learning rate {rate:.2g}: the "
                    "training has diverged; lower the learning rate or the weights of the terms"
                )
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = rate, (momentum, _BETA_2)
        self._optimizer.step()
        return values

    def _example_losses(self, step: int, batch_B: Tensor, mine: Tensor) -> dict[str, Tensor]:
        positions = batch_B[mine]
        inputs = self._inputs[positions]
        if self._config.max_shift_px:
            inputs = self._shifted(inputs, step, len(batch_B), mine)
        device = self._model.device
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self._config.precision == "bf16"
        ):
            features = self._model.features(inputs.to(device), start=self._start)
            logits_BC = self._model.head(features).float()
        labels_B = self._labels[positions].to(device)
        size = len(batch_B)
        losses = {"labels": F.cross_entropy(logits_BC, labels_B, reduction="sum") / size}
        for term in self._example_terms:
            losses[term.name] = term.weight * term.loss(logits_BC, positions).sum() / size
        return losses

    def _mine(self, size: int) -> Tensor:
        """Places in a batch that belong to this worker's shards."""
        places = torch.arange(size)
        owner = places % self._config.num_shards % self._group.world_size
        return places[owner == self._group.rank]

    def _shifted(self, images: Tensor, step: int, size: int, mine: Tensor) -> Tensor:
        """Move each image by up to `max_shift_px`; its edge fills what becomes free."""
        reach = self._config.max_shift_px
        generator = generator_for(self._seed, "shift", step)
        shifts = torch.randint(-reach, reach + 1, (2, size), generator=generator)[:, mine]
        height, width = images.shape[2:]
        rows = (torch.arange(height) + shifts[0][:, None]).clamp(0, height - 1)
        columns = (torch.arange(width) + shifts[1][:, None]).clamp(0, width - 1)
        image = torch.arange(len(images))[:, None, None]
        moved = images.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(3, 1).contiguous()

    def _random_batches(self, generator: torch.Generator) -> list[Tensor]:
        order = torch.randperm(len(self._inputs), generator=generator)
        size = self._config.batch_size
        return [order[first : first + size] for first in range(0, len(order), size)]

    def agree(self, stop: bool) -> bool:
        """Whether any worker wants to stop."""
        votes = torch.tensor([float(stop)], device=self._model.device)
        self._group.sum([votes])
        return bool(votes.item() > 0)

    def checkpoint(self) -> bytes:
        """Return the state after the last epoch, as safetensors."""
        tensors = {f"model.{name}": t.contiguous() for name, t in self._model.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t.contiguous() for name, t in state.items()}
        progress = {
            "training": self._identity(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "reports": [asdict(report) for report in self.reports],
        }
        tensors[_PROGRESS] = torch.frombuffer(
            bytearray(json.dumps(progress).encode()), dtype=torch.uint8
        )
        return save_tensors(tensors)

    def restore(self, checkpoint: bytes) -> None:
        """Continue from what `checkpoint` gave."""
        try:
            tensors = load_tensors(checkpoint)
            progress: dict[str, Any] = json.loads(bytes(tensors.pop(_PROGRESS).numpy()))
        except (SafetensorError, KeyError, ValueError) as error:
            raise LearningError(
                f"the checkpoint to resume from is damaged ({error}); start the training anew"
            ) from None
        theirs, ours = progress["training"], self._identity()
        odd = [key for key in ours if theirs.get(key) != ours[key]]
        if odd:
            raise LearningError(
                f"the checkpoint belongs to another training: {odd[0]} is {theirs.get(odd[0])} "
                f"there and {ours[odd[0]]} here; resume with what it was started with"
            )
        weights = {
            k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")
        }
        self._model.load_state_dict(weights)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                # Moments lie in memory as their weight does, which may be channels-last.
                moment = name != "step"
                held = (
                    torch.empty_like(self._weights[int(index)]).copy_(tensor) if moment else tensor
                )
                state.setdefault(int(index), {})[name] = held.detach()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self.epoch = progress["epoch"]
        self.samples_seen = progress["samples_seen"]
        self.seconds = progress["seconds"]
        self.reports = [EpochReport(**report) for report in progress["reports"]]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        return {
            **self._config.model_dump(mode="json"),
            "seed": self._seed,
            "number of examples": len(self._inputs),
            "steps per epoch": self._steps_per_epoch,
            "weights": [list(weight.shape) for weight in self._weights],
            "terms": [f"{t.name}={t.weight:g}" for t in self._example_terms + self._weight_terms],
        }


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2.0 * (math.cos(math.pi * share) + 1)
