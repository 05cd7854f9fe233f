# Avalanche lives in an environment of its own, out of the type checker's sight.
# mypy: disable-error-code="import-not-found"
"""Run Avalanche's own strategies on a Split protocol, for comparison with this project's.

    .venv-avalanche/bin/python benchmarks/avalanche_peer.py --data mnist.npz --scenario class \
        --methods naive,derpp --order 0,1,2,3,4,5,6,7,8,9 --seed 0 --out peer.json

Runs in the environment that ``make avalanche`` makes and imports nothing of this project.
The data file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``; images are uint8. Where it
also holds ``t_train`` and ``t_test``, the experience of every example, nothing is cut or numbered
anew: so `benchmarks/continual.py` hands over the very experiences that it uses itself. The order
then only says of how many original classes the memory is.

The protocol: the classes, in the order given, are cut into experiences of equal size; every
experience gets exactly so many iterations; the network is a multilayer perceptron on pixels
from 0 to 1, with one head for all labels; Adam keeps its state from one experience to the
next, which is Avalanche's way. In the scenario ``class`` a label is the place of the class in
the order, in ``domain`` its place within its experience. With ``--precision bf16`` the network
runs under autocast while it trains, its logits and the losses in float32. The memory holds
`memory_per_class` examples times the number of original classes in either scenario, and is full
from the first experience on.

The settings of the strategies that the command starts with are the best of a few tries on Split
MNIST, judged on its test part, which favours Avalanche. DER++: (0.1, 0.5), (0.2, 1), (0.5, 1) and
(1, 1) for the two weights, which differ by less than a point. EWC: lambda 1e2, 1e4, 1e6. LwF: a
weight of 1 throughout, and of 4 for every past experience.

Writes JSON: ``accuracy[t][i]`` is the accuracy on the test part of experience i after
experience t, later ones included. Seconds are those of training with all that a strategy does
beside it (importances, memory, copies of the model), without evaluation. Examples seen count
those of training batches, remembered ones included.

Source: van de Ven et al. 2022, doi:10.1038/s42256-022-00568-3 (protocol).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

_TEST_CHUNK = 4_096


@dataclass(frozen=True)
class Settings:
    """What a run is made with.

    Attributes:
        scenario: ``class`` or ``domain``.
        num_experiences: The classes are cut into so many parts.
        num_iterations: Of each experience.
        memory_per_class: Remembered examples by original class, for the strategies that replay.
        seed: Of weights, batches and memory.
        order: The original classes in the order in which they come.
        hidden: Units of the hidden layers.
        learning_rate: Adam's.
        batch_size: New examples of a batch; as many remembered ones come on top.
        dark_alpha: DER++'s weight of the distance to stored logits, a mean over classes.
        dark_beta: DER++'s weight of the remembered labels.
        ewc_lambda: Times an importance that is the squared gradient of a batch's mean.
        lwf_alpha: Distillation weighs this much times the number of past experiences.
        lwf_temperature: Softens both answers; Avalanche has no squared factor.
        precision: ``fp32``, or ``bf16`` for the network's products while it trains.
        device: ``cpu`` or ``cuda``.
    """

    scenario: str
    num_experiences: int
    num_iterations: int
    memory_per_class: int
    seed: int
    order: tuple[int, ...]
    hidden: tuple[int, ...]
    learning_rate: float
    batch_size: int
    dark_alpha: float
    dark_beta: float
    ewc_lambda: float
    lwf_alpha: float
    lwf_temperature: float
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def memory_size(self) -> int:
        """Remembered examples in all."""
        return self.memory_per_class * len(self.order)

    @property
    def classes_per_experience(self) -> int:
        """Original classes of one experience."""
        return len(self.order) // self.num_experiences


@dataclass(frozen=True)
class Part:
    """Examples of one experience.

    Attributes:
        images: float32 from 0 to 1, (N, pixels).
        labels: int64, (N,).
    """

    images: Tensor
    labels: Tensor


class Rows(Dataset[tuple[Tensor, int]]):
    """A part in memory, cut into examples beforehand: Avalanche asks for them one by one.

    Attributes:
        targets: The labels, where Avalanche looks for them.
    """

    def __init__(self, part: Part) -> None:
        self._images = list(part.images)
        self.targets: list[int] = part.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], self.targets[index]


class StopAfter:
    """Ends an experience after so many iterations, and counts the examples shown.

    A plugin, which Avalanche calls by the names of its methods. The strategy must have epochs
    to spare: it forgets the request to stop only when it would begin another one.
    """

    supports_distributed = False

    def __init__(self, num_iterations: int) -> None:
        self._num_iterations = num_iterations
        self._done = 0
        self.total = 0
        self.samples_seen = 0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:  # noqa: ARG002 - a callback
        """Begin to count anew."""
        self._done = 0

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Count one iteration, and ask for the end after the last."""
        self._done += 1
        self.total += 1
        self.samples_seen += len(strategy.mb_y)
        if self._done == self._num_iterations:
            strategy.stop_training()


def load_parts(path: Path, settings: Settings) -> tuple[list[Part], list[Part]]:
    """Return training and test parts by experience.

    Raises:
        ValueError: If the order does not name each class of the file once, or cannot be cut.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if "t_train" in arrays:
        return _as_they_are(arrays, "train"), _as_they_are(arrays, "test")
    known = sorted(set(arrays["y_train"].tolist()))
    if sorted(settings.order) != known:
        raise ValueError(f"the order {list(settings.order)} must name each class of {known} once")
    if len(known) % settings.num_experiences:
        raise ValueError(
            f"{len(known)} classes cannot be cut into {settings.num_experiences} experiences of "
            "equal size; give a divisor"
        )
    return (
        _cut(arrays["x_train"], arrays["y_train"], settings),
        _cut(arrays["x_test"], arrays["y_test"], settings),
    )


def _as_they_are(arrays: dict[str, Any], part: str) -> list[Part]:
    images, labels, experiences = (arrays[f"{kind}_{part}"] for kind in "xyt")
    return [
        _part(images[experiences == experience], labels[experiences == experience])
        for experience in range(int(experiences.max()) + 1)
    ]


def _part(images: Any, labels: Any) -> Part:
    pixels = torch.from_numpy(images).flatten(1).float() / 255
    return Part(pixels, torch.from_numpy(labels))


def num_outputs(train_parts: list[Part]) -> int:
    """Width of the head: one output for every label that ever comes."""
    return 1 + max(int(part.labels.max()) for part in train_parts)


def _cut(images: Any, labels: Any, settings: Settings) -> list[Part]:
    place = np.zeros(max(settings.order) + 1, dtype=np.int64)
    place[list(settings.order)] = np.arange(len(settings.order))
    placed = place[labels.astype(np.int64)]
    parts = []
    for experience in range(settings.num_experiences):
        chosen = placed // settings.classes_per_experience == experience
        own = placed[chosen]
        if settings.scenario == "domain":
            own = own % settings.classes_per_experience
        parts.append(_part(images[chosen], own))
    return parts


class Trained(nn.Module):
    """A network whose products are in bf16 while it trains, as this project's trainer has it.

    Attributes:
        network: Its weights, and its answers otherwise, are in float32.
    """

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network = network
        self._device = device

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in float32."""
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self.training):
            logits: Tensor = self.network(images)
        return logits.float()


def build_network(num_pixels: int, width_out: int, settings: Settings) -> nn.Module:
    """Build the perceptron; its weights follow from the global random state."""
    layers: list[nn.Module] = []
    width = num_pixels
    for units in settings.hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    network = nn.Sequential(*layers, nn.Linear(width, width_out))
    return Trained(network, settings.device) if settings.precision == "bf16" else network


def _strategy(method: str, model: nn.Module, settings: Settings, stop: StopAfter) -> Any:
    from avalanche.training import supervised  # noqa: PLC0415 - seconds to import
    from avalanche.training.plugins import ReplayPlugin  # noqa: PLC0415 - as above
    from avalanche.training.storage_policy import (  # noqa: PLC0415 - as above
        ClassBalancedBuffer,
        ExperienceBalancedBuffer,
    )

    remembered = min(settings.batch_size, settings.memory_size)
    common: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=settings.learning_rate),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": settings.batch_size,
        "train_epochs": settings.num_iterations + 1,  # More than can be needed; see StopAfter.
        "device": settings.device,
        "plugins": [stop],
        "evaluator": None,
    }

    def replay() -> Any:
        # By label, the domain scenario's memory would know two groups, whatever they look like.
        kind = ClassBalancedBuffer if settings.scenario == "class" else ExperienceBalancedBuffer
        plugin = ReplayPlugin(
            mem_size=settings.memory_size,
            batch_size=settings.batch_size,
            batch_size_mem=remembered,
            storage_policy=kind(settings.memory_size, adaptive_size=True),
        )
        return supervised.Naive(**common | {"plugins": [plugin, stop]})

    makers: dict[str, Callable[[], Any]] = {
        "naive": lambda: supervised.Naive(**common),
        "er": replay,
        "derpp": lambda: supervised.DER(
            mem_size=settings.memory_size,
            batch_size_mem=remembered,
            alpha=settings.dark_alpha,
            beta=settings.dark_beta,
            **common,
        ),
        "ewc": lambda: supervised.EWC(
            ewc_lambda=settings.ewc_lambda, mode="online", decay_factor=1.0, **common
        ),
        "lwf": lambda: supervised.LwF(
            alpha=[settings.lwf_alpha * past for past in range(settings.num_experiences)],
            temperature=settings.lwf_temperature,
            **common,
        ),
    }
    return makers[method]()


METHODS = ("naive", "derpp", "er", "ewc", "lwf")


def run_method(
    method: str, train_parts: list[Part], test_parts: list[Part], settings: Settings
) -> dict[str, Any]:
    """Train one strategy on all experiences and return its figures."""
    from avalanche.benchmarks import benchmark_from_datasets  # noqa: PLC0415 - as above
    from avalanche.benchmarks.utils import (  # noqa: PLC0415 - as above
        _make_taskaware_classification_dataset,
    )

    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    stop = StopAfter(settings.num_iterations)
    model = build_network(train_parts[0].images.shape[1], num_outputs(train_parts), settings)
    model.to(settings.device)
    strategy = _strategy(method, model, settings, stop)
    datasets = [_make_taskaware_classification_dataset(Rows(part)) for part in train_parts]
    stream = benchmark_from_datasets(train=datasets).streams["train"]
    rows: list[list[float]] = []
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    for part, experience in zip(train_parts, stream, strict=True):
        # A part of less than a batch would be dropped whole.
        drops = len(part.labels) >= settings.batch_size
        began, cpu_began = time.perf_counter(), time.process_time()
        strategy.train(experience, eval_streams=[], num_workers=0, drop_last=drops)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        cpu_seconds.append(time.process_time() - cpu_began)
        seconds.append(time.perf_counter() - began)
        rows.append([accuracy(strategy.model, tested) for tested in test_parts])
    expected = settings.num_iterations * len(train_parts)
    if stop.total != expected:
        raise RuntimeError(f"{method} ran {stop.total} iterations, not {expected}")
    sizes = [len(part.labels) for part in test_parts]
    return {
        "accuracy": rows,
        "final_accuracy": float(np.dot(rows[-1], sizes) / sum(sizes)),
        "train_seconds": sum(seconds),
        "train_cpu_seconds": sum(cpu_seconds),
        "train_seconds_by_experience": seconds,
        "train_cpu_seconds_by_experience": cpu_seconds,
        "iterations": stop.total,
        "samples_seen": stop.samples_seen,
    }


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return the share of a part's examples that the model gets right."""
    model.eval()
    device = next(model.parameters()).device
    answers = torch.cat(
        [model(piece.to(device)).argmax(1).cpu() for piece in part.images.split(_TEST_CHUNK)]
    )
    return float((answers == part.labels).float().mean())


def main() -> None:
    """Read the arguments, run the methods one after the other, write the JSON."""
    parser = argparse.ArgumentParser(description="Avalanche's strategies on a Split protocol.")
    parser.add_argument("--data", type=Path, required=True, help="npz file")
    parser.add_argument("--scenario", choices=("class", "domain"), default="class")
    parser.add_argument("--experiences", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--iterations", type=int, default=250, help="of each experience")
    parser.add_argument("--memory-per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", default="0,1,2,3,4,5,6,7,8,9", help="classes as they come")
    parser.add_argument("--hidden", default="400,400", help="units of the hidden layers")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dark-alpha", type=float, default=0.2, help="DER++: stored logits")
    parser.add_argument("--dark-beta", type=float, default=1.0, help="DER++: remembered labels")
    parser.add_argument("--ewc-lambda", type=float, default=1e6)
    parser.add_argument("--lwf-alpha", type=float, default=4.0, help="times past experiences")
    parser.add_argument("--lwf-temperature", type=float, default=2.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    given = parser.parse_args()
    methods = given.methods.split(",")
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        parser.error(f"unknown method {unknown[0]}; choose from {', '.join(METHODS)}")
    if given.memory_per_class < 1 and {"er", "derpp"} & set(methods):
        parser.error("er and derpp replay, and need --memory-per-class of at least 1")
    settings = Settings(
        scenario=given.scenario,
        num_experiences=given.experiences,
        num_iterations=given.iterations,
        memory_per_class=given.memory_per_class,
        seed=given.seed,
        order=tuple(int(part) for part in given.order.split(",")),
        hidden=tuple(int(part) for part in given.hidden.split(",") if part),
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
        dark_alpha=given.dark_alpha,
        dark_beta=given.dark_beta,
        ewc_lambda=given.ewc_lambda,
        lwf_alpha=given.lwf_alpha,
        lwf_temperature=given.lwf_temperature,
        precision=given.precision,
        device=given.device,
    )
    try:
        train_parts, test_parts = load_parts(given.data, settings)
    except ValueError as error:
        parser.error(str(error))
    figures = {}
    for method in methods:
        with warnings.catch_warnings(record=True):  # Avalanche's own, of its deprecated parts.
            figures[method] = run_method(method, train_parts, test_parts, settings)
        print(
            f"avalanche {method}: {figures[method]['final_accuracy']:.3f} in "
            f"{figures[method]['train_seconds']:.1f} s",
            file=sys.stderr,
        )
    report = {
        "library": f"avalanche-lib {version('avalanche-lib')}",
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "memory_size": settings.memory_size,
        "num_test_examples": [len(part.labels) for part in test_parts],
        "methods": figures,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
