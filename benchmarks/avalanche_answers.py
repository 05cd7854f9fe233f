# Avalanche lives in an environment of its own, out of the type checker's sight.
# mypy: disable-error-code="import-not-found"
"""Avalanche's side of `avalanche_oracle`: answers each question with Avalanche's own classes.

    .venv-avalanche/bin/python benchmarks/avalanche_answers.py questions.pt answers.pt

Runs in the environment that ``make avalanche`` makes and imports nothing of this project. Both
files hold a dictionary by topic of tensors, numbers and lists. Knows how to make Avalanche
compute something, and not what it is compared with.

Axes: N examples, B examples of a batch, C classes, D features, T updates.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as make_dataset
from avalanche.evaluation.metrics import BWT, Accuracy, Forgetting, ForwardTransfer, Mean
from avalanche.training.plugins import EWCPlugin
from avalanche.training.regularization import LearningWithoutForgetting
from avalanche.training.storage_policy import HerdingSelectionStrategy
from avalanche.training.supervised import DER
from avalanche.training.supervised.icarl import _ICaRLPlugin
from torch import Tensor, nn

Topic = dict[str, Any]


def importances(question: Topic) -> Topic:
    """Rebuild a network, and return its logits and EWC's importances at some batch sizes.

    Asked with: layers, weights (in the order of the network's parameters), images (float),
    labels, and runs of a batch size and an order of the examples. Importances come back per
    run, in the order of the weights.
    """
    network = _rebuilt(question["layers"])
    with torch.no_grad():
        for parameter, weight in zip(network.parameters(), question["weights"], strict=True):
            parameter.copy_(weight)
    plugin = EWCPlugin(ewc_lambda=1.0)
    found = []
    for run in question["runs"]:
        order = run["order"]
        found.append(
            plugin.compute_importances(
                network,
                nn.CrossEntropyLoss(),
                torch.optim.SGD(network.parameters(), lr=0.1),
                make_dataset(question["images"][order], question["labels"][order]),
                "cpu",
                run["batch_size"],
            )
        )
    network.eval()
    with torch.no_grad():
        logits_NC = network(question["images"])
    return {
        "logits": logits_NC,
        "importances": [[value.data.clone() for value in one.values()] for one in found],
    }


def _rebuilt(layers: list[Any]) -> nn.Sequential:
    makers: dict[str, Any] = {
        "flatten": nn.Flatten,
        "linear": nn.Linear,
        "relu": nn.ReLU,
        "conv": lambda channels, width: nn.Conv2d(channels, width, 3, padding=1),
        "group_norm": nn.GroupNorm,
        "max_pool": nn.MaxPool2d,
        "grid": nn.AdaptiveAvgPool2d,
    }
    return nn.Sequential(*(makers[name](*arguments) for name, *arguments in layers))


def _matrix(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def penalty(question: Topic) -> Topic:
    """Return EWC's penalty, at lambda 1, of one matrix of weights with known importances."""
    layer = _matrix(question["now"])
    plugin = EWCPlugin(ewc_lambda=1.0)
    plugin.importances[0]["weight"] = question["importance"]
    plugin.saved_params[0]["weight"] = question["anchor"]
    strategy = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=1),
        model=layer,
        device="cpu",
        loss=torch.zeros(()),
    )
    plugin.before_backward(strategy)
    return {"value": strategy.loss.detach()}


def distillation(question: Topic) -> Topic:
    """Return LwF's loss at some temperatures, the first classes being the known ones."""
    values = []
    for temperature in question["temperatures"]:
        lwf = LearningWithoutForgetting(alpha=1, temperature=temperature)
        # As after an experience: the old model, which here gives back what it is shown.
        lwf.prev_model = nn.Identity()
        lwf.prev_classes_by_task[0] = set(range(question["num_known"]))
        values.append(lwf(question["teacher"], question["logits"], nn.Identity()))
    return {"values": values}


class _Caught:
    """Keeps what a strategy had in hand when it computed the loss of its last iteration."""

    supports_distributed = False

    def before_backward(self, strategy: Any, **_: Any) -> None:
        self.loss = strategy.loss.detach().clone()
        self.logits = strategy.mb_output.detach().clone()
        self.labels = strategy.mb_y.clone()
        self.stored = getattr(strategy, "batch_logits", None)


def dark(question: Topic) -> Topic:
    """Run DER++ over two experiences of one batch each, and return the last loss's parts.

    The network is one linear layer without learning, doubled in between: logits are stored of
    the first and compared with those of the second.
    """
    runs = []
    for alpha, beta in question["weights"]:
        torch.manual_seed(0)
        network = _matrix(question["matrix"])
        caught, size = _Caught(), question["batch_size"]
        strategy = DER(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
            mem_size=size,
            batch_size_mem=size,
            alpha=alpha,
            beta=beta,
            train_mb_size=size,
            train_epochs=1,
            plugins=[caught],
            evaluator=None,
        )
        parts = [
            make_dataset(x, y) for x, y in zip(question["inputs"], question["labels"], strict=True)
        ]
        for experience in benchmark_from_datasets(train=parts).streams["train"]:
            strategy.train(experience, eval_streams=[])
            with torch.no_grad():
                network.weight.mul_(2)
        runs.append(
            {
                "loss": caught.loss,
                "logits": caught.logits,
                "labels": caught.labels,
                "stored": caught.stored,
                "num_remembered": size,
            }
        )
    return {"runs": runs}


def metrics(question: Topic) -> Topic:
    """Return the sequence metrics of accuracy matrices: means over Avalanche's own keys."""
    answers = []
    for case in question["cases"]:
        rows, untrained = case["rows"], case["untrained"]
        last = len(rows) - 1
        forgetting, backward, forward = Forgetting(), BWT(), ForwardTransfer()
        for i in range(len(rows)):
            forward.update(i, untrained[i], initial=True)
        for t, row in enumerate(rows):
            for metric in (forgetting, backward):
                metric.reset_last()
                for i, value in enumerate(row[: t + 1]):
                    metric.update(i, value, initial=i == t)
            if t < last:
                forward.update(t + 1, row[t + 1])
        pooled = Accuracy()
        for size, value in zip(case["num_examples"], rows[last], strict=True):
            answers_N = torch.zeros(size, dtype=torch.int64)
            answers_N[: round(size * value)] = 1
            pooled.update(answers_N, torch.ones_like(answers_N))
        answers.append(
            {
                "forgetting": _mean(forgetting.result()),
                "backward_transfer": _mean(backward.result()),
                "forward_transfer": _mean(forward.result()),
                "stream_accuracy": pooled.result(),
            }
        )
    return {"cases": answers}


def _mean(by_experience: dict[int, float]) -> float:
    mean = Mean()
    for value in by_experience.values():
        mean.update(value)
    return float(mean.result())


def herding(question: Topic) -> Topic:
    """Return the order of the herding strategy, and the choice of iCaRL's plugin in its order.

    The plugin shows its choice sorted by position, with the rank beside it.
    """
    greedy = HerdingSelectionStrategy.__new__(HerdingSelectionStrategy)  # It wants a network.
    features_ND, num_chosen = question["features"], question["num_chosen"]
    unit_ND = nn.functional.normalize(features_ND, dim=1)
    positions_N1 = torch.arange(len(features_ND), dtype=features_ND.dtype)[:, None]
    plugin = _ICaRLPlugin(memory_size=num_chosen, fixed_memory=True)
    plugin.observed_classes = [0]
    strategy = SimpleNamespace(
        experience=SimpleNamespace(
            benchmark=SimpleNamespace(n_classes_per_exp=[1], classes_order=[0]),
            dataset=make_dataset(
                torch.cat([features_ND, positions_N1], dim=1),
                torch.zeros(len(features_ND), dtype=torch.int64),
            ),
        ),
        clock=SimpleNamespace(train_exp_counter=0),
        model=SimpleNamespace(feature_extractor=lambda rows: rows[:, :-1]),
        device="cpu",
        eval_mb_size=len(features_ND),
    )
    plugin.construct_exemplar_set(strategy)
    chosen = plugin.x_memory[0][:, -1].long()
    return {
        "greedy_unit": greedy.make_sorted_indices_from_features(unit_ND),
        "greedy_raw": greedy.make_sorted_indices_from_features(features_ND),
        "icarl": chosen[plugin.order[0].argsort()],
    }


def main() -> None:
    """Answer the questions of one file in another."""
    asked, answered = (Path(argument) for argument in sys.argv[1:3])
    questions: dict[str, Topic] = torch.load(asked, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Avalanche's own, of its deprecated parts.
        answers: dict[str, Topic] = {
            "mlp": importances(questions["mlp"]),
            "convnet": importances(questions["convnet"]),
            "penalty": penalty(questions["penalty"]),
            "distillation": distillation(questions["distillation"]),
            "dark": dark(questions["dark"]),
            "metrics": metrics(questions["metrics"]),
            "herding": herding(questions["herding"]),
            "versions": {"avalanche": version("avalanche-lib"), "torch": str(torch.__version__)},
        }
    torch.save(answers, answered)


if __name__ == "__main__":
    main()
