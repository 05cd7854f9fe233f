"""A light model that answers where it is sure, and what keeps it from costing accuracy.

Knows how it is taught, when it is trusted and how both models answer as one; does not know
which images the hold-out has, nor where a version's files are stored.

Axes: N images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scipy.special import betaincinv
from torch import Tensor

from lifelong_ray.config import CascadeConfig, LearningConfig, ModelConfig, Precision
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.evaluate import fit_temperature
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Labelled, Run
from lifelong_ray.learning.model import Classifier, Shape, build_model, in_chunks
from lifelong_ray.learning.penalties import distillation_loss
from lifelong_ray.learning.predict import Answerer, Answers, Predictor
from lifelong_ray.learning.trainer import ExampleTerm, train
from lifelong_ray.types import LearningError

LIGHT_FILE = "light.safetensors"
CASCADE_FILE = "cascade.json"

_FORMAT = 1
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Calibration:
    """When a light model is trusted, and what that was measured to cost.

    Attributes:
        threshold: Least confidence at which its answer stands; None where none is good enough.
        reason: Why this one, or why none.
        light_share: Share of the images that it would answer.
        accuracy_loss: Accuracy lost to its answers; below zero where they are better.
        harm_bound: With 95 % confidence, at most this share of the images is answered wrongly by
            it and would not have been without it; of the images that chose the threshold.
        num_choosing: Images that chose the threshold.
        num_measuring: Images, none of these, that share and loss were measured on.
    """

    threshold: float | None
    reason: str
    light_share: float | None
    accuracy_loss: float | None
    harm_bound: float | None
    num_choosing: int
    num_measuring: int

    def without_threshold(self, reason: str) -> Calibration:
        """The same measurements, with a reason not to trust the light model after all."""
        return replace(self, threshold=None, reason=reason)


@dataclass(frozen=True, eq=False)
class Light:
    """A light model beside a version's own.

    Attributes:
        model: In eval mode, on the CPU.
        class_names: The version's classes.
        temperature: Divides its logits.
        calibration: When it is trusted; None before anybody knows.
    """

    model: Classifier
    class_names: tuple[str, ...]
    temperature: float
    calibration: Calibration | None = None

    @property
    def threshold(self) -> float | None:
        """Least confidence at which its answer stands; None where it is not to be asked."""
        return None if self.calibration is None else self.calibration.threshold

    def to_files(self) -> dict[str, bytes]:
        """Return its files in a version, by name."""
        settings = {
            "format": _FORMAT,
            "class_names": list(self.class_names),
            "model": self.model.config.model_dump(mode="json"),
            "head_blocks": list(self.model.shape.head_blocks),
            "temperature": self.temperature,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        weights = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        return {
            LIGHT_FILE: save_tensors(weights),
            CASCADE_FILE: json.dumps(settings, indent=2).encode(),
        }

    @staticmethod
    def from_files(files: Mapping[str, bytes]) -> Light | None:
        """Rebuild what `to_files` gave; None where a version has no light model.

        Raises:
            LearningError: If a file is missing or damaged.
        """
        found = {LIGHT_FILE, CASCADE_FILE} & files.keys()
        if not found:
            return None
        if len(found) == 1:
            missing = ({LIGHT_FILE, CASCADE_FILE} - found).pop()
            raise LearningError(f"the version has {found.pop()} but lacks {missing}; restore it")
        try:
            return _rebuild(files)
        except (
            ValidationError,
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as e:
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise LearningError(
                f"the version's light model is damaged: {reason}; load another version, or "
                "restore this one"
            ) from e


def _rebuild(files: Mapping[str, bytes]) -> Light:
    settings: dict[str, Any] = json.loads(files[CASCADE_FILE])
    if settings["format"] != _FORMAT:
        raise ValueError(f"{CASCADE_FILE} has format {settings['format']}, not {_FORMAT}")
    config = ModelConfig.model_validate(settings["model"])
    model = Classifier(config, Shape(tuple(int(size) for size in settings["head_blocks"])))
    model.load_state_dict(load_tensors(files[LIGHT_FILE]))
    calibration = settings["calibration"]
    names = tuple(str(name) for name in settings["class_names"])
    if model.num_classes != len(names):
        raise ValueError(f"it has {model.num_classes} classes for {len(names)} names")
    return Light(
        model=model.eval(),
        class_names=names,
        temperature=float(settings["temperature"]),
        calibration=None if calibration is None else Calibration(**calibration),
    )


# -- teaching --------------------------------------------------------------------------------


def teach_light(
    teacher: Learner,
    training: Labelled,
    config: LearningConfig,
    run: Run,
    *,
    parent: Light | None = None,
    validation: Labelled | None = None,
) -> Light:
    """Train a light model on labels and on a learner's answers; see `CascadeConfig`.

    Args:
        teacher: The version's own model, whose memory is learned from beside the new examples.
        training: What the teacher was trained on: uint8 images and positions in its classes.
        config: `config.cascade`, and the seed.
        run: How it is carried out; not resumable, as it is brief.
        parent: The light model of the version before, which this one continues if it is of the
            same architecture.
        validation: Examples that calibrate its confidence; None takes it as it comes.

    Raises:
        LearningError: If training diverges.
    """
    cascade = config.cascade
    images, labels = _with_memory(teacher, training)
    model = _first(teacher, config, parent).to(run.device)
    teacher_model = teacher.model.copy().to(run.device)
    soft_NC = in_chunks(lambda x: teacher_model(x.to(run.device)), images) / teacher.temperature

    def distilled(logits_BC: Tensor, places_B: Tensor) -> Tensor:
        return distillation_loss(
            logits_BC, soft_NC[places_B.to(soft_NC.device)], cascade.temperature
        )

    weights_N = 1 / torch.bincount(labels).clamp(min=1).double()[labels]

    def by_class(generator: torch.Generator) -> list[Tensor]:
        drawn = torch.multinomial(weights_N, len(labels), replacement=True, generator=generator)
        return list(drawn.split(cascade.trainer.batch_size))

    model.learns_statistics = parent is None or not _continues(parent, model.config)
    train(
        model,
        images,
        labels,
        config=cascade.trainer,
        seed=config.seed,
        clock=run.clock,
        terms=(ExampleTerm("distillation", cascade.distillation_weight, distilled),),
        batches=by_class,
        collective=run.collective,
    )
    model.learns_statistics = False
    model = model.to("cpu").eval()
    temperature = 1.0
    if validation is not None:
        temperature = fit_temperature(in_chunks(model, validation[0]), validation[1])
    return Light(model, teacher.class_names, temperature)


def _with_memory(teacher: Learner, training: Labelled) -> Labelled:
    memory = teacher.memory
    is_update = teacher.num_updates > 0
    if not is_update or teacher.memory_stage or memory.inputs.dtype != torch.uint8:
        return training
    older = memory.updates < teacher.num_updates
    return (
        torch.cat([training[0], memory.inputs[older]]),
        torch.cat([training[1], memory.labels[older]]),
    )


def _first(teacher: Learner, config: LearningConfig, parent: Light | None) -> Classifier:
    """The light model before it is trained."""
    light = _config(config.cascade, teacher.model_config)
    num_classes = len(teacher.class_names)
    if parent is not None and _continues(parent, light):
        model = parent.model.copy()
        model.grow(num_classes, generator_for(config.seed, "light", num_classes))
        return model
    return build_model(light, num_classes, config.seed)


def _config(cascade: CascadeConfig, heavy: ModelConfig) -> ModelConfig:
    return ModelConfig(
        name="convnet",
        widths=cascade.widths,
        norm="batch",  # Which a convolution takes over where nothing is trained.
        pixels=heavy.pixels,
        image_size=heavy.image_size,
        channels=heavy.channels,
    )


def _continues(parent: Light, config: ModelConfig) -> bool:
    return parent.model.config == config


# -- trusting --------------------------------------------------------------------------------


def calibrate(
    light_NC: NDArray[np.float32],
    heavy_NC: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    choosing_N: NDArray[np.bool_],
    config: CascadeConfig,
) -> Calibration:
    """Find the least confidence at which a light model may answer.

    Harm is the share of all images that the light model answers, and answers wrongly, while the
    heavy one has them right. It is at least the accuracy lost, and it only grows as the threshold
    falls; therefore an upper bound of it that holds at every single threshold holds at the lowest
    one that keeps within the limit, too. Share and loss are measured on images that had no say.

    Args:
        light_NC: The light model's probabilities of hold-out images.
        heavy_NC: The heavy model's of the same.
        labels_N: Their classes.
        choosing_N: Which of them choose; the others measure.
        config: The limits.

    Source: Bates et al. 2021, "Distribution-Free, Risk-Controlling Prediction Sets",
    arXiv:2101.02703, with the exact binomial bound of Clopper and Pearson 1934.
    """
    confidence_N = light_NC.max(1)
    light_right_N = light_NC.argmax(1) == labels_N
    heavy_right_N = heavy_NC.argmax(1) == labels_N
    num_choosing, num_measuring = int(choosing_N.sum()), int((~choosing_N).sum())
    limit = config.max_accuracy_loss
    nothing = Calibration(None, "", None, None, None, num_choosing, num_measuring)
    least = harm_bound(0, num_choosing)
    if least > limit or not num_measuring:
        needed = num_needed(limit)
        return nothing.without_threshold(
            f"{num_choosing} hold-out images chose and {num_measuring} measured: even without a "
            f"mistake they show no loss below {least:.3f}, and {limit:g} needs {needed} of each"
        )
    harmed_N = heavy_right_N & ~light_right_N
    threshold = _lowest(confidence_N[choosing_N], harmed_N[choosing_N], limit)
    if threshold is None:
        return nothing.without_threshold(
            f"where it is surest the light model is already wrong too often for a loss of {limit:g}"
        )
    answers_N = confidence_N >= threshold
    measured_N = ~choosing_N
    lost_N = np.where(answers_N, heavy_right_N.astype(int) - light_right_N.astype(int), 0)
    found = Calibration(
        threshold=threshold,
        reason="",
        light_share=float(answers_N[measured_N].mean()),
        accuracy_loss=float(lost_N[measured_N].mean()),
        harm_bound=harm_bound(int((harmed_N & answers_N)[choosing_N].sum()), num_choosing),
        num_choosing=num_choosing,
        num_measuring=num_measuring,
    )
    assert found.light_share is not None
    assert found.accuracy_loss is not None
    if found.accuracy_loss > limit:
        return found.without_threshold(
            f"on images that had no say its answers lose {found.accuracy_loss:.4f}, above {limit:g}"
        )
    if found.light_share < config.min_light_share:
        return found.without_threshold(
            f"it would answer {found.light_share:.3f} of the images, below min_light_share "
            f"{config.min_light_share:g}"
        )
    return replace(
        found,
        reason=f"it answers {found.light_share:.3f} of the images at a loss of "
        f"{found.accuracy_loss:.4f}, measured on {num_measuring}; of {limit:g} allowed",
    )


def harm_bound(num_harmed: int, num_images: int) -> float:
    """Return the exact 95 % upper bound of a share of which so many were seen.

    >>> round(harm_bound(0, 299), 4)
    0.01
    >>> harm_bound(0, 0)
    1.0
    """
    if num_harmed >= num_images:
        return 1.0
    return float(betaincinv(num_harmed + 1, num_images - num_harmed, _CONFIDENCE))


def num_needed(limit: float) -> int:
    """Return the fewest images that can show, without a mistake, a share below `limit`.

    >>> num_needed(0.01)
    299
    """
    return int(np.ceil(np.log(1 - _CONFIDENCE) / np.log(1 - limit)))


def _lowest(
    confidence_N: NDArray[np.float32], harmed_N: NDArray[np.bool_], limit: float
) -> float | None:
    """The lowest confidence at which the bound of the harm keeps within the limit."""
    order = np.argsort(-confidence_N, kind="stable")
    falling_N, harm_N = confidence_N[order], np.cumsum(harmed_N[order])
    # Equal confidences answer together.
    is_last_N = np.append(falling_N[1:] < falling_N[:-1], True)
    lowest = None
    for place in np.flatnonzero(is_last_N):
        if harm_bound(int(harm_N[place]), len(order)) > limit:
            break
        lowest = float(falling_N[place])
    return lowest


# -- answering -------------------------------------------------------------------------------


class Cascade:
    """A light and a heavy model that answer as one.

    The light one answers in fp32, as it was calibrated. Safe to use from several threads.

    Attributes:
        class_names: The classes.
        precision: What the heavy model computes in.
    """

    def __init__(self, light: Light, heavy: Predictor) -> None:
        """Put the two together on the heavy one's device.

        Raises:
            ValueError: If the light model is not to be asked, or knows other classes.
        """
        if light.threshold is None or light.class_names != heavy.class_names:
            raise ValueError(
                f"a light model of classes {light.class_names} with threshold {light.threshold} "
                f"cannot answer for one of classes {heavy.class_names}; calibrate it beside it"
            )
        self.class_names = heavy.class_names
        self.precision: Precision = heavy.precision
        self._threshold = light.threshold
        self._light = Predictor(light, heavy.device)
        self._heavy = heavy

    def predict(self, images: NDArray[np.uint8]) -> Answers:
        """Answer a batch of (N, channels, height, width) uint8 images.

        Raises:
            ValueError: If the shape or type is not what the models take.
        """
        light = self._light.predict(images)
        sure_N = light.probabilities.max(1, initial=0.0) >= self._threshold
        if not sure_N.all():
            light.probabilities[~sure_N] = self._heavy.predict(images[~sure_N]).probabilities
        return replace(light, light=sure_N)

    def warm_up(
        self, batch_sizes: tuple[int, ...] = (1, 32), images: NDArray[np.uint8] | None = None
    ) -> None:
        """Answer some batches with each model; see `Predictor.warm_up`."""
        self._light.warm_up(batch_sizes, images)
        self._heavy.warm_up(batch_sizes, images)


def with_light(heavy: Predictor, light: Light | None) -> Answerer:
    """Return what answers for a version: both models where the light one is to be asked."""
    return heavy if light is None or light.threshold is None else Cascade(light, heavy)
