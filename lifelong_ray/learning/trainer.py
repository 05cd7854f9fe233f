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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.config import TrainerConfig
from lifelong_ray.learning.backbones import settle_statistics
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.checks import check_labels
from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.model import Classifier, check_inputs
from lifelong_ray.learning.rates import find_rate, rate_and_momentum
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

_BETA_2 = 0.999
_FIRST_STEPS_CHECKED = 3
_SQUARED = "squared gradient"
_CHECK_EVERY = 50
_NUM_SETTLING = 1_024
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

    Its gradient is added without a backward pass, since it is known in closed form and
    every step pays for it.

    Attributes:
        name: Names it in reports.
        weight: Multiplies it; 0 leaves it out entirely.
        loss: From the weights by name to a scalar.
        add_gradient: Adds the loss's gradient, times a scale, to the weights' ``grad``.
    """

    name: str
    weight: float
    loss: Callable[[dict[str, nn.Parameter]], Tensor]
    add_gradient: Callable[[dict[str, nn.Parameter], float], None]


LossTerm = ExampleTerm | WeightTerm


@dataclass(frozen=True, eq=False)
class Rivals:
    """Which classes an example's label competes with, where that is not all of them.

    Attributes:
        group: Each training example's group (N,).
        allowed: Whether a class competes for the examples of a group (G, C).
    """

    group: Tensor
    allowed: Tensor


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
        learning_rate: The peak that was used, set or found.
    """

    epochs: tuple[EpochReport, ...]
    samples_seen: int
    seconds: float
    stopped_early: bool
    learning_rate: float


OnEpoch = Callable[[EpochReport, Callable[[], bytes]], bool]
"""Called after every epoch on every worker with the report and a function that gives the
checkpoint's bytes; True stops the training there."""


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
    turned: Tensor | None = None,
    rivals: Rivals | None = None,
    class_offsets: Tensor | None = None,
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
        turned: What `inputs` would be of the mirror images; needed to mirror activations.
        rivals: Which classes compete; None means all.
        class_offsets: Added to the logits in the labels' loss alone (C,); None means nothing.
        collective: The workers; None means this one alone.
        validate: Gives an accuracy after every epoch.
        resume: Bytes of a checkpoint of this very training.
        on_epoch: See `OnEpoch`.

    Raises:
        LearningError: If a loss or input is not finite, there is nothing to train on, an input
            or label is none that the model knows, or `resume` is not a checkpoint of this
            training.
    """
    check_inputs(model, inputs, start, "training inputs")
    check_labels(labels, len(inputs), model.num_classes, "training label")
    if not len(inputs):
        raise LearningError("there are no examples to train on; at least one is needed")
    if class_offsets is not None and tuple(class_offsets.shape) != (model.num_classes,):
        raise ValueError(
            f"the class offsets have shape {tuple(class_offsets.shape)} for {model.num_classes} "
            "classes; give each class one"
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "no weight of the model requires a gradient, so nothing would be trained; freeze "
            "fewer of them"
        )
    if start and (config.max_shift_px or (config.mirror and turned is None)):
        raise ValueError(
            f"activations of stage {start} cannot be moved as images are; pass the images, "
            "or set max_shift_px to 0 and mirror to false"
        )
    data = _Data(inputs, labels, start, turned, rivals, class_offsets)
    group = collective or Alone()
    rate = config.learning_rate
    if not rate:
        trial = _Loop(model.copy(), data, config, 1.0, seed, terms, batches, group)
        rate = find_rate(trial.try_rate)
        logger.info("the learning-rate range test gives %.2g", rate)
    # Statistics are for answering: nobody needs them while nobody asks.
    settles = validate is not None or on_epoch is not None
    loop = _Loop(model, data, config, rate, seed, terms, batches, group, settles=settles)
    if resume is not None:
        loop.restore(resume)
    stopped = False
    while loop.epoch < loop.num_epochs and not stopped:
        began_s = clock()
        with torch.random.fork_rng(devices=[]):  # Layers that draw leave no trace.
            losses = loop.run_epoch()
        loop.seconds += clock() - began_s
        report = EpochReport(
            epoch=loop.epoch,
            num_epochs=loop.num_epochs,
            losses=losses,
            samples_seen=loop.samples_seen,
            seconds=loop.seconds,
            validation_accuracy=validate(model) if validate else None,
        )
        loop.reports.append(report)
        if on_epoch is not None:
            stopped = loop.agree(on_epoch(report, loop.checkpoint))
    return TrainReport(tuple(loop.reports), loop.samples_seen, loop.seconds, stopped, rate)


@dataclass(frozen=True, eq=False)
class _Data:
    """What is trained on: the arguments of `train` of the same names."""

    inputs: Tensor
    labels: Tensor
    start: int
    turned: Tensor | None
    rivals: Rivals | None
    class_offsets: Tensor | None


class _Loop:
    """State of one training between epochs."""

    def __init__(
        self,
        model: Classifier,
        data: _Data,
        config: TrainerConfig,
        rate: float,
        seed: int,
        terms: tuple[LossTerm, ...],
        batches: Callable[[torch.Generator], list[Tensor]] | None,
        group: Collective,
        *,
        settles: bool = True,
    ) -> None:
        self.epoch = 0
        self._settles = settles
        self.samples_seen = 0
        self.seconds = 0.0
        self.reports: list[EpochReport] = []
        self._model = model
        self._data = data
        self._config = config
        self._rate = rate
        self._seed = seed
        self._example_terms = [t for t in terms if isinstance(t, ExampleTerm) and t.weight]
        self._weight_terms = [t for t in terms if isinstance(t, WeightTerm) and t.weight]
        self._batches = batches or self._random_batches
        self._group = group
        if group.world_size > config.num_shards and group.rank == 0:
            logger.warning(
                "%d workers share %d shards, so some have nothing to do; raise num_shards",
                group.world_size,
                config.num_shards,
            )
        if self._takes_whole_shards and config.max_examples_at_once:
            logger.warning(
                "max_examples_at_once is %d, but batch normalisation takes the statistics of a "
                "whole shard; raise num_shards for fewer examples at once",
                config.max_examples_at_once,
            )
        self._places: dict[int, Tensor] = {}
        self._most_at_once = config.max_examples_at_once or config.batch_size**2
        self._named = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self._weights = list(self._named.values())
        self._optimizer = _optimizer(self._weights, config)
        self._steps_per_epoch = len(self._batches(generator_for(seed, "batches", 0)))
        if not self._steps_per_epoch:
            raise ValueError("the plan of batches has none; each epoch needs at least one")
        self._num_steps = config.iterations or config.epochs * self._steps_per_epoch
        self.num_epochs = math.ceil(self._num_steps / self._steps_per_epoch)

    def run_epoch(self) -> dict[str, float]:
        """Run one epoch and return the mean losses by term."""
        batches = self._batches(generator_for(self._seed, "batches", self.epoch))
        assert len(batches) == self._steps_per_epoch
        first = self.epoch * self._steps_per_epoch
        batches = batches[: self._num_steps - first]
        self._model.train()
        totals: dict[str, list[float]] = {}
        for index, batch in enumerate(batches):
            for name, value in self._step(first + index, batch).items():
                totals.setdefault(name, []).append(value)
            self.samples_seen += len(batch)
        if self._settles or self.epoch + 1 == self.num_epochs:
            self._settle()
        self._model.eval()
        self.epoch += 1
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def try_rate(self, step: int, rate: float) -> float:
        """Take one step of the range test at `rate` and return the loss before it."""
        batches = self._batches(generator_for(self._seed, "batches", 0))
        self._model.train()
        self._rate = rate
        losses = self._gradients(step, batches[step % len(batches)])
        self._apply(rate, 0.9)
        return float(losses.sum())

    def _step(self, step: int, batch_B: Tensor) -> dict[str, float]:
        config = self._config
        losses = self._gradients(step, batch_B)
        names = ["labels", *(term.name for term in self._example_terms)]
        values = dict(zip(names, losses.tolist(), strict=True))
        if step < _FIRST_STEPS_CHECKED or step % self._steps_per_epoch % _CHECK_EVERY == 0:
            with torch.no_grad():
                for term in self._weight_terms:
                    values[term.name] = term.weight * float(term.loss(self._named))
            # AdamW squares the gradients: where that overflows, its steps become zero and the
            # loss stays finite.
            values[_SQUARED] = float(
                sum(w.grad.square().sum() for w in self._weights if w.grad is not None)
            )
        rate, momentum = rate_and_momentum(config.schedule, step, self._num_steps, self._rate)
        for name, value in values.items():
            if not math.isfinite(value):
                terms = self._example_terms + self._weight_terms
                held = ", ".join(f"{t.name} {t.weight:g}" for t in terms)
                what = name if name == _SQUARED else f"{name} loss"
                raise LearningError(
                    f"the {what} is {value} at step {step}, learning rate {rate:.2g}: the "
                    "training has diverged; lower the learning rate or the weights of the terms"
                    + (f" (among them {held})" if held else "")
                )
        self._apply(rate, momentum)
        values.pop(_SQUARED, None)
        return values

    def _apply(self, rate: float, momentum: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            if "betas" in group:
                group["betas"] = (momentum, _BETA_2)
            else:
                group["momentum"] = momentum
        self._optimizer.step()

    def _gradients(self, step: int, batch_B: Tensor) -> Tensor:
        """Fill every weight's gradient; return the losses of labels and example terms."""
        mine = self._mine(len(batch_B))
        while True:
            self._optimizer.zero_grad()
            self._seed_layers(step)
            losses = torch.zeros(1 + len(self._example_terms), device=self._model.device)
            try:
                for places in self._pieces(mine):
                    piece = self._example_losses(step, batch_B, places)
                    piece.sum().backward()
                    losses += piece.detach()
                break
            except RuntimeError as error:
                self._shrink(error, len(mine))
        if self._group.world_size > 1:
            for weight in self._weights:  # Of a worker without a share of the batch.
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            self._group.sum([*(w.grad for w in self._weights if w.grad is not None), losses])
        for term in self._weight_terms:
            term.add_gradient(self._named, term.weight)
        return losses

    def _seed_layers(self, step: int) -> None:
        """Make layers that draw, such as dropout, draw by seed and step alone."""
        if self._model.config.name in ("convnet", "mlp", "resnet20", "resnet32"):
            return  # They have none.
        drawn = generator_for(self._seed, "layers", step, self._group.rank)
        torch.manual_seed(int(torch.randint(2**62, (), generator=drawn)))

    @property
    def _takes_whole_shards(self) -> bool:
        """Whether statistics are learned, of a shard each: the same on any number of workers."""
        return self._model.learns_statistics and self._model.has_batch_statistics

    def _pieces(self, mine: Tensor) -> Sequence[Tensor]:
        """This worker's places of a batch, in pieces that are run through one by one."""
        if self._takes_whole_shards:
            shard = mine % self._config.num_shards
            return [mine[shard == index] for index in shard.unique().tolist()]
        return mine.split(self._most_at_once) if len(mine) else []

    def _shrink(self, error: RuntimeError, num_mine: int) -> None:
        """Halve the pieces after running out of memory; raise any other error."""
        if not _ran_out_of_memory(error):
            raise error
        smaller = min(self._most_at_once, num_mine) // 2
        if self._takes_whole_shards:
            raise LearningError(
                f"there is not enough memory for a shard of a batch of {num_mine} examples, whose "
                "statistics batch normalisation takes as a whole; raise num_shards, or choose a "
                "smaller batch_size or model"
            ) from error
        if not smaller:
            raise LearningError(
                f"there is not enough memory for a batch of {num_mine} examples in pieces of "
                f"{min(self._most_at_once, num_mine)}; choose a smaller batch_size or model"
            ) from error
        logger.warning(
            "out of memory with %d examples at once; going on with %d, to the same result",
            min(self._most_at_once, num_mine),
            smaller,
        )
        self._most_at_once = smaller
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _example_losses(self, step: int, batch_B: Tensor, mine: Tensor) -> Tensor:
        """Return the losses of labels and example terms, as shares of the batch's."""
        config, data, device = self._config, self._data, self._model.device
        positions = batch_B if len(mine) == len(batch_B) else batch_B[mine]
        inputs = data.inputs[positions]
        if config.max_shift_px:
            inputs = self._shifted(inputs, step, len(batch_B), mine)
        if config.mirror:
            inputs = self._mirrored(inputs, positions, step, len(batch_B), mine)
        inputs = inputs.to(device)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if config.precision == "bf16":
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits_BC = self._model.trained_logits(inputs, start=data.start).float()
        else:
            logits_BC = self._model.trained_logits(inputs, start=data.start)
        labels_B = data.labels[positions].to(device)
        rivalled_BC = logits_BC
        if data.class_offsets is not None:
            rivalled_BC = logits_BC + data.class_offsets.to(device)
        if data.rivals is not None:
            allowed_BC = data.rivals.allowed[data.rivals.group[positions]].to(device)
            rivalled_BC = rivalled_BC.masked_fill(~allowed_BC, -math.inf)
        size = len(batch_B)
        losses = [F.cross_entropy(rivalled_BC, labels_B, reduction="sum") / size]
        losses += [
            term.weight * term.loss(logits_BC, positions).sum() / size
            for term in self._example_terms
        ]
        return torch.stack(losses)

    def _mine(self, size: int) -> Tensor:
        """Places in a batch that belong to this worker's shards."""
        if size not in self._places:
            places = torch.arange(size)
            owner = places % self._config.num_shards % self._group.world_size
            self._places[size] = places[owner == self._group.rank]
        return self._places[size]

    def _settle(self) -> None:
        """Give batch normalisation the statistics of fixed examples, whatever the batches were."""
        if not self._takes_whole_shards:
            return
        generator = generator_for(self._seed, "settling")
        chosen = torch.randperm(len(self._data.inputs), generator=generator)[:_NUM_SETTLING]
        settle_statistics(
            lambda piece: self._model.features(
                piece.to(self._model.device), start=self._data.start
            ),
            self._model,
            self._data.inputs[chosen],
        )

    def _mirrored(
        self, inputs: Tensor, positions: Tensor, step: int, size: int, mine: Tensor
    ) -> Tensor:
        """Turn about half of the images left to right."""
        generator = generator_for(self._seed, "mirror", step)
        turns_B = torch.rand(size, generator=generator)[mine] < 0.5
        kept = self._data.turned
        other = inputs.flip(3) if kept is None else kept[positions]
        return torch.where(turns_B.view(-1, *[1] * (inputs.dim() - 1)), other, inputs)

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
        order = torch.randperm(len(self._data.inputs), generator=generator)
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
            "class offsets": _listed(self._data.class_offsets),
            "number of examples": len(self._data.inputs),
            "steps per epoch": self._steps_per_epoch,
            "weights": [list(weight.shape) for weight in self._weights],
            "terms": [f"{t.name}={t.weight:g}" for t in self._example_terms + self._weight_terms],
        }


def _listed(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _optimizer(weights: list[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            weights, lr=1.0, momentum=0.9, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.AdamW(weights, lr=1.0, weight_decay=config.weight_decay, fused=True)


def _ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is the device's or the processor's allocator that gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
