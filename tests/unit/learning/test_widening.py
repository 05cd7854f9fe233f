from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.learning import widening
from lifelong_ray.learning.widening import RandomFeatures, integer_product
from lifelong_ray.types import LearningError

SAMPLE = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture
def without_fast_integers(monkeypatch):
    monkeypatch.setattr(widening, "has_fast_integers", lambda device: False)


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def test_features_are_rounded_rectified_projections():
    features = RandomFeatures.fitted(SAMPLE, 50, seed=1)

    integers = features.integers(SAMPLE)

    rounded = (SAMPLE * features.input_scale_D).round().clamp(-127, 127).double()
    projected = rounded @ features.projection_DM.double()
    expected = (projected.clamp(min=0) * features.scale_M.double()).clamp(max=127)
    assert integers.dtype == torch.int8
    assert (integers.double() - expected).abs().max() < 0.501


def test_features_use_their_range():
    integers = RandomFeatures.fitted(SAMPLE, 50, seed=1).integers(SAMPLE)

    assert integers.min() == 0
    assert (integers.amax(0) == 127).all()


def test_serving_sees_the_same_integers_as_learning():
    features = RandomFeatures.fitted(SAMPLE, 50, seed=1)

    served = features(SAMPLE)

    assert served.dtype == torch.float32
    assert torch.equal(served, features.integers(SAMPLE).float())


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 300), seed=st.integers(0, 5))
def test_features_do_not_depend_on_their_batch(batch_size, seed):
    features = RandomFeatures.fitted(SAMPLE, 64, seed=seed)

    pieces = [features.integers(piece) for piece in SAMPLE.split(batch_size)]

    assert torch.equal(torch.cat(pieces), features.integers(SAMPLE))


def test_many_rows_are_like_few():
    features = RandomFeatures.fitted(SAMPLE, 8, seed=0)

    many = features(SAMPLE.repeat(8, 1))

    assert torch.equal(many, features(SAMPLE).repeat(8, 1))


def test_features_are_the_same_bits_without_integer_instructions(without_fast_integers, request):
    slow = RandomFeatures.fitted(SAMPLE, 50, seed=1)
    slow_integers = slow.integers(SAMPLE)
    request.getfixturevalue("monkeypatch").undo()

    fast = RandomFeatures.fitted(SAMPLE, 50, seed=1)

    assert torch.equal(fast.scale_M, slow.scale_M)
    assert torch.equal(fast.integers(SAMPLE), slow_integers)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 700, 1), (1, 3_000, 5), (9, 8_192, 7), (0, 4, 2)])
def test_integer_products_are_exact_on_either_way(shape, monkeypatch):
    a, b = int8(shape[0], shape[1]), int8(shape[1], shape[2], seed=1)

    usual = integer_product(a, b)
    monkeypatch.setattr(widening, "has_fast_integers", lambda device: False)
    fallback = integer_product(a, b)

    expected = a.long() @ b.long()
    assert torch.equal(usual.long(), expected)
    assert torch.equal(fallback.long(), expected)


def test_the_largest_integers_do_not_overflow(monkeypatch):
    most = torch.full((1, 8_192), 127, dtype=torch.int8)

    usual = integer_product(most, most.T.contiguous())
    monkeypatch.setattr(widening, "has_fast_integers", lambda device: False)
    fallback = integer_product(most, most.T.contiguous())

    assert usual.item() == fallback.item() == 127 * 127 * 8_192


def test_autocast_leaves_features_alone(without_fast_integers):
    features = RandomFeatures.fitted(SAMPLE, 50, seed=1)
    plain = features(SAMPLE)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = features(SAMPLE)

    assert torch.equal(under_autocast, plain)


def test_projection_stays_exact_in_float32_for_many_inputs():
    features = RandomFeatures.fitted(torch.rand(3, 30_000), 4, seed=0)

    assert 127 * features.projection_DM.float().abs().sum(0).max() < 2**24
    assert features.projection_DM.float().std() > 2


def test_each_source_of_inputs_is_brought_to_the_same_range():
    loud_and_quiet = torch.cat([SAMPLE, SAMPLE * 1e-3], dim=1)

    features = RandomFeatures.fitted(loud_and_quiet, 10, seed=0, blocks=(20, 20))

    torch.testing.assert_close(features.input_scale_D[20:], features.input_scale_D[:20] * 1e3)


def test_blocks_must_cover_the_inputs():
    with pytest.raises(ValueError, match=r"\[3, 4\] inputs are not the sample's 20"):
        RandomFeatures.fitted(SAMPLE, 10, seed=0, blocks=(3, 4))


def test_a_state_dict_brings_everything_back():
    fitted = RandomFeatures.fitted(SAMPLE, 12, seed=3)

    loaded = RandomFeatures(20, 12)
    loaded.load_state_dict(fitted.state_dict())

    assert torch.equal(loaded.integers(SAMPLE), fitted.integers(SAMPLE))


def test_features_follow_from_their_seed():
    one, same, other = (RandomFeatures.fitted(SAMPLE, 7, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(one.projection_DM, same.projection_DM)
    assert not torch.equal(one.projection_DM, other.projection_DM)


def test_features_may_have_no_width():
    features = RandomFeatures.fitted(SAMPLE, 0, seed=0)

    assert features(SAMPLE).shape == (300, 0)
    assert features.integers(SAMPLE).shape == (300, 0)


def test_no_examples_have_no_features():
    features = RandomFeatures.fitted(SAMPLE, 6, seed=0)

    assert features(SAMPLE[:0]).shape == (0, 6)


def test_a_sample_of_nothing_but_zeros_gives_finite_features():
    features = RandomFeatures.fitted(torch.zeros(5, 4), 6, seed=0)

    assert torch.isfinite(features(torch.ones(2, 4))).all()


def test_a_sample_is_needed():
    with pytest.raises(LearningError, match="at least one example"):
        RandomFeatures.fitted(SAMPLE[:0], 6, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_overflowed_are_refused(value):
    features = RandomFeatures.fitted(SAMPLE, 6, seed=0)

    with pytest.raises(LearningError, match="not finite"):
        features.integers(torch.full((1, 20), value))
