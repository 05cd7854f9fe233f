"""Compare what this project computes with what Avalanche computes, quantity by quantity.

    python benchmarks/avalanche_oracle.py --out benchmarks/results/avalanche_oracle.json

Makes small random cases, has `avalanche_answers` answer them with Avalanche's classes in the
environment that ``make avalanche`` makes, and holds this project's answers against them. Some
quantities must be equal, some must stand in a known ratio, and some differ by definition: those
are measured and said, not forced. Exits with 1 if one that must agree does not.

Axes: N examples, B examples of a batch, C classes, D features, T updates.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning.fisher import estimate_fisher
from lifelong_ray.learning.history import History
from lifelong_ray.learning.model import Classifier, build_model
from lifelong_ray.learning.penalties import dark_loss, distillation_loss, ewc_penalty
from lifelong_ray.learning.replay import ReplayMemory, herding_order

Topic = dict[str, Any]

_NETWORKS = {
    "mlp": ModelConfig(name="mlp", widths=(32, 24), image_size=12),
    "convnet": ModelConfig(name="convnet", widths=(8, 16), image_size=12),
}
_NUM_CLASSES, _NUM_EXAMPLES, _BATCH_SIZE, _NUM_ORDERS = 5, 256, 16, 12
_NUM_CHOSEN = 20


@dataclass(frozen=True)
class Comparison:
    """One quantity, computed twice.

    Attributes:
        what: The quantity, and how the two should relate.
        difference: The largest difference found.
        tolerance: What rounding may make of equality; None where the two differ by definition.
        note: What the difference is relative to, or why there is one.
    """

    what: str
    difference: float
    tolerance: float | None
    note: str

    @property
    def verdict(self) -> str:
        """Whether they agree, and whether they should."""
        if self.tolerance is None:
            return "differs by definition"
        return "agrees" if self.difference <= self.tolerance else "DISAGREES"


# ---------------------------------------------------------------- EWC


def _network(name: str) -> Classifier:
    return build_model(_NETWORKS[name], _NUM_CLASSES, seed=1).eval()


def _examples(name: str) -> tuple[Tensor, Tensor]:
    """Images that lean towards their class, so that gradients have a mean of their own."""
    generator = torch.Generator().manual_seed(2)
    config = _NETWORKS[name]
    side = config.image_size
    labels_N = torch.randint(_NUM_CLASSES, (_NUM_EXAMPLES,), generator=generator)
    noise = torch.randint(0, 200, (_NUM_EXAMPLES, 1, side, side), generator=generator)
    return (noise + 10 * labels_N[:, None, None, None]).to(torch.uint8), labels_N


def _orders() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(_NUM_EXAMPLES, generator=generator) for _ in range(_NUM_ORDERS)]


def ask_importances(name: str) -> Topic:
    """Return the question of EWC's importances on one of the networks."""
    model, (images, labels_N) = _network(name), _examples(name)
    singly = {"batch_size": 1, "order": torch.arange(_NUM_EXAMPLES)}
    batched = [{"batch_size": _BATCH_SIZE, "order": order} for order in _orders()]
    return {
        "layers": _plan(model),
        "weights": [weight.detach() for weight in model.parameters()],
        "images": images.float() / 255,
        "labels": labels_N,
        "runs": [singly, *batched],
    }


def _plan(model: Classifier) -> list[list[Any]]:
    """What to rebuild the network from, layer by layer, in the order of its parameters."""
    plan: list[list[Any]] = []
    for stage in model.stages:
        assert isinstance(stage, nn.Sequential)
        for layer in stage:
            match layer:
                case nn.Linear():
                    plan.append(["linear", layer.in_features, layer.out_features])
                case nn.Conv2d():
                    plan.append(["conv", layer.in_channels, layer.out_channels])
                case nn.GroupNorm():
                    plan.append(["group_norm", layer.num_groups, layer.num_channels])
                case nn.MaxPool2d():
                    plan.append(["max_pool", layer.kernel_size])
                case _:
                    plan.append([type(layer).__name__.lower()])
    if model.config.name == "convnet":
        plan += [["grid", model.config.pool_size], ["flatten"]]
    return [*plan, ["linear", model.head.in_features, model.head.out_features]]


def compare_importances(name: str, answer: Topic) -> list[Comparison]:
    """Compare the Fisher with Avalanche's importances, by example and by batch."""
    model, (images, labels_N) = _network(name), _examples(name)
    with torch.no_grad():
        logits_NC = model.trained_logits(images)
    fisher = estimate_fisher(
        model, images, labels_N, estimator="empirical", generator=torch.Generator().manual_seed(0)
    )
    ours = [fisher.values[key] for key, _ in model.named_parameters()]
    singly, *batched = answer["importances"]
    # Batches drawn without replacement: what the square of their mean is on average follows
    # from the mean square and the square of the mean of all.
    of_mean = _batch_squares(model, images, labels_N, _NUM_EXAMPLES, torch.arange(_NUM_EXAMPLES))
    rest = (_NUM_EXAMPLES - _BATCH_SIZE) / (_NUM_EXAMPLES - 1) / _BATCH_SIZE
    expected = _total(of_mean) + (_total(ours) - _total(of_mean)) * rest
    measured = sum(_total(one) for one in batched) / len(batched)
    by_hand = _batch_squares(model, images, labels_N, _BATCH_SIZE, _orders()[0])
    return [
        Comparison(
            f"{name}: logits of the network rebuilt with the same weights are equal",
            float((logits_NC - answer["logits"]).abs().max()),
            1e-5,
            "absolute",
        ),
        Comparison(
            f"{name}: Avalanche's EWC importances at batch size 1 are our empirical Fisher",
            _relative(ours, singly),
            1e-4,
            "relative to the largest value of each weight tensor",
        ),
        Comparison(
            f"{name}: at batch size {_BATCH_SIZE} they are the squared gradient of a batch's mean",
            _relative(by_hand, batched[0]),
            1e-4,
            "relative to the largest value of each weight tensor",
        ),
        Comparison(
            f"{name}: so ours are larger by the factor that random batches of {_BATCH_SIZE} give",
            abs(expected / measured - 1),
            0.1,
            f"in total {_total(ours) / measured:.2f} times as large, "
            f"{_total(ours) / expected:.2f} expected from 1, where all gradients are the same, to "
            f"{1 / rest:.2f}, where their mean is 0 (more than {_BATCH_SIZE}, because batches are "
            f"drawn from {_NUM_EXAMPLES} examples without putting them back)",
        ),
    ]


def _batch_squares(
    model: Classifier, images: Tensor, labels_N: Tensor, batch_size: int, order: Tensor
) -> list[Tensor]:
    weights = list(model.parameters())
    sums = [torch.zeros_like(weight) for weight in weights]
    batches = order.split(batch_size)
    for batch in batches:
        loss = F.cross_entropy(model.trained_logits(images[batch]), labels_N[batch])
        gradients = torch.autograd.grad(loss, weights)
        sums = [total + g.square() for total, g in zip(sums, gradients, strict=True)]
    return [total / len(batches) for total in sums]


def _relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _total(values: list[Tensor]) -> float:
    return sum(float(value.double().sum()) for value in values)


def ask_penalty() -> Topic:
    """Return the question of EWC's penalty."""
    generator = torch.Generator().manual_seed(4)
    now, anchor, noise = torch.randn(3, 7, 11, generator=generator)
    return {"now": now, "anchor": anchor, "importance": noise.square()}


def compare_penalty(answer: Topic) -> list[Comparison]:
    """Compare the penalties at known importances."""
    asked = ask_penalty()
    ours, theirs = (
        ewc_penalty({"w": asked["now"]}, {"w": asked["anchor"]}, {"w": asked["importance"]}),
        answer["value"],
    )
    return [
        Comparison(
            "EWC's penalty at given importances is twice ours",
            float((2 * ours / theirs - 1).abs()),
            1e-5,
            "relative; ours has the half of the paper",
        )
    ]


# ---------------------------------------------------------------- distillation and DER++


def ask_distillation() -> Topic:
    """Return the question of LwF's loss."""
    generator = torch.Generator().manual_seed(5)
    logits_BC, teacher_BC = 3 * torch.randn(2, 64, 10, generator=generator)
    temperatures = [1.0, 2.0, 4.0]
    return {
        "logits": logits_BC,
        "teacher": teacher_BC,
        "num_known": 6,
        "temperatures": temperatures,
    }


def compare_distillation(answer: Topic) -> list[Comparison]:
    """Compare the distillation losses on the known classes."""
    asked = ask_distillation()
    teacher_BC = asked["teacher"][:, : asked["num_known"]]
    differences = [
        abs(
            float(distillation_loss(asked["logits"], teacher_BC, temperature).mean())
            / (temperature**2 * float(value))
            - 1
        )
        for temperature, value in zip(asked["temperatures"], answer["values"], strict=True)
    ]
    return [
        Comparison(
            "LwF's distillation times the squared temperature is the mean of ours",
            max(differences),
            1e-5,
            "relative; temperatures 1, 2 and 4, 6 of 10 classes known",
        )
    ]


def ask_dark() -> Topic:
    """Return the question of DER++'s loss: only the new, then with either term, then all."""
    generator = torch.Generator().manual_seed(6)
    labels_B = torch.arange(30) % _NUM_CLASSES
    return {
        "matrix": torch.randn(_NUM_CLASSES, 6, generator=generator),
        "inputs": list(torch.randn(2, 30, 6, generator=generator)),
        "labels": [labels_B, labels_B],
        "batch_size": 30,
        "weights": [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7)],
    }


def compare_dark(answer: Topic) -> list[Comparison]:
    """Compare DER++'s loss with its terms as this project adds them to a batch."""
    differences, in_batch = [], []
    for (alpha, beta), run in zip(ask_dark()["weights"], answer["runs"], strict=True):
        half, logits_BC, labels_B = run["num_remembered"], run["logits"], run["labels"]
        labels_loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        dark_B = F.pad(dark_loss(logits_BC[:half], run["stored"]), (0, half))
        theirs = float(run["loss"])
        parts = labels_loss_B[half:].mean() + beta * labels_loss_B[:half].mean()
        differences.append(abs(float(parts + alpha * dark_B[:half].mean()) / theirs - 1))
        if beta == 0:
            continue
        # As the trainer averages: everything over the whole batch.
        weight_B = torch.ones_like(labels_loss_B)
        weight_B[:half] = beta
        ours = (weight_B * labels_loss_B + alpha * dark_B).mean()
        in_batch.append(abs(2 * float(ours) / theirs - 1))
    stored_BC, half = answer["runs"][1]["stored"], answer["runs"][1]["num_remembered"]
    logits_BC = answer["runs"][1]["logits"][:half]
    unknown_BC = stored_BC.clone()
    unknown_BC[:, 3:] = torch.nan
    free = float(dark_loss(logits_BC, unknown_BC).mean())
    held = float(dark_loss(logits_BC, stored_BC).mean())
    return [
        Comparison(
            "DER++'s loss is the new labels' mean + alpha * mean of our dark_loss + beta * the "
            "remembered labels' mean",
            max(differences),
            1e-5,
            "relative, four settings of alpha and beta; both dark terms are means over classes",
        ),
        Comparison(
            "averaged over a batch that is half remembered, as our trainer does, it is half that",
            max(in_batch),
            1e-5,
            "relative: alpha is our dark_weight, and beta the weight of a remembered example",
        ),
        Comparison(
            "DER++'s distance to stored logits counts classes unknown when they were stored",
            abs(held - free),
            None,
            f"absolute, {held:.3f} against {free:.3f} with 3 of 5 classes known: Avalanche holds "
            "logits of unknown classes where they were, ours leaves them free",
        ),
    ]


# ---------------------------------------------------------------- sequence metrics


def ask_metrics() -> Topic:
    """Return accuracy matrices: ten of any kind, then ten whose diagonal is their best."""
    generator = torch.Generator().manual_seed(7)
    sizes = [40, 80, 120, 40, 200]
    cases = []
    for index in range(20):
        # In fortieths, so that every accuracy is a whole number of examples.
        rows_TT = torch.randint(41, (5, 5), generator=generator) / 40
        if index >= 10:
            rows_TT.fill_diagonal_(0)
            best_T = rows_TT.max(0).values
            rows_TT = rows_TT + torch.diag(best_T)
        untrained_T = torch.randint(41, (5,), generator=generator) / 40
        cases.append(
            {
                "rows": rows_TT.double().tolist(),
                "untrained": untrained_T.double().tolist(),
                "num_examples": sizes,
            }
        )
    return {"cases": cases}


def compare_metrics(answer: Topic) -> list[Comparison]:
    """Compare the figures of a sequence of updates."""
    histories = [
        History.of(case["rows"], num_examples=case["num_examples"], untrained=case["untrained"])
        for case in ask_metrics()["cases"]
    ]
    theirs = answer["cases"]

    def largest(figure: str, key: str, chosen: slice) -> float:
        pairs = zip(histories[chosen], theirs[chosen], strict=True)
        return max(abs(float(getattr(ours, figure)) - float(other[key])) for ours, other in pairs)

    every, best_last = slice(None), slice(10, None)
    return [
        Comparison(
            "backward transfer is the mean of BWT over experiences",
            largest("backward_transfer", "backward_transfer", every),
            1e-9,
            "absolute, 20 random matrices of 5 updates",
        ),
        Comparison(
            "forward transfer is the mean of ForwardTransfer over experiences",
            largest("forward_transfer", "forward_transfer", every),
            1e-9,
            "absolute, 20 random matrices of 5 updates",
        ),
        Comparison(
            "final accuracy is Accuracy over all examples of the stream",
            largest("final_accuracy", "stream_accuracy", every),
            1e-6,
            "absolute, 20 random matrices, experiences of unequal size",
        ),
        Comparison(
            "forgetting is the mean of Forgetting where no time beats the one right after learning",
            largest("forgetting", "forgetting", best_last),
            1e-9,
            "absolute, 10 such matrices",
        ),
        Comparison(
            "forgetting on any matrix",
            largest("forgetting", "forgetting", slice(10)),
            None,
            "absolute, 10 random matrices: Avalanche counts from the accuracy right after "
            "learning, so that it is minus backward transfer; ours from the best at any earlier "
            "time (Chaudhry et al. 2018)",
        ),
    ]


# ---------------------------------------------------------------- herding


def ask_herding() -> Topic:
    """Return features of one class, float64 because ours are chosen in it."""
    generator = torch.Generator().manual_seed(8)
    features_ND = torch.randn(300, 16, generator=generator, dtype=torch.float64)
    return {"features": (features_ND + 0.5).clamp(min=0), "num_chosen": _NUM_CHOSEN}


def compare_herding(answer: Topic) -> list[Comparison]:
    """Compare the orders in which examples of a class are chosen."""
    features_ND = ask_herding()["features"]
    num = len(features_ND)
    order = herding_order(features_ND, num)
    memory = ReplayMemory.empty((1,), 1, torch.float32).updated(
        torch.arange(num, dtype=torch.float32)[:, None],
        torch.zeros(num, dtype=torch.int64),
        memory_per_class=_NUM_CHOSEN,
        generator=torch.Generator().manual_seed(0),
        selection="herding",
        features=features_ND,
    )
    remembered = memory.inputs[:, 0].long()
    greedy = torch.tensor(answer["greedy_unit"])
    raw = set(answer["greedy_raw"][:_NUM_CHOSEN])
    return [
        Comparison(
            "herding_order is HerdingSelectionStrategy's order of features of unit length",
            float((order != greedy).sum()),
            0.0,
            f"places of {num} that differ",
        ),
        Comparison(
            "a herded ReplayMemory holds what iCaRL's plugin chooses, in its order",
            float((remembered != answer["icarl"]).sum()),
            0.0,
            f"places of {_NUM_CHOSEN} that differ; both bring features to unit length and leave "
            "their mean as it is. The plugin scores by a running sum that also counts an example "
            "it hits twice, so longer choices may part after its first repetition",
        ),
        Comparison(
            "HerdingSelectionStrategy on features as they are",
            float(_NUM_CHOSEN - len(raw & set(order[:_NUM_CHOSEN].tolist()))),
            None,
            f"of the first {_NUM_CHOSEN} are others: the strategy does not bring features to "
            "unit length, ours and iCaRL do",
        ),
    ]


# ---------------------------------------------------------------- the command


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path(
        "benchmarks/results/avalanche_oracle.json"
    ),
    avalanche_python: Annotated[
        Path, typer.Option(help="Python of the environment with Avalanche.")
    ] = Path(".venv-avalanche/bin/python"),
) -> None:
    """Ask both sides, write the comparisons and print them."""
    if not avalanche_python.exists():
        raise typer.BadParameter(f"{avalanche_python} is missing; `make avalanche` makes it")
    answers = _answers(
        avalanche_python,
        {
            **{name: ask_importances(name) for name in _NETWORKS},
            "penalty": ask_penalty(),
            "distillation": ask_distillation(),
            "dark": ask_dark(),
            "metrics": ask_metrics(),
            "herding": ask_herding(),
        },
    )
    comparisons = [
        *(one for name in _NETWORKS for one in compare_importances(name, answers[name])),
        *compare_penalty(answers["penalty"]),
        *compare_distillation(answers["distillation"]),
        *compare_dark(answers["dark"]),
        *compare_metrics(answers["metrics"]),
        *compare_herding(answers["herding"]),
    ]
    report = {
        "setup": {**answers["versions"], "lifelong_ray_torch": torch.__version__},
        "comparisons": [asdict(one) | {"verdict": one.verdict} for one in comparisons],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(_table(comparisons))
    if any(one.verdict == "DISAGREES" for one in comparisons):
        raise typer.Exit(1)


def _answers(python: Path, questions: dict[str, Topic]) -> dict[str, Topic]:
    script = Path(__file__).with_name("avalanche_answers.py")
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "questions.pt", Path(folder) / "answers.pt"
        torch.save(questions, asked)
        subprocess.run(
            [str(python), "-W", "ignore", str(script), str(asked), str(answered)], check=True
        )
        answers: dict[str, Topic] = torch.load(answered, weights_only=True)
    return answers


def _table(comparisons: list[Comparison]) -> str:
    lines = ["| what | largest difference | tolerance | verdict | |", "|---|---:|---:|---|---|"]
    for one in comparisons:
        tolerance = "" if one.tolerance is None else f"{one.tolerance:g}"
        lines.append(
            f"| {one.what} | {one.difference:.2g} | {tolerance} | {one.verdict} | {one.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
