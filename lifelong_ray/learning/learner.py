"""What a version carries: a model and everything its next update needs to remember.

Knows the bytes of a version; does not know where they are stored. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from lifelong_ray.learning.fisher import Fisher
from lifelong_ray.learning.model import Classifier, in_chunks
from lifelong_ray.learning.replay import ReplayMemory
from lifelong_ray.types import LearningError

MODEL_FILE = "model.safetensors"
LEARNER_FILE = "learner.safetensors"
MEMORY_FILE = "memory.parquet"
SETTINGS_FILE = "learner.json"

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Learner:
    """A model and its memory of what it learned.

    Attributes:
        model: In eval mode, on the CPU.
        class_names: The classes, in the order of the logits.
        fisher: Importance of each weight, at `anchor`.
        sums: The analytic head's sums over everything seen.
        memory: Remembered examples.
        temperature: Divides the logits, so that confidences are meaningful.
        sums_exact: Whether `sums` are over every example ever seen, with the features of this
            backbone; else they were re-estimated from memory after the backbone moved.
    """

    model: Classifier
    class_names: tuple[str, ...]
    fisher: Fisher
    sums: AnalyticSums
    memory: ReplayMemory
    temperature: float
    sums_exact: bool

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The weights that EWC holds on to: those this learner ended with."""
        return {name: weight.detach() for name, weight in self.model.named_parameters()}

    def logits(self, images: Tensor) -> Tensor:
        """Return calibrated logits (N, C) for uint8 images (N, channels, height, width)."""
        return in_chunks(self.model, images) / self.temperature

    def to_files(self) -> dict[str, bytes]:
        """Return the files of a version, by name."""
        settings = {
            "format": _FORMAT,
            "class_names": list(self.class_names),
            "model": self.model.config.model_dump(mode="json"),
            "head_blocks": list(self.model.head.blocks),
            "num_random_features": self.model.num_random_features,
            "active_head": self.model.active_head,
            "temperature": self.temperature,
            "sums_exact": self.sums_exact,
            "fisher_estimator": self.fisher.estimator,
            "num_fisher_examples": self.fisher.num_examples,
        }
        weights = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        remembered = {
            "sums.gram": self.sums.gram,
            "sums.class_sums": self.sums.class_sums,
            "sums.counts": self.sums.counts,
            "memory.seen": self.memory.seen,
        } | {f"fisher.{name}": value for name, value in self.fisher.values.items()}
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
    if settings["format"] != _FORMAT:
        raise LearningError(
            f"{SETTINGS_FILE} has format {settings['format']} and this program reads {_FORMAT}; "
            "use the program that wrote it"
        )
    class_names = tuple(str(name) for name in settings["class_names"])
    model = Classifier(
        ModelConfig.model_validate(settings["model"]),
        len(class_names),
        int(settings["num_random_features"]),
        head_blocks=tuple(int(size) for size in settings["head_blocks"]),
    )
    if model.num_classes != len(class_names):
        raise ValueError(f"the head has {model.num_classes} classes for {len(class_names)} names")
    model.load_state_dict(load_tensors(files[MODEL_FILE]))
    if settings["active_head"] not in ("linear", "analytic"):
        raise ValueError(f"active_head is {settings['active_head']!r}, not linear or analytic")
    model.active_head = settings["active_head"]
    tensors = load_tensors(files[LEARNER_FILE])
    prefix = "fisher."
    fisher = Fisher(
        {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
        settings["fisher_estimator"],
        int(settings["num_fisher_examples"]),
    )
    sums = AnalyticSums(tensors["sums.gram"], tensors["sums.class_sums"], tensors["sums.counts"])
    expected = (model.num_random_features, len(class_names))
    if tuple(sums.class_sums.shape) != expected:
        raise ValueError(
            f"the analytic sums have shape {tuple(sums.class_sums.shape)}, the model {expected}"
        )
    memory = _memory_from_parquet(files[MEMORY_FILE], tensors["memory.seen"])
    return Learner(
        model=model.eval(),
        class_names=class_names,
        fisher=fisher.for_model(model),
        sums=sums,
        memory=memory,
        temperature=float(settings["temperature"]),
        sums_exact=bool(settings["sums_exact"]),
    )


def _memory_to_parquet(memory: ReplayMemory) -> bytes:
    table = pa.table(
        {
            "label": pa.array(memory.labels.numpy(), pa.int64()),
            "pixels": pa.array([image.numpy().tobytes() for image in memory.images], pa.binary()),
        }
    ).replace_schema_metadata({"shape": json.dumps(list(memory.images.shape[1:]))})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _memory_from_parquet(data: bytes, seen_C: Tensor) -> ReplayMemory:
    table = pq.read_table(pa.BufferReader(data))
    shape = json.loads(table.schema.metadata[b"shape"])
    labels = torch.tensor(table.column("label").to_pylist(), dtype=torch.int64)
    pixels = bytearray().join(table.column("pixels").to_pylist())
    images = torch.zeros((0, *shape), dtype=torch.uint8)
    if len(labels):
        images = torch.frombuffer(pixels, dtype=torch.uint8).reshape(len(labels), *shape)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(seen_C):
        raise ValueError(f"the memory has a label outside the {len(seen_C)} classes")
    return ReplayMemory(images, labels, seen_C)
