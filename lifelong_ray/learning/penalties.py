"""What keeps an update from forgetting: losses beside the labels' own.

Pure functions of tensors; the trainer weighs and adds them.

Axes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """`ewc_penalty` with the anchor laid out once, for a loop that asks at every step."""

    def __init__(self, anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in anchor.items()}
        for name, shape in self._shapes.items():
            if fisher[name].shape != shape:
                raise ValueError(
                    f"{name} has an anchor of shape {tuple(shape)} but a Fisher of shape "
                    f"{tuple(fisher[name].shape)}; estimate the Fisher at the anchor"
                )
        self._anchor = torch.cat([value.detach().flatten() for value in anchor.values()])
        self._fisher = torch.cat([fisher[name].detach().flatten() for name in anchor])

    def __call__(self, now: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of the weights `now`; those without an anchor are free."""
        flat = []
        for name, expected in self._shapes.items():
            weight = now[name]
            if weight.shape != expected and not (
                name.startswith("head.") and weight.shape[1:] == expected[1:]
            ):
                raise ValueError(
                    f"{name} has shape {tuple(weight.shape)} but its anchor has "
                    f"{tuple(expected)}; re-anchor after changing the model"
                )
            flat.append(weight[: expected[0]].flatten())
        return 0.5 * torch.dot(self._fisher, (torch.cat(flat) - self._anchor).square())


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
        ValueError: If the teacher knows more classes than the student.

    Source: Hinton et al. 2015, arXiv:1503.02531; Li and Hoiem 2016, arXiv:1606.09282.
    """
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
