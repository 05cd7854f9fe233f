from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lifelong_ray.learning import AnalyticSums, projection
from lifelong_ray.types import LearningError

FEATURES = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 4


def close(one: AnalyticSums, other: AnalyticSums) -> None:
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.class_sums, other.class_sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(one.counts, other.counts)


def test_solution_is_that_of_ridge_regression():
    sums = AnalyticSums.of(FEATURES, LABELS, 4)

    x = torch.cat([FEATURES.double(), 0.5**0.5 * torch.eye(12, dtype=torch.float64)])
    y = torch.cat([F.one_hot(LABELS, 4).double(), torch.zeros(12, 4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(sums.solve(0.5), expected.float())


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), cut=st.integers(0, 10))
def test_adding_class_by_class_in_any_order_equals_all_at_once(order, cut):
    joint = AnalyticSums.of(FEATURES, LABELS, 4)

    grown = AnalyticSums.empty(12, 1)
    for c in order:
        mine = FEATURES[c == LABELS]
        grown = grown.grow(max(c + 1, grown.num_classes))
        grown = grown.add(mine[:cut], torch.full((len(mine[:cut]),), c))
        grown = grown.merge(
            AnalyticSums.of(mine[cut:], torch.full((len(mine[cut:]),), c), grown.num_classes)
        )

    close(grown, joint)
    torch.testing.assert_close(grown.solve(1.0), joint.solve(1.0))


def test_subtracting_what_was_added_leaves_what_was_there():
    kept, gone = slice(0, 25), slice(25, 40)

    sums = AnalyticSums.of(FEATURES, LABELS, 4).subtract(FEATURES[gone], LABELS[gone])

    close(sums, AnalyticSums.of(FEATURES[kept], LABELS[kept], 4))


def test_subtracting_more_than_was_added_is_refused():
    sums = AnalyticSums.of(FEATURES[:4], LABELS[:4], 4)

    with pytest.raises(LearningError, match="class 0 has 1 examples in the sums"):
        sums.subtract(FEATURES[[0, 4]], LABELS[[0, 4]])


def test_a_weight_stands_for_copies():
    weights = torch.tensor([2.0] * 10 + [1.0] * 30)
    copied = torch.cat([torch.arange(10), torch.arange(40)])

    weighted = AnalyticSums.of(FEATURES, LABELS, 4, weights)

    close(weighted, AnalyticSums.of(FEATURES[copied], LABELS[copied], 4))


def test_left_out_scores_are_those_of_a_head_fitted_without_the_example():
    sums = AnalyticSums.of(FEATURES, LABELS, 4)

    scores = sums.left_out_scores(FEATURES, LABELS, torch.ones(40), 0.5)

    for i in (0, 17, 39):
        rest = torch.arange(40) != i
        head = AnalyticSums.of(FEATURES[rest], LABELS[rest], 4).solve(0.5)
        torch.testing.assert_close(scores[i].float(), FEATURES[i] @ head, rtol=1e-4, atol=1e-5)


def test_sums_of_different_classes_do_not_add_up_silently():
    with pytest.raises(ValueError, match="grow the smaller"):
        AnalyticSums.empty(3, 2).merge(AnalyticSums.empty(3, 4))


def test_sums_that_overflowed_have_no_solution():
    sums = AnalyticSums.of(torch.full((1, 3), float("inf")), torch.tensor([0]), 2)

    with pytest.raises(LearningError, match="not finite"):
        sums.solve(1.0)


def test_projection_follows_from_its_seed():
    assert torch.equal(projection(5, 7, seed=1), projection(5, 7, seed=1))
    assert not torch.equal(projection(5, 7, seed=1), projection(5, 7, seed=2))
