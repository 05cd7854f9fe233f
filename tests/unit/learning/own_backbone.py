"""Backbones as a user would write them: functions of image size and channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class UserDropout(nn.Module):
    """Dropout by hand, which draws from torch's global generator."""

    def forward(self, h: Tensor) -> Tensor:
        """Drop half of the values while training."""
        if not self.training:
            return h
        return h * (torch.rand_like(h) < 0.5) * 2


class Narrow(nn.Module):
    """A stage that runs out of memory with more than `most` examples at once while training.

    Attributes:
        most: What fits.
        met: Numbers of examples that fitted, newest last.
    """

    most: ClassVar[int] = 10**9
    met: ClassVar[list[int]] = []

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations as they are."""
        if self.training:
            if len(h) > Narrow.most:
                raise torch.OutOfMemoryError("out of memory")
            Narrow.met.append(len(h))
        return h


class Overflowing(nn.Module):
    """A stage that turns bright images into something that is no number.

    Attributes:
        gives: What it gives for them; None leaves them as they are.
    """

    gives: ClassVar[float | None] = None

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations, spoilt where an image is not blank."""
        if Overflowing.gives is None or not bool(h.any()):
            return h
        return h * Overflowing.gives


def _dense(image_size: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 24), nn.ReLU())


def with_dropout(image_size: int, channels: int) -> nn.Module:
    """Return a small dense network with dropout of its own."""
    return nn.Sequential(_dense(image_size, channels), UserDropout(), nn.Linear(24, 16), nn.ReLU())


def that_needs_memory(image_size: int, channels: int) -> nn.Module:
    """Return a small dense network that needs more memory than there is."""
    return nn.Sequential(_dense(image_size, channels), Narrow())


def that_overflows(image_size: int, channels: int) -> nn.Module:
    """Return a small dense network whose features are not finite."""
    return nn.Sequential(_dense(image_size, channels), Overflowing())
