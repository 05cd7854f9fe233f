"""What keeps an update from forgetting: losses beside the labels' own.

Know tensors only; the trainer weighs and adds them.

Axes: B batch, C classes, K classes known when logits were stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

W = TypeVar("W", bound=Tensor)


def ewc_penalty(
    now: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    """Cost of moving weights that earlier examples made important.

    Half the Fisher-weighted squared distance from `anchor`. Head rows without an anchor
    (classes that came later) are free.

    Args:
        now: Current weights, by name; at least one.
        anchor: Weights after the last update, by name; may lack the head's newest rows.
        fisher: Mean squared per-example gradients; shapes as in `anchor`.

    Raises:
        ValueError: If a weight changed shape in anything but added head rows.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3.

    >>> w, f = {"head.bias": torch.tensor([1.0, 2.0])}, {"head.bias": torch.tensor([4.0])}
    >>> ewc_penalty(w, {"head.bias": torch.tensor([0.5])}, f)
    tensor(0.5000)
    """
    return EwcPenalty(anchor, fisher)(now)


class EwcPenalty:
    """`ewc_penalty` laid out for a training that pays for it at every step.

    `add_gradient` needs no backward pass: the gradient is the Fisher times the way from the
    anchor. A penalty too heavy for the learning rate throws the weights further from the anchor
    at every step, so that its value grows until it is not finite: looking at the value every
    few steps is enough to notice.
    """

    def __init__(
        self,
        anchor: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        factors: Mapping[str, float] | None = None,
    ) -> None:
        """Take over anchor and Fisher.

        Args:
            anchor: Weights to stay close to, by name.
            fisher: Their importance; shapes as in `anchor`.
            factors: Multiply the importance, by beginning of a weight's name; the longest that
                fits counts, and 1 where none does.

        Raises:
            ValueError: If they name no weight or not the same ones, or a shape differs between
                the two.
        """
        factors = factors or {}
        if not anchor:
            raise ValueError("EWC needs at least one weight to hold; the anchor names none")
        self._anchor: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}
        used: set[str] = set()
        for name, value in anchor.items():
            if name not in fisher:
                raise ValueError(
                    f"the anchor has {name}, and the Fisher has not; estimate the Fisher at the "
                    "anchor"
                )
            if fisher[name].shape != value.shape:
                raise ValueError(
                    f"{name} has an anchor of shape {tuple(value.shape)} but a Fisher of shape "
                    f"{tuple(fisher[name].shape)}; estimate the Fisher at the anchor"
                )
            fitting = [prefix for prefix in factors if name.startswith(prefix)]
            used.update(fitting)
            factor = factors[max(fitting, key=len)] if fitting else 1.0
            self._anchor[name] = value.detach().clone()
            self._fisher[name] = fisher[name].detach() * factor
        if idle := sorted(factors.keys() - used):
            logger.warning("EWC holds no weight that begins with %s", ", ".join(idle))
        # As `add_gradient` needs them: in the order of the anchor, laid out as the weights.
        self._fitted_to: list[Tensor] = []
        self._fishers: list[Tensor] = []
        self._pulls: list[Tensor] = []
        self._scale = 0.0
        self._grown: list[int] = []

    def __call__(self, now: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of the weights `now`; those without an anchor are free."""
        parts = []
        for name, anchor in self._anchor.items():
            weight = self._held(now, name)
            if weight.shape != anchor.shape:
                weight = weight[: self._num_rows(name, weight)]
            parts.append((self._fisher[name] * (weight - anchor).square()).sum())
        return 0.5 * torch.stack(parts).sum()

    @torch.no_grad()
    def value(self, now: Mapping[str, Tensor]) -> float:
        """Return the penalty as a number; not finite where training has diverged."""
        return float(self(now))

    @torch.no_grad()
    def add_gradient(self, weights: Mapping[str, nn.Parameter], scale: float) -> None:
        """Add `scale` times the penalty's gradient to the weights' ``grad``, in place.

        Raises:
            ValueError: If a weight changed shape in anything but added head rows.
        """
        held = [self._held(weights, name) for name in self._anchor]
        if scale != self._scale or not self._is_fitted_to(held):
            self._fit_to(held, scale)
        gradients: list[Tensor] = []
        for weight in held:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        now: list[Tensor] = list(held)
        for index in self._grown:
            rows = len(self._pulls[index])
            now[index], gradients[index] = now[index][:rows], gradients[index][:rows]
        if gradients and gradients[0].device.type != "cpu":
            torch._foreach_addcmul_(gradients, now, self._fishers, value=scale)
            torch._foreach_sub_(gradients, self._pulls)
            return
        # On a processor the second pass finds the gradient in the cache this way, and a call for
        # all weights at once would take longer than one for each.
        for gradient, value, importance, pull in zip(
            gradients, now, self._fishers, self._pulls, strict=True
        ):
            gradient.addcmul_(value, importance, value=scale).sub_(pull)

    @staticmethod
    def _held(weights: Mapping[str, W], name: str) -> W:
        if name not in weights:
            raise ValueError(
                f"the Fisher is of another architecture: it has {name}, and the model has not; "
                "estimate it anew on this model"
            )
        return weights[name]

    def _is_fitted_to(self, held: list[nn.Parameter]) -> bool:
        return len(held) == len(self._fitted_to) and all(
            one is other for one, other in zip(held, self._fitted_to, strict=True)
        )

    def _fit_to(self, held: list[nn.Parameter], scale: float) -> None:
        """Lay anchor and Fisher out in memory as the weights are."""
        self._grown = []
        for index, (name, weight) in enumerate(zip(self._anchor, held, strict=True)):
            rows = weight.detach()
            if weight.shape != self._anchor[name].shape:
                rows = rows[: self._num_rows(name, weight)]
                self._grown.append(index)
            for values in (self._anchor, self._fisher):
                values[name] = torch.empty_like(rows).copy_(values[name])
        self._fishers = list(self._fisher.values())
        # The gradient is Fisher times weight minus Fisher times anchor: the second part is known
        # now, which spares every step one pass over the memory. It is computed by the same
        # operation as the first, so that at the anchor nothing is left of both.
        self._pulls = [
            torch.zeros_like(anchor).addcmul_(anchor, importance, value=scale)
            for anchor, importance in zip(self._anchor.values(), self._fishers, strict=True)
        ]
        self._scale = scale
        self._fitted_to = list(held)

    def _num_rows(self, name: str, weight: Tensor) -> int:
        """How many rows of a grown head have an anchor."""
        expected = self._anchor[name].shape
        is_head = f".{name}".rsplit(".", 2)[-2] == "head"
        if not is_head or weight.shape[1:] != expected[1:] or weight.shape < expected:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} but its anchor has "
                f"{tuple(expected)}; re-anchor after changing the model"
            )
        return expected[0]


def distillation_loss(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened answers from the teacher's, per example (B,).

    Kullback-Leibler divergence over the teacher's classes only, so that classes the
    teacher never knew are free; times the squared temperature, which keeps the size of
    the gradient independent of it.

    Args:
        logits_BC: The student's; the first columns are the teacher's classes.
        teacher_BC: The teacher's; may have fewer classes.
        temperature: Above 1 softens.

    Raises:
        ValueError: If the teacher knows more classes than the student, or the shapes or the
            temperature do not fit.

    Source: Hinton et al. 2015, arXiv:1503.02531; Li and Hoiem 2016, arXiv:1606.09282.
    """
    if teacher_BC.dim() != 2 or len(teacher_BC) != len(logits_BC) or not temperature > 0:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher_BC.shape)}, the student's "
            f"{tuple(logits_BC.shape)}, and the temperature is {temperature}; give both a row for "
            "each example, and a temperature above 0"
        )
    num_known = teacher_BC.shape[1]
    if num_known > logits_BC.shape[1]:
        raise ValueError(
            f"the teacher knows {num_known} classes and the student {logits_BC.shape[1]}; "
            "grow the student first"
        )
    student = F.log_softmax(logits_BC[:, :num_known] / temperature, dim=1)
    teacher = F.log_softmax(teacher_BC / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergence


def dark_loss(logits_BC: Tensor, stored_BK: Tensor) -> Tensor:
    """Mean squared distance from the logits stored with each example, per example (B,).

    Over the classes that were known when they were stored: columns of `logits_BC` beyond K are
    free, and so are those where the stored logit is NaN, which stands for a class that came
    after the example. An example without any stored logit costs nothing.

    Args:
        logits_BC: Of the model now.
        stored_BK: Of the model then, padded with NaN.

    Raises:
        ValueError: If more classes are stored than the model has.

    Source: Buzzega et al. 2020, arXiv:2004.07211, eq. 4, with the mean over the known classes
    in place of the sum over all.

    >>> dark_loss(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[0.0, float("nan")]]))
    tensor([1.])
    """
    num_stored = stored_BK.shape[1]
    if num_stored > logits_BC.shape[1]:
        raise ValueError(
            f"logits of {num_stored} classes are stored and the model has {logits_BC.shape[1]}; "
            "grow the model first"
        )
    known_BK = ~stored_BK.isnan()
    # NaN times zero would be NaN, in the gradient too.
    target_BK = torch.where(known_BK, stored_BK, 0.0)
    away_BK = torch.where(known_BK, logits_BC[:, :num_stored] - target_BK, 0.0)
    return away_BK.square().sum(1) / known_BK.sum(1).clamp(min=1)
