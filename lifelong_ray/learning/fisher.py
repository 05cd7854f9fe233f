"""How much each weight matters for what the model already knows.

The diagonal of the Fisher information: the mean over examples of the squared gradient
of one example's log-likelihood. Squares are taken per example, never of a batch mean,
in float32, in eval mode, on images as they are. Knows the layers that a `Classifier` is
made of; does not know what the estimate is used for.

Axes: N examples, C classes, O outputs of a layer, K inputs of one output, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.model import Classifier
from lifelong_ray.types import LearningError

Estimator = Literal["exact", "sampled", "empirical"]

# Per-example gradients of a few examples stay in a processor's cache; twice as fast.
_CHUNK_ON_CPU, _CHUNK_ON_DEVICE = 4, 64
_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


@dataclass(frozen=True)
class Fisher:
    """Importance of each weight.

    Attributes:
        values: Mean squared per-example gradient by weight name; shapes as the weights.
        estimator: Which label the gradients were of.
        num_examples: How many examples the mean is over.
    """

    values: dict[str, Tensor]
    estimator: Estimator
    num_examples: int

    def for_model(self, model: Classifier) -> Fisher:
        """Return it with zero importance for head rows that `model` has grown since.

        Raises:
            LearningError: If it belongs to another architecture.
        """
        return Fisher(fit_to_model(self.values, model, "Fisher"), self.estimator, self.num_examples)

    def merged(self, newer: Fisher, *, newer_share: float) -> Fisher:
        """Return the weighted mean with a newer estimate.

        Weights that `newer` does not name keep their importance: its training left them alone.
        """
        values = dict(self.values)
        for name, value in newer.values.items():
            values[name] = torch.lerp(self.values[name], value, newer_share)
        return Fisher(values, newer.estimator, self.num_examples + newer.num_examples)


def fit_to_model(values: dict[str, Tensor], model: Classifier, what: str) -> dict[str, Tensor]:
    """Return per-weight `values` padded with zeros where the head has grown since.

    Raises:
        LearningError: If names or shapes are not those of `model`.
    """
    fitted: dict[str, Tensor] = {}
    weights = dict(model.named_parameters())
    if values.keys() != weights.keys():
        odd = sorted(values.keys() ^ weights.keys())
        raise LearningError(
            f"the {what} is of another architecture: {odd[0]} is in only one of the two; "
            "use what was saved with this model"
        )
    for name, weight in weights.items():
        value = values[name]
        missing = weight.shape[0] - value.shape[0] if value.dim() == weight.dim() else -1
        grown = name.startswith("head.") and missing >= 0
        if value.shape[1:] != weight.shape[1:] or not (missing == 0 or grown):
            raise LearningError(
                f"the {what} is of another architecture: {name} has shape {tuple(value.shape)} "
                f"there and {tuple(weight.shape)} in the model; use what was saved with this model"
            )
        padding = [0, 0] * (value.dim() - 1) + [0, missing]
        fitted[name] = F.pad(value, padding) if missing else value
    return fitted


def estimate_fisher(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    *,
    estimator: Estimator = "exact",
    generator: torch.Generator,
    start: int = 0,
    collective: Collective | None = None,
) -> Fisher:
    """Estimate the Fisher diagonal of the backbone and the linear head.

    ``exact`` takes the expectation over the model's own labels, ``sampled`` draws one of
    them for each example, ``empirical`` takes the true label. Workers share the examples
    out; sums and counts are added up over them.

    Args:
        model: Used in eval mode and left as it was.
        inputs: uint8 images, or activations that enter stage `start`.
        labels: True labels (N,), for ``empirical``.
        estimator: Which label the gradients are of.
        generator: Draws labels for ``sampled``; the same on every worker.
        start: Stages passed already; their weights are not estimated.
        collective: The workers; None means this one alone.

    Raises:
        LearningError: If there is no example, or a gradient is not finite.

    Source: van de Ven 2025, arXiv:2502.11756 (estimators); Goodfellow 2015,
    arXiv:1510.01799 (per-example squares without per-example gradients of linear layers).
    """
    group = collective or Alone()
    if not len(inputs):
        raise LearningError("the Fisher needs at least one example, and got none")
    draws_N = torch.rand(len(inputs), generator=generator, dtype=torch.float64)
    mine = slice(group.rank, None, group.world_size)
    inputs, labels, draws_N = inputs[mine], labels[mine], draws_N[mine]
    layers = _layers(model, start)
    sums = {
        f"{name}.{kind}": torch.zeros_like(weight)
        for name, layer in layers.items()
        for kind, weight in layer.named_parameters()
    }
    count = torch.tensor([float(len(inputs))], dtype=torch.float64, device=model.device)
    was_training = model.training
    model.eval()
    chunk = _CHUNK_ON_CPU if model.device.type == "cpu" else _CHUNK_ON_DEVICE
    for first in range(0, len(inputs), chunk):
        piece = slice(first, first + chunk)
        _add_squares(
            sums, model, layers, inputs[piece], labels[piece], draws_N[piece], estimator, start
        )
    model.train(was_training)
    group.sum([*sums.values(), count])
    num_examples = int(count.item())
    values = {name: value / num_examples for name, value in sums.items()}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise LearningError(
                f"the Fisher of {name} is not finite: the model's weights or inputs have "
                "overflowed; lower the learning rate and train again"
            )
    return Fisher(values, estimator, num_examples)


def _layers(model: Classifier, start: int) -> dict[str, nn.Module]:
    """The layers with weights after stage `start`, by name."""
    frozen = tuple(f"stages.{index}." for index in range(start))
    found: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if next(layer.parameters(recurse=False), None) is None or name.startswith(frozen):
            continue
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
            raise LearningError(
                f"no per-example gradient is known for {name}, a {type(layer).__name__}; "
                "the Fisher knows Linear, Conv2d and GroupNorm"
            )
        found[name] = layer
    return found


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str) or layer.stride != (1, 1) or layer.groups != 1:
        raise LearningError("the Fisher knows convolutions of stride 1, in one group, padded by n")
    return layer.padding


def _add_squares(
    sums: dict[str, Tensor],
    model: Classifier,
    layers: dict[str, nn.Module],
    inputs: Tensor,
    labels_N: Tensor,
    draws_N: Tensor,
    estimator: Estimator,
    start: int,
) -> None:
    """Add the squared per-example gradients of one chunk to `sums`."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def record(name: str) -> _Hook:
        def hook(_: nn.Module, received: tuple[Tensor, ...], output: Tensor) -> None:
            entering[name], leaving[name] = received[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        h = model.activations(inputs, stop=0).detach().requires_grad_()
        logits_NC: Tensor = model.head(model.features(h, start=start))
    finally:
        for handle in hooks:
            handle.remove()
    log_p_NC = F.log_softmax(logits_NC, dim=1)
    p_NC = log_p_NC.detach().exp()
    if estimator == "exact":
        rounds = [(log_p_NC[:, c].sum(), p_NC[:, c]) for c in range(model.num_classes)]
    else:
        if estimator == "sampled":
            edges_NC = p_NC.double().cumsum(1)
            target_N1 = draws_N[:, None].to(edges_NC.device) * edges_NC[:, -1:]
            labels_N = (edges_NC < target_N1).sum(1).clamp(max=model.num_classes - 1)
        chosen_N = log_p_NC.gather(1, labels_N[:, None].to(log_p_NC.device))
        rounds = [(chosen_N.sum(), torch.ones_like(p_NC[:, 0]))]
    unfolded = {
        name: F.unfold(entering[name], layer.kernel_size, padding=_padding(layer))
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d)
    }
    for index, (log_likelihood, weight_N) in enumerate(rounds):
        deltas = torch.autograd.grad(
            log_likelihood, list(leaving.values()), retain_graph=index < len(rounds) - 1
        )
        for name, delta in zip(leaving, deltas, strict=True):
            _add_layer(
                sums, name, layers[name], entering[name], unfolded.get(name), delta, weight_N
            )


def _add_layer(
    sums: dict[str, Tensor],
    name: str,
    layer: nn.Module,
    inputs: Tensor,
    unfolded_NKL: Tensor | None,
    delta: Tensor,
    weight_N: Tensor,
) -> None:
    """Add one layer's weighted squares; `delta` is the gradient at the layer's output."""
    if isinstance(layer, nn.Linear):
        weighted_NO = delta.square() * weight_N[:, None]
        sums[f"{name}.weight"] += weighted_NO.T @ inputs.square()
        sums[f"{name}.bias"] += weighted_NO.sum(0)
        return
    delta_NOL = delta.flatten(2)
    sums[f"{name}.bias"] += weight_N @ delta_NOL.sum(2).square()
    if unfolded_NKL is not None:
        gradient_NOK = delta_NOL @ unfolded_NKL.transpose(1, 2)
        squares = weight_N @ gradient_NOK.square().flatten(1)
    else:
        assert isinstance(layer, nn.GroupNorm)
        normal = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
        squares = weight_N @ (delta_NOL * normal.flatten(2)).sum(2).square()
    weight_sum = sums[f"{name}.weight"]
    weight_sum += squares.view_as(weight_sum)
