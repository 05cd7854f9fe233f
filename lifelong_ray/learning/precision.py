"""Models that answer in fewer bits than they were trained in.

Knows which layers can and how; does not know whether the answers are good enough: the gate judges
them at the precision they are given in.

Axes: N images, C channels, H height, W width, P output positions, K terms of a product, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong_ray.config import Precision
from lifelong_ray.learning.widening import has_fast_integers, integer_product
from lifelong_ray.types import LearningError

_LARGEST = 127
_LEAST_SCALE = 1e-12
# What a GPU's integer units take. The same everywhere, so that the device does not change which
# layers are rounded; it spares the first convolution, which is small and the most sensitive.
_MULTIPLE = 8


def lower_precision(model: nn.Module, precision: Precision, device: torch.device) -> float:
    """Change a model in eval mode so that it answers in a precision, in place.

    ``bf16``: weights of convolutions and linear layers are kept in bfloat16; call the model under
    autocast. ``int8``: weights are integers with one scale per output, activations are rounded as
    they come, with one scale per image (convolutions) or vector (linear layers), so that an answer
    does not depend on its batch. Linear layers are torchao's. Convolutions, for which torchao 0.18
    has no integer product that runs without a compiler, are brought to its form of a matrix here,
    on CPUs with fast integers; elsewhere they stay as they are. So do heads, normalisation, and
    layers whose sizes are no multiples of 8. The analytic head's projection is in integers at any
    precision.

    Args:
        model: Changed in place.
        precision: What it shall answer in.
        device: Where it is.

    Returns:
        The share of the model's trained weights that are now held in fewer bits.

    Raises:
        LearningError: If `precision` is ``int8`` and no layer can be.
    """
    if precision == "fp32":
        return 0.0
    num_weights = sum(weight.numel() for weight in model.parameters())
    lowered = _to_bf16(model) if precision == "bf16" else _to_int8(model, device)
    if not lowered and precision == "int8":
        layers = "linear layer or convolution" if has_fast_integers(device) else "linear layer"
        raise LearningError(
            f"nothing of this model can answer in int8 on this {device.type}: it has no {layers} "
            f"before its heads whose sizes are multiples of {_MULTIPLE}; serve it in fp32 or bf16"
        )
    return lowered / num_weights


def _to_bf16(model: nn.Module) -> int:
    """Autocast alone would convert every weight anew for every batch."""
    lowered = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
            lowered += module.weight.numel()
    return lowered


def _to_int8(model: nn.Module, device: torch.device) -> int:
    # Over a second to import, and only where int8 is wanted.
    from torchao.quantization import (  # noqa: PLC0415
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )
    from torchao.utils import should_reduce_range  # noqa: PLC0415

    lowered = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_plain_linear(module):
            lowered += module.weight.numel()
    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=False, reduce_range=should_reduce_range(device)
        ),
        filter_fn=lambda module, _: _is_plain_linear(module),
    )
    if has_fast_integers(device):
        for parent, name, conv in list(_convolutions(model)):
            setattr(parent, name, Int8Conv2d(conv))
            lowered += conv.weight.numel()
    return lowered


def _is_plain_linear(module: nn.Module) -> bool:
    """Exactly a linear layer: what derives from one computes in a way of its own."""
    return (
        type(module) is nn.Linear
        and not module.in_features % _MULTIPLE
        and not module.out_features % _MULTIPLE
    )


def _convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and Int8Conv2d.can_replace(child):
                yield parent, name, child


class Int8Conv2d(nn.Module):
    """A convolution as one product of integers per batch.

    The images are rounded first and laid out as a matrix then, so that what is copied for every
    position of the kernel is a byte.

    Attributes:
        weights_KO: int8, by row and column of the kernel, then channel.
        scale_O: What a step of each output's weights stands for.
        bias_O: Added in float32; empty where there is none.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        from torchao.quantization import Int8Tensor, PerRow  # noqa: PLC0415 - as above

        self._kernel = cast("tuple[int, int]", conv.kernel_size)
        self._stride = cast("tuple[int, int]", conv.stride)
        self._padding = cast("tuple[int, int]", conv.padding)
        rows_OK = conv.weight.detach().permute(0, 2, 3, 1).flatten(1)
        quantised = Int8Tensor.from_hp(rows_OK, granularity=PerRow())
        self.weights_KO: Tensor
        self.scale_O: Tensor
        self.bias_O: Tensor
        bias_O = rows_OK.new_zeros(0) if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("weights_KO", quantised.qdata.t())
        self.register_buffer("scale_O", quantised.scale.flatten())
        self.register_buffer("bias_O", bias_O)

    @staticmethod
    def can_replace(conv: nn.Conv2d) -> bool:
        """Whether it is a plain one, of sizes that integer units take."""
        return (
            conv.groups == 1
            and conv.dilation == (1, 1)
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and not conv.in_channels % _MULTIPLE
            and not conv.out_channels % _MULTIPLE
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return what the convolution gives, up to rounding; channels-last in memory."""
        values_NP = images_NCHW.permute(0, 2, 3, 1).flatten(1)
        # Ten times as fast on CPUs as the norm that it is.
        largest_N = torch.maximum(values_NP.amax(1), -values_NP.amin(1))
        scale_N = (largest_N / _LARGEST).clamp_(min=_LEAST_SCALE)
        rounded = torch.mul(images_NCHW, scale_N.reciprocal()[:, None, None, None]).round_()
        rows, height, width = self._positions(rounded.to(torch.int8).permute(0, 2, 3, 1))
        totals_NPO: Tensor = integer_product(rows, self.weights_KO).view(
            len(scale_N), height * width, -1
        )
        outputs_NPO = totals_NPO.float().mul_(scale_N[:, None, None] * self.scale_O)
        if len(self.bias_O):
            outputs_NPO += self.bias_O
        outputs_NHWO = outputs_NPO.view(len(scale_N), height, width, -1)
        return outputs_NHWO.permute(0, 3, 1, 2)

    def _positions(self, images_NHWC: Tensor) -> tuple[Tensor, int, int]:
        """What the kernel sees at each of its positions (N * P, K), and how these lie."""
        (down, across), (tall, wide), (step_y, step_x) = self._padding, self._kernel, self._stride
        if down or across:
            images_NHWC = F.pad(images_NHWC, (0, 0, across, across, down, down))
        images_NHWC = images_NHWC.contiguous()
        num_images, height, width, channels = images_NHWC.shape
        height, width = (height - tall) // step_y + 1, (width - wide) // step_x + 1
        by_image, by_row, by_column, _ = images_NHWC.stride()
        seen = images_NHWC.as_strided(
            (num_images, height, width, tall, wide * channels),
            (by_image, by_row * step_y, by_column * step_x, by_row, 1),
        )
        return seen.reshape(num_images * height * width, -1), height, width
