from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.learning.heads import (
    GrowingCosine,
    GrowingLinear,
    align_new_rows,
    make_head,
)

KINDS = ["linear", "cosine"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(kind, *blocks, width=5, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_head(kind, width, blocks)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    width=st.integers(1, 70),
    num_examples=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_growing_leaves_old_logits_as_they_are_to_the_bit(kind, sizes, width, num_examples, seed):
    head = head_of(kind, sizes[0], width=width, seed=seed)
    features = torch.randn(num_examples, width, generator=generator(seed))

    for size in sizes[1:]:
        before, rows = head(features), head.weight.detach().clone()
        old = head.out_features
        head = head.grown(old + size, generator(seed))

        assert torch.equal(head(features)[:, :old], before)
        assert torch.equal(head.weight[:old], rows)

    assert head.blocks == tuple(sizes)
    assert head(features).shape == (num_examples, sum(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_growing_draws_from_the_given_generator_alone(kind):
    head = head_of(kind, 3)
    before = torch.random.get_rng_state()

    one, other = head.grown(5, generator(1)), head.grown(5, generator(1))

    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_head_shares_no_weights_with_the_old_one(kind):
    head = head_of(kind, 3)
    before = head.weight.detach().clone()

    with torch.no_grad():
        head.grown(5, generator()).weight.zero_()

    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_rebuilt_with_its_blocks_takes_the_weights_back(kind):
    head = head_of(kind, 3).grown(5, generator())
    features = torch.randn(4, 5, generator=generator())

    again = head_of(kind, *head.blocks, seed=9)
    again.load_state_dict(head.state_dict())

    assert torch.equal(again(features), head(features))


def test_new_linear_rows_are_small_with_zero_bias():
    head = head_of("linear", 3).grown(40, generator())

    assert head.weight[3:].abs().max() < 0.06
    assert torch.count_nonzero(head.bias[3:]) == 0


def test_new_cosine_rows_are_unit_vectors():
    head = head_of("cosine", 3).grown(40, generator())

    torch.testing.assert_close(head.weight[3:].norm(dim=1), torch.ones(37))


def test_a_cosine_logit_is_the_scale_times_the_cosine():
    head = head_of("cosine", 2, 1)
    with torch.no_grad():
        head.weight *= torch.tensor([[1.0], [7.0], [0.2]])
    features = torch.randn(4, 5, generator=generator()).double()

    with torch.no_grad():
        logits = head.double()(features)

    for n, feature in enumerate(features):
        for c, row in enumerate(head.weight.detach()):
            cosine = float(feature @ row / (feature.norm() * row.norm()))
            assert math.isclose(logits[n, c], 10 * cosine, rel_tol=1e-9)


def test_the_scale_of_a_cosine_head_is_trained():
    head = head_of("cosine", 3)

    head(torch.randn(4, 5, generator=generator()))[:, 0].sum().backward()

    assert "scale" in dict(head.named_parameters())
    assert head.scale.grad != 0


def test_features_of_zero_give_cosine_logits_of_zero():
    assert torch.equal(head_of("cosine", 3)(torch.zeros(2, 5)), torch.zeros(2, 3))


def test_a_head_is_made_by_its_kind():
    assert isinstance(make_head("linear", 4, (2, 3)), GrowingLinear)
    assert isinstance(make_head("cosine", 4, (2, 3)), GrowingCosine)
    with pytest.raises(ValueError, match="'round'; it must be linear or cosine"):
        make_head("round", 4, (2,))


# ---------------------------------------------------------------- alignment


def test_aligned_rows_have_the_mean_length_of_the_old_ones():
    head = head_of("linear", 3, 4)
    with torch.no_grad():
        head.weight[3:] *= 6

    factor = align_new_rows(head, 3)

    lengths = head.weight.norm(dim=1)
    torch.testing.assert_close(lengths[3:].mean(), lengths[:3].mean())
    assert 0 < factor < 1


def test_alignment_scales_new_logits_and_leaves_old_ones_to_the_bit():
    head = head_of("linear", 3, 4)
    features = torch.randn(30, 5, generator=generator(3)).abs()
    before = head(features)
    rows, biases = head.weight[:3].clone(), head.bias[:3].clone()

    factor = align_new_rows(head, 3)

    after = head(features)
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(head.weight[:3], rows)
    assert torch.equal(head.bias[:3], biases)
    torch.testing.assert_close(after[:, 3:], factor * before[:, 3:])


def test_new_rows_of_zeros_are_left_alone():
    head = head_of("linear", 3, 2)
    with torch.no_grad():
        head.weight[3:] = 0

    assert align_new_rows(head, 3) == 1.0
    assert torch.isfinite(head.weight).all()


def test_aligning_a_cosine_head_changes_nothing_and_says_so(caplog):
    head = head_of("cosine", 3, 2)
    before = head.weight.detach().clone()

    factor = align_new_rows(head, 3)

    assert factor == 1.0
    assert torch.equal(head.weight, before)
    assert "no effect on a cosine head" in caplog.text


@pytest.mark.parametrize("num_old", [0, 5, -1])
def test_alignment_needs_old_and_new_rows(num_old):
    with pytest.raises(ValueError, match="at least one row must be old and one new"):
        align_new_rows(head_of("linear", 5), num_old)
