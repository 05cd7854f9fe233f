"""What images, labels and numbers must be before anything is computed of them.

Knows tensors only. Each check looks at what it is given once; those that pass over numbers do
not belong into a training step.

Axes: N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lifelong_ray.config import ModelConfig
from lifelong_ray.types import LearningError


def check_rows(values: object, what: str) -> None:
    """Refuse anything but a tensor of one row or more dimensions for each example.

    Args:
        values: What a caller gave.
        what: What errors call it, in the plural.

    Raises:
        LearningError: If so.
    """
    if not isinstance(values, Tensor):
        raise LearningError(
            f"the {what} are of type {type(values).__name__}; the engine takes torch tensors: make "
            "one with torch.as_tensor"
        )
    if not values.dim():
        raise LearningError(
            f"the {what} are the single number {values.item()}; give one row for each example"
        )


def check_images(images: Tensor, config: ModelConfig, what: str) -> None:
    """Refuse anything but uint8 images of the model's size; looks at no pixel of those.

    Args:
        images: (N, channels, height, width).
        config: Says which the model takes.
        what: What errors call them, such as ``training images``.

    Raises:
        LearningError: If so.
    """
    check_rows(images, what)
    shape = (config.channels, config.image_size, config.image_size)
    if images.dtype == torch.uint8 and images.shape[1:] == shape:
        return
    odd, how = "", "scale them to that size with feedback.to_model_input"
    if images.dtype != torch.uint8:
        how = "give pixels as whole numbers from 0 to 255, converted with .to(torch.uint8)"
    if not is_finite(images):
        odd, how = (
            ", NaN or infinity among them",
            f"repair these images or leave them out, and {how}",
        )
    raise LearningError(
        f"the {what} are {images.dtype} of shape {tuple(images.shape)}{odd}; the model takes "
        f"torch.uint8 of shape (N, {', '.join(map(str, shape))}): {how}"
    )


def check_labels(
    labels_N: Tensor,
    num_examples: int,
    classes: int | Sequence[str],
    what: str,
    remedy: str = "leave its examples out, or make room for its class first",
) -> None:
    """Refuse labels that are not one class for each example.

    Args:
        labels_N: Positions among the classes.
        num_examples: How many examples they are of.
        classes: The names of the classes, or how many there are.
        what: What errors call a label, such as ``training label``.
        remedy: What to do about a label outside the classes.

    Raises:
        LearningError: If so.
    """
    check_whole_numbers(labels_N, what)
    if len(labels_N) != num_examples:
        raise LearningError(
            f"there are {num_examples} examples but {len(labels_N)} {what}s; give each one a label"
        )
    if not num_examples:
        return
    num_classes = classes if isinstance(classes, int) else len(classes)
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= num_classes:
        listed = "" if isinstance(classes, int) else f" {list(classes)}"
        raise LearningError(
            f"a {what} is {low if low < 0 else high}, outside the {num_classes} classes{listed}, "
            f"which count from 0; {remedy}"
        )


def check_whole_numbers(values_N: Tensor, what: str) -> None:
    """Refuse anything but a row of int64.

    Args:
        values_N: One number for each example.
        what: What errors call one of them.

    Raises:
        LearningError: If so.
    """
    check_rows(values_N, f"{what}s")
    if values_N.dtype == torch.int64 and values_N.dim() == 1:
        return
    how = "convert them with .long()"
    if values_N.dim() != 1:
        how = "where every example has a single one, flatten them with .reshape(-1)"
    elif values_N.is_floating_point():
        how = "if they are whole numbers, convert them with .long()"
    raise LearningError(
        f"the {what}s are {values_N.dtype} of shape {tuple(values_N.shape)}; they must be "
        f"torch.int64 of shape (N,): {how}"
    )


def check_finite(values: Tensor, what: str, remedy: str) -> None:
    """Refuse numbers among which are NaN or infinite ones.

    Args:
        values: Any shape.
        what: What errors call them, in the plural.
        remedy: What to do about it.

    Raises:
        LearningError: If so.
    """
    if not is_finite(values):
        num_odd = int((~torch.isfinite(values)).sum())
        raise LearningError(
            f"{num_odd} of {values.numel()} numbers of the {what} are not finite (NaN or "
            f"infinity); {remedy}"
        )


def check_all_finite(values: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """`check_finite` for tensors by name."""
    for name, value in values.items():
        check_finite(value, f"{what} of {name}", remedy)


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not values.is_floating_point():
        return True
    # A sum takes a fraction of the time, and is finite only if all numbers are: infinities that
    # cancel give NaN. A sum that overflows says nothing.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
