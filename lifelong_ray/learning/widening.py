"""Random ReLU features in small integers, and exact products of small integers.

A feature depends on its example alone: all arithmetic that could round differently from
batch to batch, thread to thread or device to device is between integers. Therefore sums
over features are exact, and what was added can be taken out again to the bit. Does not
know where its inputs come from nor what is fitted on its outputs.

Axes: N examples, D inputs, M random features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from lifelong_ray.learning.chance import generator_for
from lifelong_ray.types import LearningError

LARGEST = 127
"""Inputs, projection and features are integers of at most this size, which int8 holds."""

_EXACT_FLOAT32 = 2**24
_PROJECTION_SPREAD = 32.0
_INPUT_QUANTILE, _OUTPUT_QUANTILE = 0.9999, 0.999
_LEAST_PEAK = 0.1
_ROWS = 1_024
_FLOAT32_TERMS = _EXACT_FLOAT32 // LARGEST**2


class RandomFeatures(nn.Module):
    """A random projection and a ReLU, in integers from 0 to 127.

    Inputs are rounded to integers of 8 bits, multiplied with a random integer matrix, cut
    off at zero and rounded again with a fixed scale per feature. On images and on features
    of convolutional networks, the ridge classifier on top lost no accuracy by the rounding.
    Standardised inputs, a centre and random biases were tried and did not help.

    Attributes:
        input_scale_D: Integer steps per unit of an input, float32.
        projection_DM: int8, normally distributed.
        scale_M: Integer steps per unit of a projection, float32.

    Source: McDonnell et al. 2023 (RanPAC), arXiv:2307.02251, whose features are real numbers.
    """

    def __init__(self, num_inputs: int, num_features: int) -> None:
        super().__init__()
        self.input_scale_D: Tensor
        self.projection_DM: Tensor
        self.scale_M: Tensor
        self.register_buffer("input_scale_D", torch.zeros(num_inputs))
        self.register_buffer(
            "projection_DM", torch.zeros(num_inputs, num_features, dtype=torch.int8)
        )
        self.register_buffer("scale_M", torch.zeros(num_features))

    @classmethod
    @torch.no_grad()
    def fitted(
        cls, sample_ND: Tensor, num_features: int, seed: int, *, blocks: Sequence[int] = ()
    ) -> RandomFeatures:
        """Return features whose scales suit a sample and whose projection follows from `seed`.

        Args:
            sample_ND: Inputs as they will come, about 2,000 of them; more change little.
            num_features: M; 0 gives features of no width.
            seed: For the projection.
            blocks: Sizes of the groups of inputs, in order, that come from different sources;
                each is brought to the same range. Empty means one source.

        Raises:
            LearningError: If the sample is empty or not finite.
        """
        num_examples, num_inputs = sample_ND.shape
        if not num_examples:
            raise LearningError("random features need at least one example to find their scale")
        if blocks and sum(blocks) != num_inputs:
            raise ValueError(f"blocks of {list(blocks)} inputs are not the sample's {num_inputs}")
        sample_ND = _finite(sample_ND.float())
        made = cls(num_inputs, num_features).to(sample_ND.device)
        scales, first = [], 0
        for size in blocks or (num_inputs,):
            scale = LARGEST / _peak(sample_ND[:, first : first + size])
            scales.append(scale.expand(size))
            first += size
        made.input_scale_D = torch.cat(scales).contiguous()
        # Sums of absolute products below 2^24 stay exact in float32 too, in any order.
        room = 0.9 * _EXACT_FLOAT32 / LARGEST / (0.8 * max(num_inputs, 1))
        normal_DM = torch.randn(
            num_inputs, num_features, generator=generator_for(seed, "random features")
        )
        normal_DM = (normal_DM * min(_PROJECTION_SPREAD, room)).round_().clamp_(-LARGEST, LARGEST)
        assert not normal_DM.numel() or (
            LARGEST * float(normal_DM.abs().sum(0).max()) < _EXACT_FLOAT32
        )
        made.projection_DM = normal_DM.to(sample_ND.device, torch.int8)
        projected_NM = made._projected(sample_ND).clamp_(min=0)
        if num_features:
            num_above = 1 + int((1 - _OUTPUT_QUANTILE) * num_examples)
            peak_M = projected_NM.T.topk(min(num_above, num_examples), dim=1).values[:, -1]
            # One that the sample hardly moves must not overflow as soon as something else comes.
            least = max(_LEAST_PEAK * float(peak_M.median()), 1.0)
            made.scale_M = (LARGEST / peak_M.clamp(min=least)).contiguous()
        return made

    @property
    def num_inputs(self) -> int:
        """D."""
        return self.projection_DM.shape[0]

    @property
    def num_features(self) -> int:
        """M."""
        return self.projection_DM.shape[1]

    @torch.no_grad()
    def integers(self, x_ND: Tensor) -> Tensor:
        """Return the features (N, M) as int8 from 0 to 127, in bounded memory beside them.

        Raises:
            LearningError: If an input is not finite.
        """
        features_NM = torch.empty(
            len(x_ND), self.num_features, dtype=torch.int8, device=x_ND.device
        )
        for first in range(0, len(x_ND), _ROWS):
            piece = slice(first, first + _ROWS)
            features_NM[piece] = self._rounded(x_ND[piece])
        return features_NM

    @torch.no_grad()
    def forward(self, x_ND: Tensor) -> Tensor:
        """Return what `integers` does, as float32."""
        if len(x_ND) > _ROWS:
            return self.integers(x_ND).float()
        return self._rounded(x_ND)

    def _rounded(self, x_ND: Tensor) -> Tensor:
        projected_NM = self._projected(_finite(x_ND.float()))
        return projected_NM.mul_(self.scale_M).round_().clamp_(0, LARGEST)

    def _projected(self, x_ND: Tensor) -> Tensor:
        """Projections (N, M) of finite inputs: whole numbers in float32."""
        rounded_ND = (x_ND * self.input_scale_D).round_().clamp_(-LARGEST, LARGEST)
        if has_fast_integers(x_ND.device):
            return integer_product(rounded_ND.to(torch.int8), self.projection_DM).float()
        with torch.autocast(x_ND.device.type, enabled=False):
            return rounded_ND @ self.projection_DM.float()


def has_fast_integers(device: torch.device) -> bool:
    """Whether int8 products are the fast ones here: on CPUs with the VNNI instructions.

    CUDA's int8 product takes only some shapes; there float32 is fast enough.
    """
    return device.type == "cpu" and _cpu_has_vnni()


@cache
def _cpu_has_vnni() -> bool:
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_vnni", False) or able.get("avx_vnni", False))


def integer_product(a_IN: Tensor, b_NJ: Tensor) -> Tensor:
    """Return the exact product (I, J) of int8 matrices as int32 or, where faster, float64.

    N may be up to 2^17, so that int32 cannot overflow.
    """
    if not a_IN.numel() or not b_NJ.numel():
        return torch.zeros(len(a_IN), b_NJ.shape[1], dtype=torch.int32, device=a_IN.device)
    if has_fast_integers(a_IN.device):
        return torch._int_mm(a_IN, b_NJ)
    total_IJ = torch.zeros(len(a_IN), b_NJ.shape[1], dtype=torch.float64, device=a_IN.device)
    with torch.autocast(a_IN.device.type, enabled=False):
        for first in range(0, len(b_NJ), _FLOAT32_TERMS):
            terms = slice(first, first + _FLOAT32_TERMS)
            total_IJ += a_IN[:, terms].float() @ b_NJ[terms].float()
    return total_IJ


def _peak(block_ND: Tensor) -> Tensor:
    """A size that hardly any input exceeds, above zero."""
    sizes = block_ND.abs().flatten()
    if not sizes.numel():
        return torch.ones((), device=block_ND.device)
    rank = max(1, round(_INPUT_QUANTILE * sizes.numel()))
    peak = sizes.kthvalue(rank).values
    # Sparse inputs: what is there counts, not how often.
    peak = torch.where(peak > 0, peak, sizes.max())
    return torch.where(peak > 0, peak, torch.ones_like(peak))


def _finite(x_ND: Tensor) -> Tensor:
    if not bool(torch.isfinite(x_ND).all()):
        raise LearningError(
            "an input of the random features is not finite; the backbone has overflowed or "
            "the images are damaged"
        )
    return x_ND
