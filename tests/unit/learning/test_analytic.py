from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lifelong_ray.config import AnalyticConfig
from lifelong_ray.learning import widening
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.live import LiveHead
from lifelong_ray.learning.modes import choose_sharpness, class_scores
from lifelong_ray.types import LearningError

FEATURES = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
INTEGERS = (FEATURES * 40).relu().round().clamp(max=127).to(torch.int8)
LABELS = torch.arange(40) % 4


def same(one: AnalyticSums, other: AnalyticSums) -> None:
    assert torch.equal(one.gram, other.gram)
    assert torch.equal(one.class_sums, other.class_sums)
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.mode_class, other.mode_class)
    assert one.num_classes == other.num_classes


def close(one: AnalyticSums, other: AnalyticSums) -> None:
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.class_sums, other.class_sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.counts, other.counts)


def relative(sums: AnalyticSums, absolute: float) -> float:
    return absolute / float(sums.gram.diagonal().mean())


def clusters(num_examples: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_examples)
    centres = torch.randn(4, width, generator=generator)
    labels = torch.arange(num_examples) % 4
    drawn = torch.randn(num_examples, width, generator=generator)
    return centres[labels] + noise * drawn, labels


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("features", [FEATURES, INTEGERS], ids=["floats", "integers"])
def test_sums_are_those_of_a_plain_loop(features):
    sums = AnalyticSums.of(features, LABELS, 4)

    x = features.double()
    expected = AnalyticSums.empty(12, 4)
    for row, label in zip(x, LABELS, strict=True):
        expected.gram.add_(torch.outer(row, row))
        expected.class_sums[:, label] += row
        expected.counts[label] += 1
    close(sums, expected)


def test_sums_of_more_features_and_examples_than_one_block_are_exact():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randint(0, 128, (9_000, 1_037), generator=generator).to(torch.int8)
    some = torch.tensor([0, 999, 1_000, 1_036])

    sums = AnalyticSums.of(wide, torch.arange(9_000) % 3, 3)

    assert torch.equal(sums.gram[:, some], wide.double().T @ wide[:, some].double())
    assert torch.equal(sums.gram, sums.gram.T)
    assert torch.equal(sums.class_sums[:, 1], wide[1::3].double().sum(0))


def test_sums_are_the_same_bits_without_integer_instructions(monkeypatch):
    usual = AnalyticSums.of(INTEGERS, LABELS, 4)
    monkeypatch.setattr(widening, "has_fast_integers", lambda device: False)

    fallback = AnalyticSums.of(INTEGERS, LABELS, 4)

    same(fallback, usual)
    same(AnalyticSums.of(INTEGERS.float(), LABELS, 4), usual)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(40)), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_order_and_any_partition_give_the_same_sums_and_head_to_the_bit(order, cuts):
    joint = AnalyticSums.of(INTEGERS, LABELS, 4)
    edges = [0, *sorted(cuts), 40]

    merged = AnalyticSums.empty(12, 4)
    for first, last in pairwise(edges):
        mine = order[first:last]
        merged = AnalyticSums.of(INTEGERS[mine], LABELS[mine], 4).merge(merged)

    same(merged, joint)
    assert torch.equal(merged.solve(1e-3), joint.solve(1e-3))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), cut=st.integers(0, 10))
def test_adding_class_by_class_in_any_order_equals_all_at_once_to_the_bit(order, cut):
    names = torch.empty(4, dtype=torch.int64)
    names[list(order)] = torch.arange(4)
    joint = AnalyticSums.of(INTEGERS, names[LABELS], 4)

    grown = AnalyticSums.empty(12, 0)
    for position, c in enumerate(order):
        grown = grown.grow(position + 1)
        mine = INTEGERS[c == LABELS]
        for piece in (mine[:cut], mine[cut:]):
            grown = grown.add(piece, torch.full((len(piece),), position))

    same(grown, joint)
    assert torch.equal(grown.solve(1e-3), joint.solve(1e-3))


@settings(max_examples=25, deadline=None)
@given(gone=st.sets(st.integers(0, 39), max_size=30))
def test_unlearning_equals_never_having_learned_to_the_bit(gone):
    out = torch.tensor(sorted(gone), dtype=torch.int64)
    kept = torch.tensor([i for i in range(40) if i not in gone])

    unlearned = AnalyticSums.of(INTEGERS, LABELS, 4).subtract(INTEGERS[out], LABELS[out])

    never = AnalyticSums.of(INTEGERS[kept], LABELS[kept], 4)
    same(unlearned, never)
    assert torch.equal(unlearned.solve(1e-3), never.solve(1e-3))


def test_subtracting_floats_leaves_what_was_there_up_to_rounding():
    sums = AnalyticSums.of(FEATURES, LABELS, 4).subtract(FEATURES[25:], LABELS[25:])

    close(sums, AnalyticSums.of(FEATURES[:25], LABELS[:25], 4))


def test_subtracting_more_than_was_added_is_refused():
    sums = AnalyticSums.of(INTEGERS[:4], LABELS[:4], 4)

    with pytest.raises(LearningError, match="class 0 has 1 examples in the sums"):
        sums.subtract(INTEGERS[[0, 4]], LABELS[[0, 4]])


@pytest.mark.parametrize("features", [FEATURES, INTEGERS], ids=["floats", "integers"])
def test_a_weight_stands_for_copies(features):
    weights = torch.tensor([2.0] * 10 + [1.0] * 30)
    copied = torch.cat([torch.arange(10), torch.arange(40)])

    weighted = AnalyticSums.of(features, LABELS, 4, weights)

    close(weighted, AnalyticSums.of(features[copied], LABELS[copied], 4))


def test_weights_that_all_differ_count_too():
    features, labels = INTEGERS.repeat(10, 1), LABELS.repeat(10)
    weights = torch.linspace(0.5, 2.0, 400, dtype=torch.float64)

    weighted = AnalyticSums.of(features, labels, 4, weights)

    close(weighted, AnalyticSums.of(features.double(), labels, 4, weights))


def test_decay_weighs_all_that_was_seen_less():
    sums = AnalyticSums.of(FEATURES, LABELS, 4)

    close(sums.decayed(0.5), AnalyticSums.of(FEATURES, LABELS, 4, torch.full((40,), 0.5)))


def test_sums_of_different_classes_do_not_add_up_silently():
    with pytest.raises(ValueError, match="grow the smaller"):
        AnalyticSums.empty(3, 2).merge(AnalyticSums.empty(3, 4))


def test_sums_of_the_same_shape_but_other_modes_do_not_add_up_silently():
    one, other = (AnalyticSums.of(INTEGERS, LABELS, 4).open_modes([c]) for c in (0, 1))

    with pytest.raises(ValueError, match="same modes"):
        one.merge(other)


def test_classes_cannot_be_taken_back():
    with pytest.raises(ValueError, match="cannot shrink"):
        AnalyticSums.empty(3, 2).grow(1)


def test_a_label_outside_the_modes_is_refused():
    with pytest.raises(ValueError, match="from 0 to 3 are not among the 3 modes"):
        AnalyticSums.of(INTEGERS, LABELS, 3)


def test_features_that_overflowed_have_no_sums():
    with pytest.raises(LearningError, match="not finite"):
        AnalyticSums.of(torch.full((1, 3), float("inf")), torch.tensor([0]), 2)


# ---------------------------------------------------------------- modes


def test_an_opened_mode_takes_the_new_examples_of_its_class():
    sums = AnalyticSums.of(INTEGERS[:20], LABELS[:20], 4).open_modes([1, 3])

    more = sums.add(INTEGERS[20:], sums.newest_modes[LABELS[20:]])

    assert more.mode_class.tolist() == [0, 1, 2, 3, 1, 3]
    assert more.newest_modes.tolist() == [0, 4, 2, 5]
    assert more.counts.tolist() == [10, 5, 10, 5, 5, 5]


def test_an_empty_mode_is_not_opened_twice():
    sums = AnalyticSums.of(INTEGERS, LABELS, 4)

    once = sums.open_modes([1])

    same(once.open_modes([1]), once)


def test_modes_of_unknown_classes_cannot_be_opened():
    with pytest.raises(ValueError, match=r"\[7\] are not among the 4"):
        AnalyticSums.of(INTEGERS, LABELS, 4).open_modes([7])


def test_classes_that_come_later_get_one_mode_each():
    sums = AnalyticSums.of(INTEGERS, LABELS, 4).open_modes([0]).grow(6)

    assert sums.mode_class.tolist() == [0, 1, 2, 3, 0, 4, 5]


@settings(max_examples=25, deadline=None)
@given(modes=st.lists(st.integers(0, 2), min_size=40, max_size=40))
def test_all_modes_put_together_are_the_head_of_one_mode_per_class(modes):
    plain = AnalyticSums.of(INTEGERS, LABELS, 4)
    modes_N = LABELS + 4 * torch.tensor(modes)
    split = AnalyticSums.of(INTEGERS, modes_N, 4, mode_class=torch.arange(12) % 4)

    merged, new_K = split.merged_modes(1)

    same(merged, plain)
    assert torch.equal(new_K, torch.arange(12) % 4)
    assert torch.equal(merged.solve(1e-3), plain.solve(1e-3))


def test_the_most_alike_modes_are_put_together():
    features = torch.tensor([[100, 0], [0, 100], [96, 4], [50, 50]], dtype=torch.int8)
    sums = AnalyticSums.of(features, torch.arange(4), 2, mode_class=torch.tensor([0, 0, 0, 1]))

    merged, new_K = sums.merged_modes(2)

    assert merged.mode_class.tolist() == [0, 0, 1]
    assert new_K.tolist() == [0, 1, 0, 2]
    assert merged.class_sums[:, 0].tolist() == [196, 4]
    assert merged.counts.tolist() == [2, 1, 1]


def test_what_was_added_can_be_taken_out_under_its_new_mode():
    modes_N = LABELS + 4 * (torch.arange(40) >= 20)
    split = AnalyticSums.of(INTEGERS, modes_N, 4, mode_class=torch.arange(8) % 4)
    merged, new_K = split.merged_modes(1)

    less = merged.subtract(INTEGERS[30:], new_K[modes_N[30:]])

    same(less, AnalyticSums.of(INTEGERS[:30], LABELS[:30], 4))


def test_one_mode_per_class_gives_its_scores_to_the_bit():
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))

    by_class = class_scores(scores, torch.tensor([2, 0, 3, 1]), 4, sharpness=7.0)

    assert torch.equal(by_class, scores[:, [1, 3, 0, 2]])


def test_class_scores_are_soft_maxima():
    scores = torch.tensor([[0.2, 0.9, 0.4]])

    by_class = class_scores(scores, torch.tensor([0, 1, 0]), 2, sharpness=5.0)

    expected = math.log(math.exp(5 * 0.2) + math.exp(5 * 0.4)) / 5
    torch.testing.assert_close(by_class, torch.tensor([[expected, 0.9]]))


def test_sharpness_is_chosen_by_accuracy():
    # Two weak modes together must not outvote one strong one.
    scores = torch.tensor([[0.5, 0.6, 0.5], [0.9, 0.2, 0.1]])

    chosen = choose_sharpness(scores, torch.tensor([1, 0]), torch.tensor([0, 1, 0]), 2)

    assert chosen >= 10
    assert class_scores(scores, torch.tensor([0, 1, 0]), 2, chosen).argmax(1).tolist() == [1, 0]


def test_sharpness_does_not_matter_with_one_mode_per_class():
    assert choose_sharpness(torch.eye(3), torch.arange(3), torch.arange(3), 3) == 1.0


# ---------------------------------------------------------------- solving


@pytest.mark.parametrize("features", [FEATURES, INTEGERS], ids=["floats", "integers"])
def test_solution_is_that_of_ridge_regression(features):
    sums = AnalyticSums.of(features, LABELS, 4)

    weights = sums.solve(relative(sums, 0.5), dtype=torch.float64)

    x = torch.cat([features.double(), 0.5**0.5 * torch.eye(12, dtype=torch.float64)])
    y = torch.cat([F.one_hot(LABELS, 4).double(), torch.zeros(12, 4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(sums.solve(relative(sums, 0.5)), weights.float())


def test_ridge_is_relative_to_the_size_of_features():
    small, large = (AnalyticSums.of(FEATURES * size, LABELS, 4) for size in (1, 100))

    torch.testing.assert_close(large.solve(0.1) * 100, small.solve(0.1))


def test_class_balance_lifts_rare_classes_and_holds_none_down():
    keep = torch.tensor([i for i in range(40) if LABELS[i] or i < 8])
    sums = AnalyticSums.of(INTEGERS[keep], LABELS[keep], 4)

    lifted = sums.solve(0.1, 0.5) / sums.solve(0.1)

    expected = (sums.counts.mean() / sums.counts).clamp(min=1.0) ** 0.5
    torch.testing.assert_close(lifted, expected.float().expand(12, 4))


def test_a_class_of_few_examples_is_heard_and_does_not_drown_out_the_rest():
    def draw(counts: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        places = torch.eye(3, 16)[labels] * 3.5
        noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
        return places + noise, labels

    features, labels = draw((1_000, 1_000, 5), seed=0)
    sums = AnalyticSums.of(features, labels, 3)
    balance = AnalyticConfig().class_balance

    def right_by_class(class_balance: float) -> list[float]:
        tests, truth = draw((200, 200, 200), seed=1)
        answers = (tests @ sums.solve(1e-3, class_balance)).argmax(1)
        return [float((answers[truth == c] == c).float().mean()) for c in range(3)]

    assert right_by_class(0.0)[2] < 0.5
    assert right_by_class(balance)[2] > 0.8
    assert min(right_by_class(balance)[:2]) > 0.95
    assert min(right_by_class(1.0)[:2]) < 0.8


def test_rare_is_said_of_classes_and_not_of_the_modes_of_one():
    modes = torch.tensor([0] * 20 + [1] * 10 + [2] * 10)
    sums = AnalyticSums.of(INTEGERS, modes, 2, mode_class=torch.tensor([0, 1, 1]))

    lifted = sums.solve(0.1, 0.5)

    torch.testing.assert_close(lifted, sums.solve(0.1))  # Twenty of either class.


def test_full_class_balance_lifts_rare_classes_to_the_mean():
    sums = AnalyticSums.of(INTEGERS, torch.tensor([0] * 30 + [1] * 10), 2)
    system = sums.gram + sums.absolute_ridge(0.1) * torch.eye(12, dtype=torch.float64)

    weights = sums.solve(0.1, 1.0, dtype=torch.float64)

    means = torch.stack([INTEGERS[:30].double().mean(0), INTEGERS[30:].double().mean(0)], 1)
    counted_as = torch.tensor([30.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(weights, torch.linalg.solve(system, counted_as * means))


def test_left_out_scores_are_those_of_a_head_fitted_without_the_example():
    sums = AnalyticSums.of(FEATURES, LABELS, 4)

    scores = sums.left_out_scores(FEATURES, LABELS, torch.ones(40), relative(sums, 0.5))

    for i in (0, 17, 39):
        rest = sums.subtract(FEATURES[i : i + 1], LABELS[i : i + 1])
        head = rest.solve(relative(rest, 0.5))
        torch.testing.assert_close(scores[i].float(), FEATURES[i] @ head, rtol=1e-4, atol=1e-5)


def test_a_head_without_examples_has_no_solution():
    with pytest.raises(LearningError, match=r"ridge 0\.1; add examples or raise"):
        AnalyticSums.empty(3, 2).solve(0.1)


def test_a_singular_system_names_the_ridge():
    sums = AnalyticSums.of(torch.ones(1, 3, dtype=torch.int8), torch.tensor([0]), 1)

    with pytest.raises(LearningError, match="ridge 0; add"):
        sums.solve(0.0)


def test_no_features_give_an_empty_head():
    sums = AnalyticSums.of(INTEGERS[:, :0], LABELS, 4)

    assert sums.solve(sums.choose_ridge()).shape == (0, 4)


# ---------------------------------------------------------------- choosing the ridge


def test_with_many_examples_ridge_is_that_of_generalised_cross_validation():
    features, labels = clusters(400, 30, noise=4.0)
    sums = AnalyticSums.of(features, labels, 4)

    chosen = sums.choose_ridge()

    x, y = features.double(), F.one_hot(labels, 4).double()
    scores = {}
    for step in range(-12, 1):
        ridge = 10 ** (step / 2)
        added = ridge * x.square().sum(0).mean() * torch.eye(30, dtype=torch.float64)
        hat = x @ torch.linalg.solve(x.T @ x + added, x.T)
        scores[ridge] = float((y - hat @ y).square().sum() / (400 - hat.trace()) ** 2)
    almost_best = [ridge for ridge, score in scores.items() if score < 1.003 * min(scores.values())]
    assert len(almost_best) < 4  # else the choice would say little
    assert chosen == pytest.approx(min(almost_best))


def test_with_few_examples_ridge_is_that_of_the_largest_marginal_likelihood():
    features, labels = clusters(24, 60, noise=2.0)
    sums = AnalyticSums.of(features, labels, 4)

    chosen = sums.choose_ridge()

    x, y = features.double(), F.one_hot(labels, 4).double()
    scores = {}
    for step in range(-12, 1):
        ridge = 10 ** (step / 2)
        covariance = torch.eye(24, dtype=torch.float64) + x @ x.T / sums.absolute_ridge(ridge)
        fit = (y * torch.linalg.solve(covariance, y)).sum().log() * 24
        scores[ridge] = float(fit + torch.logdet(covariance))
    assert chosen == pytest.approx(min(scores, key=scores.__getitem__))


def test_an_earlier_choice_is_only_moved_to_a_neighbour():
    features, labels = clusters(400, 30, noise=4.0)
    sums = AnalyticSums.of(features, labels, 4)
    best = sums.choose_ridge()

    assert sums.choose_ridge(best) == best
    assert sums.choose_ridge(1e-6) in (1e-6, pytest.approx(10**-5.5))


def test_large_widths_estimate_the_trace_well(monkeypatch):
    features, labels = clusters(400, 100, noise=4.0)
    sums = AnalyticSums.of(features, labels, 4)
    exact = sums._badness(1e-2)

    monkeypatch.setattr("lifelong_ray.learning.analytic._EXACT_TRACE_FEATURES", 50)

    assert sums._badness(1e-2) == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("num_examples", [1, 2, 12, 24])
def test_few_examples_have_a_ridge_that_solves(num_examples):
    sums = AnalyticSums.of(INTEGERS[:num_examples], LABELS[:num_examples], 4)

    weights = sums.solve(sums.choose_ridge())

    assert torch.isfinite(weights).all()


def test_a_ridge_cannot_be_chosen_without_examples():
    with pytest.raises(LearningError, match="no examples"):
        AnalyticSums.empty(3, 2).choose_ridge()


# ---------------------------------------------------------------- the live head


@pytest.mark.parametrize("class_balance", [0.0, 0.5])
def test_a_live_head_with_more_examples_is_the_head_solved_anew(class_balance):
    sums = AnalyticSums.of(INTEGERS[:30], LABELS[:30], 4)
    added = sums.absolute_ridge(1e-3)

    live = LiveHead.of(sums, 1e-3, class_balance)
    for piece in (slice(30, 31), slice(31, 40)):
        live = live.with_examples(INTEGERS[piece], LABELS[piece])

    joint = AnalyticSums.of(INTEGERS, LABELS, 4)
    anew = joint.solve(relative(joint, added), class_balance, dtype=torch.float64)
    error = (live.solution(torch.float64) - anew).norm() / anew.norm()
    assert error < 1e-8


def test_rows_of_a_live_head_may_count_as_half_an_example():
    halves = torch.full((10,), 0.5)
    sums = AnalyticSums.of(INTEGERS[:30], LABELS[:30], 4)
    joint = sums.add(INTEGERS[30:40], LABELS[30:40], halves)

    live = LiveHead.of(sums, 1e-3).with_examples(INTEGERS[30:40], LABELS[30:40], weight=0.5)

    ridge = relative(joint, sums.absolute_ridge(1e-3))
    anew = joint.solve(ridge, dtype=torch.float64)
    assert (live.solution(torch.float64) - anew).norm() / anew.norm() < 1e-8
    assert torch.equal(live.counts, joint.counts)


def test_a_live_head_gives_examples_back():
    sums = AnalyticSums.of(INTEGERS, LABELS, 4)
    before = LiveHead.of(sums, 1e-3)

    after = before.with_examples(INTEGERS[:3], LABELS[:3], -1)

    fewer = sums.subtract(INTEGERS[:3], LABELS[:3])
    anew = fewer.solve(relative(fewer, sums.absolute_ridge(1e-3)), dtype=torch.float64)
    assert (after.solution(torch.float64) - anew).norm() / anew.norm() < 1e-8
    again = after.with_examples(INTEGERS[:3], LABELS[:3])
    torch.testing.assert_close(again.solution(), before.solution())


def test_a_live_head_refuses_to_give_more_than_it_has():
    live = LiveHead.of(AnalyticSums.of(INTEGERS[:4], LABELS[:4], 4), 1e-3)

    with pytest.raises(LearningError, match="subtract only what was added"):
        live.with_examples(INTEGERS[:8], LABELS[:8], -1)


def test_a_live_head_notices_examples_that_it_does_not_hold():
    live = LiveHead.of(AnalyticSums.of(INTEGERS[:4], LABELS[:4], 4), 1e-3)

    with pytest.raises(LearningError, match="does not hold"):
        live.with_examples(INTEGERS[8:9], LABELS[8:9], -1)


def test_examples_come_or_go():
    live = LiveHead.of(AnalyticSums.of(INTEGERS, LABELS, 4), 1e-3)

    with pytest.raises(ValueError, match="1 or -1, not 0"):
        live.with_examples(INTEGERS[:1], LABELS[:1], 0)


def test_weighted_examples_can_be_taken_out_again():
    weights = torch.full((40,), 0.1, dtype=torch.float64)
    sums = AnalyticSums.of(INTEGERS[:10], LABELS[:10], 4).add(INTEGERS, LABELS, weights)

    less = sums.subtract(INTEGERS[10:], LABELS[10:], weights[10:]).subtract(
        INTEGERS[:10], LABELS[:10], weights[:10]
    )

    close(less, AnalyticSums.of(INTEGERS[:10], LABELS[:10], 4))


# ---------------------------------------------------------------- a factor in float32


def corrected(sums: AnalyticSums, ridge: float) -> torch.Tensor | None:
    return sums._corrected_solution(sums.class_sums, ridge)


def test_a_wide_head_by_a_float32_factor_is_that_of_float64(monkeypatch):
    monkeypatch.setattr("lifelong_ray.learning.analytic._CORRECTED_FEATURES", 1)
    sums = AnalyticSums.of(INTEGERS, LABELS, 4)

    solution = corrected(sums, 1e-3)

    assert solution is not None
    exact = sums.solve(1e-3, dtype=torch.float64)
    torch.testing.assert_close(solution, exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sums.solve(1e-3), exact.float(), rtol=1e-6, atol=1e-9)


def test_where_float32_does_not_suffice_the_head_is_solved_in_float64(monkeypatch):
    monkeypatch.setattr("lifelong_ray.learning.analytic._CORRECTED_FEATURES", 1)
    twins = torch.cat([INTEGERS, INTEGERS], dim=1)  # A Gram matrix of half the rank.
    sums = AnalyticSums.of(twins, LABELS, 4)

    assert corrected(sums, 1e-13) is None
    assert torch.equal(sums.solve(1e-13), sums.solve(1e-13, dtype=torch.float64).float())


def test_examples_are_added_onto_sums_in_place():
    onto = AnalyticSums.of(INTEGERS[:20], LABELS[:20], 4)

    both = AnalyticSums.of(INTEGERS[20:], LABELS[20:], 4, onto=onto)

    assert both is onto
    same(both, AnalyticSums.of(INTEGERS, LABELS, 4))


def test_merging_into_the_tensors_of_the_other_leaves_the_first_as_it_was():
    first = AnalyticSums.of(INTEGERS[:20], LABELS[:20], 4)
    before = first.gram.clone()

    both = first.merged_into(AnalyticSums.of(INTEGERS[20:], LABELS[20:], 4))

    same(both, AnalyticSums.of(INTEGERS, LABELS, 4))
    assert torch.equal(first.gram, before)
