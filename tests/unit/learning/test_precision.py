"""Fewer bits: nearly the same answers, really fewer bits, and no pretence where there are none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import Int8Tensor

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import Alone, Fit, Learner, Predictor, Run, fit_base, remembered_images
from lifelong_ray.learning.precision import Int8Conv2d, lower_precision
from lifelong_ray.learning.widening import has_fast_integers
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

NAMES = ("a", "b", "c", "d")
IMAGES = make_images([0, 1, 2, 3] * 6, seed=9)[0].numpy()
CPU = torch.device("cpu")
needs_fast_integers = pytest.mark.skipif(
    not has_fast_integers(CPU), reason="int8 convolutions need a CPU with VNNI"
)


def trained(model: ModelConfig) -> Fit:
    training = make_images([0, 1, 2, 3] * 12, seed=1)
    run = Run(clock=TickingClock(), collective=Alone())
    return fit_base(training, NAMES, model, CONFIG, run)


@pytest.fixture(scope="module")
def convnet() -> Learner:
    return trained(MODEL).learner


@pytest.fixture(scope="module")
def batch_normed() -> Learner:
    return trained(MODEL.model_copy(update={"norm": "batch"})).learner


@pytest.fixture(scope="module")
def mlp() -> Learner:
    return trained(MODEL.model_copy(update={"name": "mlp", "widths": (64, 32)})).learner


def probabilities(learner: Learner, precision: str = "fp32", **more: bool) -> np.ndarray:
    return Predictor(learner, precision=precision, **more).predict(IMAGES).probabilities


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("architecture", ["convnet", "batch_normed", "mlp"])
def test_fewer_bits_give_nearly_the_same_answers(
    precision: str, architecture: str, request: pytest.FixtureRequest
) -> None:
    if precision == "int8" and architecture != "mlp" and not has_fast_integers(CPU):
        pytest.skip("int8 convolutions need a CPU with VNNI")
    learner = request.getfixturevalue(architecture)

    plain, fewer = probabilities(learner), probabilities(learner, precision)

    assert not np.array_equal(fewer, plain)
    np.testing.assert_allclose(fewer, plain, atol=0.1)
    assert (fewer.argmax(1) == plain.argmax(1)).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_layout_in_memory_changes_no_answer(convnet: Learner, precision: str) -> None:
    tolerance = 1e-5 if precision == "fp32" else 2e-2

    one, other = (probabilities(convnet, precision, channels_last=last) for last in (True, False))

    np.testing.assert_allclose(one, other, atol=tolerance)


def test_only_convolutions_have_images_laid_out_by_pixel(convnet: Learner, mlp: Learner) -> None:
    assert Predictor(convnet).channels_last
    assert not Predictor(convnet, channels_last=False).channels_last
    assert not Predictor(mlp).channels_last


@needs_fast_integers
def test_an_int8_answer_does_not_depend_on_its_batch(convnet: Learner) -> None:
    predictor = Predictor(convnet, precision="int8")
    bright = np.concatenate([IMAGES[:1], np.full_like(IMAGES[:5], 255)])

    alone, in_company = predictor.predict(IMAGES[:1]), predictor.predict(bright)

    np.testing.assert_allclose(alone.probabilities[0], in_company.probabilities[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [(3, 1, 1, True), (1, 1, 0, False), (3, 2, 1, False), (1, 2, 0, True), (5, 3, 2, True)],
)
def test_a_convolution_of_integers_gives_what_the_convolution_gives(
    kernel: int, stride: int, padding: int, bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel, stride, padding, bias=bias).requires_grad_(False)
    images = torch.randn(3, 16, 11, 13)

    given = Int8Conv2d(conv)(images)

    expected = conv(images)
    assert given.shape == expected.shape
    assert float((given - expected).abs().max() / expected.abs().max()) < 0.02


def test_a_blank_image_has_blank_features() -> None:
    conv = nn.Conv2d(8, 8, 3, bias=False).requires_grad_(False)

    assert not Int8Conv2d(conv)(torch.zeros(1, 8, 5, 5)).any()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 10, 3),
    ],
)
def test_a_convolution_of_another_kind_stays_as_it_is(conv: nn.Conv2d) -> None:
    assert not Int8Conv2d.can_replace(conv)


# ---------------------------------------------------------------- really fewer bits


def test_int8_keeps_linear_weights_in_bytes_and_heads_as_they_are(mlp: Learner) -> None:
    model = mlp.model.copy().requires_grad_(False)

    share = lower_precision(model, "int8", CPU)

    linear = [module for module in model.stages.modules() if isinstance(module, nn.Linear)]
    assert [type(layer.weight.data) for layer in linear] == [Int8Tensor, Int8Tensor]
    assert all(layer.weight.qdata.dtype == torch.int8 for layer in linear)
    assert torch.equal(model.head.weight, mlp.model.head.weight)
    num_weights = sum(weight.numel() for weight in mlp.model.parameters())
    assert share == pytest.approx((64 * 64 + 64 * 32) / num_weights)


@needs_fast_integers
def test_int8_keeps_all_convolutions_but_the_first_in_bytes(convnet: Learner) -> None:
    model = convnet.model.copy().requires_grad_(False)

    lower_precision(model, "int8", CPU)

    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d | Int8Conv2d)]
    held = next(m for m in model.modules() if isinstance(m, Int8Conv2d))
    assert kinds == [nn.Conv2d, Int8Conv2d]
    assert held.weights_KO.dtype == torch.int8


def test_bf16_keeps_weights_in_two_bytes_and_normalisation_in_four(convnet: Learner) -> None:
    model = convnet.model.copy()

    lower_precision(model, "bf16", CPU)

    types = {
        type(module): module.weight.dtype
        for module in model.stages.modules()
        if isinstance(module, nn.Conv2d | nn.GroupNorm)
    }
    assert types == {nn.Conv2d: torch.bfloat16, nn.GroupNorm: torch.float32}


def test_the_learner_keeps_its_own_weights(mlp: Learner) -> None:
    before = {name: weight.clone() for name, weight in mlp.model.state_dict().items()}

    for precision in ("bf16", "int8"):
        Predictor(mlp, precision=precision)

    assert all(torch.equal(weight, before[name]) for name, weight in mlp.model.state_dict().items())


def test_int8_of_a_model_without_anything_to_round_is_refused() -> None:
    odd = trained(MODEL.model_copy(update={"widths": (6, 12)})).learner

    with pytest.raises(LearningError, match="nothing of this model can answer in int8"):
        Predictor(odd, precision="int8")


def test_who_does_not_want_int8_does_not_wait_for_its_library() -> None:
    program = "import sys, lifelong_ray.learning; print('torchao' in sys.modules)"

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert printed.stdout.decode().strip() == "False"


# ---------------------------------------------------------------- warming up


class Watched(Predictor):
    """Notes what it is asked."""

    def predict(self, images):
        self.asked = [*getattr(self, "asked", []), images.copy()]
        return super().predict(images)


def test_a_predictor_warms_up_with_the_images_that_the_learner_kept(convnet: Learner) -> None:
    predictor = Watched(convnet)
    kept = remembered_images(convnet, at_most=3)

    predictor.warm_up((1, 5), kept)

    one, five = predictor.asked
    assert np.array_equal(one, kept[:1])
    assert np.array_equal(five, kept[[0, 1, 2, 0, 1]])
    assert kept.max() > 100


def test_a_predictor_without_kept_images_warms_up_with_blank_ones(convnet: Learner) -> None:
    predictor = Watched(convnet)
    bare = replace(convnet, memory_stage=1)

    predictor.warm_up((2,), remembered_images(bare, at_most=3))

    assert predictor.asked[0].shape == (2, 1, 8, 8)
    assert not predictor.asked[0].any()
