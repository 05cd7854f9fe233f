"""What a version carries: a model and everything its next update needs to remember.

Knows the bytes of a version; does not know where they are stored. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.checks import check_images
from lifelong_ray.learning.fisher import Fisher, fit_to_model
from lifelong_ray.learning.model import Classifier, Head, Shape, Source, in_chunks
from lifelong_ray.learning.replay import ReplayMemory
from lifelong_ray.types import LearningError

MODEL_FILE = "model.safetensors"
LEARNER_FILE = "learner.safetensors"
MEMORY_FILE = "memory.parquet"
SETTINGS_FILE = "learner.json"

_FORMAT = 3
_READABLE = (2, _FORMAT)
_MEMORY_TYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Learner:
    """A model and its memory of what it learned.

    Attributes:
        model: In eval mode, on the CPU.
        class_names: The classes, in the order of the logits.
        fisher: Importance of each weight, at `anchor`.
        anchor: The weights that EWC holds on to.
        sums: The analytic head's sums over everything seen.
        memory: Remembered examples.
        class_means: Mean backbone features by class (C, D), of the examples that brought it.
        temperature: Divides the logits, so that confidences are meaningful.
        sums_exact: Whether `sums` are over every example ever seen, with the features of this
            backbone; else they were re-estimated from memory after the backbone moved.
        ridge: The analytic head's regularisation.
        num_updates: Updates since the base training.
        memory_stage: Stages that the memory's inputs have passed; 0 for images.
        slow_losses: Updates in a row whose slow path was tried and was not the better one.
        slow_rest: Updates that the slow path still sits out for it.
    """

    model: Classifier
    class_names: tuple[str, ...]
    fisher: Fisher
    anchor: dict[str, Tensor]
    sums: AnalyticSums
    memory: ReplayMemory
    class_means: Tensor
    temperature: float
    sums_exact: bool
    ridge: float = 0.0
    num_updates: int = 0
    memory_stage: int = 0
    slow_losses: int = 0
    slow_rest: int = 0

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    def logits(self, images: Tensor) -> Tensor:
        """Return calibrated logits (N, C) for uint8 images (N, channels, height, width).

        Raises:
            LearningError: If the images are others.
        """
        check_images(images, self.model_config, "images")
        return in_chunks(self.model, images) / self.temperature

    def to_files(self) -> dict[str, bytes]:
        """Return the files of a version, by name."""
        settings = {
            "format": _FORMAT,
            "class_names": list(self.class_names),
            "model": self.model.config.model_dump(mode="json"),
            "shape": asdict(self.model.shape),
            "active_head": self.model.active_head,
            "analytic_weight": self.model.analytic_weight,
            "temperature": self.temperature,
            "sums_exact": self.sums_exact,
            "ridge": self.ridge,
            "num_updates": self.num_updates,
            "memory_stage": self.memory_stage,
            "slow_losses": self.slow_losses,
            "slow_rest": self.slow_rest,
            "fisher_estimator": self.fisher.estimator,
            "num_fisher_examples": self.fisher.num_examples,
        }
        weights = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        remembered = {
            "sums.gram": self.sums.gram,
            "sums.class_sums": self.sums.class_sums,
            "sums.counts": self.sums.counts,
            "sums.history": self.sums.history,
            "memory.seen": self.memory.seen,
            "memory.updates": self.memory.updates,
            "memory.logits": self.memory.logits,
            "memory.stands_for": self.memory.weights(),
            "class_means": self.class_means,
        }
        remembered |= {f"fisher.{name}": value for name, value in self.fisher.values.items()}
        # Mostly the weights themselves, which are not kept twice.
        own = {name: weight.detach() for name, weight in self.model.named_parameters()}
        remembered |= {
            f"anchor.{name}": value
            for name, value in self.anchor.items()
            if not (name in own and torch.equal(value, own[name]))
        }
        return {
            MODEL_FILE: save_tensors(weights),
            LEARNER_FILE: save_tensors({k: t.cpu().contiguous() for k, t in remembered.items()}),
            MEMORY_FILE: _memory_to_parquet(self.memory),
            SETTINGS_FILE: json.dumps(settings, indent=2).encode(),
        }

    @staticmethod
    def from_files(files: Mapping[str, bytes]) -> Learner:
        """Rebuild a learner from what `to_files` gave.

        Raises:
            LearningError: If a file is missing, damaged or does not fit the others.
        """
        missing = {MODEL_FILE, LEARNER_FILE, MEMORY_FILE, SETTINGS_FILE} - files.keys()
        if missing:
            raise LearningError(
                f"the version lacks {sorted(missing)[0]}; it has {sorted(files)}; restore it"
            )
        try:
            return _rebuild(files)
        except (
            ValidationError,
            SafetensorError,
            pa.ArrowException,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise LearningError(
                f"the version's files are damaged or do not fit together: {reason}; "
                "load another version, or restore this one"
            ) from error


def _rebuild(files: Mapping[str, bytes]) -> Learner:
    settings: dict[str, Any] = json.loads(files[SETTINGS_FILE])
    if settings["format"] not in _READABLE:
        raise LearningError(
            f"{SETTINGS_FILE} has format {settings['format']} and this program reads "
            f"{' and '.join(map(str, _READABLE))}; use the program that wrote it"
        )
    if settings["format"] < _FORMAT and settings["shape"]["source"] == "stages":
        raise LearningError(
            f"{SETTINGS_FILE} has format {settings['format']}, and since format {_FORMAT} an "
            "analytic head over stages looks at them at length one; train a new base version, or "
            "use the program that wrote it"
        )
    class_names = tuple(str(name) for name in settings["class_names"])
    config = ModelConfig.model_validate(settings["model"])
    # The weights are all in the version: nothing is fetched to rebuild it.
    model = Classifier(config.model_copy(update={"weights": ""}), _shape(settings["shape"]))
    model.config = config
    if model.num_classes != len(class_names):
        raise ValueError(f"the head has {model.num_classes} classes for {len(class_names)} names")
    model.load_state_dict(load_tensors(files[MODEL_FILE]))
    if settings["active_head"] not in get_args(Head):
        raise ValueError(f"active_head is {settings['active_head']!r}, not one of {get_args(Head)}")
    model.active_head = settings["active_head"]
    model.analytic_weight = float(settings["analytic_weight"])
    tensors = load_tensors(files[LEARNER_FILE])
    fisher = Fisher(
        _beginning_with("fisher.", tensors),
        settings["fisher_estimator"],
        int(settings["num_fisher_examples"]),
    )
    sums = AnalyticSums(
        gram=tensors["sums.gram"],
        class_sums=tensors["sums.class_sums"],
        counts=tensors["sums.counts"],
        mode_class=model.analytic.mode_class.clone(),
        num_classes=len(class_names),
        history=tensors.get("sums.history", torch.zeros(0, 0, dtype=torch.int64)),
    )
    expected = (model.num_random_features, len(sums.mode_class))
    if tuple(sums.class_sums.shape) != expected:
        raise ValueError(
            f"the analytic sums have shape {tuple(sums.class_sums.shape)}, the model {expected}"
        )
    own = {name: weight.detach() for name, weight in model.named_parameters()}
    return Learner(
        model=model.eval(),
        class_names=class_names,
        fisher=fisher.for_model(model),
        anchor=fit_to_model(own | _beginning_with("anchor.", tensors), model, "anchor"),
        sums=sums,
        memory=_memory_from_parquet(files[MEMORY_FILE], tensors),
        class_means=tensors["class_means"],
        temperature=float(settings["temperature"]),
        sums_exact=bool(settings["sums_exact"]),
        ridge=float(settings["ridge"]),
        num_updates=int(settings["num_updates"]),
        memory_stage=int(settings["memory_stage"]),
        slow_losses=int(settings["slow_losses"]),
        slow_rest=int(settings["slow_rest"]),
    )


def _shape(settings: dict[str, Any]) -> Shape:
    if settings["source"] not in get_args(Source):
        raise ValueError(f"the analytic head looks at {settings['source']!r}, which is nothing")
    return Shape(
        head_blocks=tuple(int(size) for size in settings["head_blocks"]),
        num_random_features=int(settings["num_random_features"]),
        source=settings["source"],
        mirrored=bool(settings.get("mirrored", False)),  # Older versions never are.
        mode_class=tuple(int(c) for c in settings["mode_class"]),
        branch_starts=tuple(int(stage) for stage in settings["branch_starts"]),
        branch_blocks=tuple(tuple(int(n) for n in blocks) for blocks in settings["branch_blocks"]),
    )


def _beginning_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _memory_to_parquet(memory: ReplayMemory) -> bytes:
    table = pa.table(
        {
            "label": pa.array(memory.labels.numpy(), pa.int64()),
            "input": pa.array([one.numpy().tobytes() for one in memory.inputs], pa.binary()),
        }
    )
    facts = {
        "shape": json.dumps(list(memory.inputs.shape[1:])),
        "dtype": str(memory.inputs.dtype).removeprefix("torch."),
    }
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(facts), sink, compression="zstd")
    return sink.getvalue()


def _memory_from_parquet(data: bytes, tensors: Mapping[str, Tensor]) -> ReplayMemory:
    table = pq.read_table(pa.BufferReader(data))
    shape = json.loads(table.schema.metadata[b"shape"])
    dtype = _MEMORY_TYPES[table.schema.metadata[b"dtype"].decode()]
    labels = torch.tensor(table.column("label").to_pylist(), dtype=torch.int64)
    content = bytearray().join(table.column("input").to_pylist())
    inputs = torch.zeros((0, *shape), dtype=dtype)
    if len(labels):
        inputs = torch.frombuffer(content, dtype=dtype).reshape(len(labels), *shape)
    seen_C = tensors["memory.seen"]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(seen_C):
        raise ValueError(f"the memory has a label outside the {len(seen_C)} classes")
    return ReplayMemory(
        inputs=inputs,
        labels=labels,
        updates=tensors["memory.updates"],
        logits=tensors["memory.logits"],
        seen=seen_C,
        stands_for=tensors["memory.stands_for"],
    )
