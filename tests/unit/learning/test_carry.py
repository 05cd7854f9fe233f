from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lifelong_ray.learning import AnalyticSums
from lifelong_ray.learning.carry import carried_over
from lifelong_ray.types import LearningError

NUM_FEATURES = 24
RIDGE = 1e-2


def features_of(labels: Tensor, seed: int) -> Tensor:
    """Features (N, M) in the range of the real ones, around one mean per class."""
    means = torch.rand(6, NUM_FEATURES, generator=torch.Generator().manual_seed(0)) * 80
    noise = torch.randn(len(labels), NUM_FEATURES, generator=torch.Generator().manual_seed(seed))
    return means[labels] + 6 * noise


def mixing(seed: int = 3) -> Tensor:
    """A well-conditioned linear map (M, M)."""
    drawn = torch.randn(NUM_FEATURES, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q


ALL = torch.arange(4).repeat(60)
KEPT = torch.arange(4).repeat(10)
NEW = torch.tensor([4, 5]).repeat(20)


def kept_and_new() -> tuple[Tensor, Tensor]:
    """Old features of the examples at hand, and which of these are old ones."""
    both = torch.cat([features_of(KEPT, 2), features_of(NEW, 4)])
    return both, torch.arange(len(both)) < len(KEPT)


def test_sums_of_features_that_stay_stay():
    sums = AnalyticSums.of(features_of(ALL, 1), ALL, 4)
    both, old = kept_and_new()

    carried = carried_over(sums, both, both, old)

    torch.testing.assert_close(carried.gram, sums.gram, rtol=0.02, atol=0.02 * sums.gram.max())
    torch.testing.assert_close(carried.class_sums, sums.class_sums, rtol=0.02, atol=20.0)
    assert torch.equal(carried.counts, sums.counts)
    assert torch.equal(carried.mode_class, sums.mode_class)


def test_the_head_of_mixed_features_is_close_to_that_of_all_their_examples():
    before = features_of(ALL, 1)
    sums, exact = (AnalyticSums.of(x, ALL, 4) for x in (before, before @ mixing()))
    both, old = kept_and_new()

    carried = carried_over(sums, both, both @ mixing(), old)

    held_out = features_of(ALL, 9) @ mixing()
    scores, wanted = (held_out @ one.solve(RIDGE) for one in (carried, exact))
    assert (scores - wanted).abs().max() < 0.1
    assert float((scores.argmax(1) == wanted.argmax(1)).float().mean()) >= 0.99


def test_what_the_map_misses_is_added_to_the_gram_matrix():
    sums = AnalyticSums.of(features_of(ALL, 1), ALL, 4)
    many = features_of(KEPT.repeat(50), 2)
    noise = 10 * torch.randn(many.shape, generator=torch.Generator().manual_seed(6))
    old = torch.ones(len(many), dtype=torch.bool)

    carried = carried_over(sums, many, many + noise, old)

    calm = carried_over(sums, many, many, old)
    added = (carried.gram - calm.gram).diagonal().mean() / len(ALL)
    assert float(added) == pytest.approx(10**2, rel=0.15)


def test_a_carried_gram_matrix_is_symmetric_and_has_no_negative_direction():
    sums = AnalyticSums.of(features_of(ALL, 1), ALL, 4)
    both, old = kept_and_new()

    carried = carried_over(sums, both, both @ mixing(), old)

    assert torch.equal(carried.gram, carried.gram.T)
    assert float(torch.linalg.eigvalsh(carried.gram)[0]) > -1e-3


def test_int8_features_are_carried_as_floating_point_ones_are():
    rounded = features_of(ALL, 1).round().clamp(-127, 127)
    sums = AnalyticSums.of(rounded, ALL, 4)
    both, old = kept_and_new()
    both = both.round().clamp(-127, 127)

    carried = carried_over(sums, both.to(torch.int8), both.flip(1).to(torch.int8), old)

    assert torch.equal(carried.gram, carried_over(sums, both, both.flip(1), old).gram)


def test_without_an_old_example_nothing_can_be_carried_over():
    sums = AnalyticSums.of(features_of(ALL, 1), ALL, 4)
    new = features_of(NEW, 4)

    with pytest.raises(LearningError, match="one remembered example; keep a memory"):
        carried_over(sums, new, new, torch.zeros(len(new), dtype=torch.bool))


@pytest.mark.parametrize("spoilt", [0.0, float("nan")])
def test_features_that_no_map_fits_are_named(spoilt):
    sums = AnalyticSums.of(features_of(ALL, 1), ALL, 4)
    both, old = kept_and_new()

    with pytest.raises(LearningError, match="not finite or all zero"):
        carried_over(sums, both * spoilt, both, old)
