from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lifelong_ray.learning.replay import (
    ReplayMemory,
    endless_batches,
    herding_order,
    mix_batches,
)
from lifelong_ray.types import LearningError
from tests.proof import short_and_long

# A statistical test of this file fails by chance once in a million runs with new seeds.
ONE_IN_A_MILLION = 1e-6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(first: int, count: int) -> torch.Tensor:
    """Images whose only pixel is their number."""
    return torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None]


def labelled(*labels: int) -> torch.Tensor:
    return torch.tensor(labels, dtype=torch.int64)


def nothing(num_classes: int = 1) -> ReplayMemory:
    return ReplayMemory.empty((1, 1, 1), num_classes)


def numbers(memory: ReplayMemory) -> list[int]:
    return memory.inputs.flatten().tolist()


def how_often(offer, num: int, rounds: int) -> torch.Tensor:
    """How often each number is kept, over independent memories."""
    generator, kept_N = seeded(), torch.zeros(num, dtype=torch.float64)
    for _ in range(rounds):
        kept_N[offer(generator).inputs.flatten().long()] += 1
    return kept_N


def assert_fair(kept_N: torch.Tensor, share: float, rounds: int) -> None:
    """No count is further from its binomial mean than chance allows."""
    limit = stats.norm.isf(ONE_IN_A_MILLION / 2 / len(kept_N))
    error = math.sqrt(share * (1 - share) / rounds)
    assert (kept_N / rounds - share).abs().max() < limit * error


def in_parts(generator, parts, places=6, selection="class_balanced", **more) -> ReplayMemory:
    memory, first = nothing(), 0
    for update, count in enumerate(parts):
        memory = memory.updated(
            numbered(first, count),
            torch.zeros(count, dtype=torch.int64),
            memory_per_class=places,
            generator=generator,
            selection=selection,
            update=update,
            **more,
        )
        first += count
    return memory


@short_and_long("rounds", 120, 4_000)
@pytest.mark.parametrize("selection", ["class_balanced", "reservoir"])
@pytest.mark.parametrize("parts", [(24,), (4, 13, 7), (7, *[1] * 5), (5, 0, 18, 1)])
def test_every_example_ever_offered_is_kept_with_the_same_probability(parts, selection, rounds):
    num_seen = sum(parts)

    kept_N = how_often(lambda g: in_parts(g, parts, selection=selection), num_seen, rounds)

    assert kept_N.sum() == 6 * rounds
    assert_fair(kept_N, 6 / num_seen, rounds)


@short_and_long("rounds", 300, 20_000)
def test_pairs_of_one_update_are_kept_together_as_in_a_simple_random_sample(rounds):
    together = 0
    generator = seeded()
    for _ in range(rounds):
        together += {0, 1} <= set(numbers(in_parts(generator, (8,), places=3)))

    expected = 3 / 8 * 2 / 7
    assert stats.binomtest(together, rounds, expected).pvalue > ONE_IN_A_MILLION


def test_an_update_has_its_part_of_a_class_to_the_place():
    memory = in_parts(seeded(), (100, 60, 40), places=10)

    counts = torch.bincount(memory.updates, minlength=3)

    assert counts.tolist()[2] == 2
    assert abs(int(counts[0]) - 5) <= 2
    assert memory.updates.tolist() == [
        0 if number < 100 else 1 if number < 160 else 2 for number in numbers(memory)
    ]


@short_and_long("rounds", 200, 8_000)
def test_a_memory_that_keeps_a_share_stays_fair_while_it_grows(rounds):
    kept_N = how_often(lambda g: in_parts(g, (20, 10, 30), 0, memory_share=0.2), 60, rounds)

    assert kept_N.sum() == 12 * rounds
    assert_fair(kept_N, 0.2, rounds)


@pytest.mark.parametrize(
    ("num_seen", "share", "expected"),
    [(30, 0.1, 3), (31, 0.1, 4), (10, 0.1, 2), (1, 0.1, 1), (7, 1.0, 7), (100, 0.07, 7)],
)
def test_places_are_the_share_rounded_up_but_not_below_the_number_given(num_seen, share, expected):
    assert len(in_parts(seeded(), (num_seen,), 2, memory_share=share)) == expected


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4),
    per_class=st.integers(0, 5),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_memory_is_balanced_and_counts_what_it_stands_for(batches, per_class, share, seed):
    generator, memory = seeded(seed), nothing(3)
    for batch in batches:
        labels = labelled(*batch)
        memory = memory.updated(
            labels.to(torch.uint8)[:, None, None, None],
            labels,
            memory_per_class=per_class,
            memory_share=share,
            generator=generator,
        )

    seen = torch.bincount(labelled(*[c for batch in batches for c in batch]), minlength=3)
    places = (seen * share).ceil().long().clamp(min=per_class)
    assert torch.equal(memory.seen, seen)
    assert torch.equal(memory.counts(), torch.minimum(seen, places))
    assert memory.inputs.flatten().tolist() == memory.labels.tolist()
    assert memory.labels.tolist() == sorted(memory.labels.tolist())
    if per_class or share:
        total = torch.zeros(3, dtype=torch.float64).index_add(0, memory.labels, memory.weights())
        torch.testing.assert_close(total, seen.double())


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4),
    per_class=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_global_reservoir_has_one_weight_for_all(batches, per_class, seed):
    generator, memory = seeded(seed), nothing(3)
    for batch in batches:
        labels = labelled(*batch)
        memory = memory.updated(
            labels.to(torch.uint8)[:, None, None, None],
            labels,
            memory_per_class=per_class,
            generator=generator,
            selection="reservoir",
        )

    num_seen = sum(map(len, batches))
    assert len(memory) == min(num_seen, 3 * per_class)
    each = torch.full((len(memory),), num_seen / max(1, len(memory)), dtype=torch.float64)
    torch.testing.assert_close(memory.weights(), each)


def test_a_global_reservoir_keeps_more_of_frequent_classes():
    labels = (torch.arange(1_000) % 10 == 0).long()

    memory = nothing(2).updated(
        torch.zeros(1_000, 1, 1, 1, dtype=torch.uint8),
        labels,
        memory_per_class=100,
        generator=seeded(),
        selection="reservoir",
    )

    rare = int(memory.counts()[1])
    assert stats.hypergeom(1_000, 100, 200).cdf(rare) > ONE_IN_A_MILLION
    assert stats.hypergeom(1_000, 100, 200).sf(rare - 1) > ONE_IN_A_MILLION


@short_and_long("rounds", 200, 8_000)
@pytest.mark.parametrize("then", ["class_balanced", "reservoir"])
def test_weights_stay_right_when_capacity_rises(then, rounds):
    """As when new classes enlarge a reservoir: new examples are kept at a higher rate."""
    generator, estimates = seeded(), []
    for _ in range(rounds):
        memory = in_parts(generator, (40,), 4)
        memory = memory.updated(
            numbered(40, 20),
            torch.zeros(20, dtype=torch.int64),
            memory_per_class=12,
            generator=generator,
            selection=then,
        )
        estimates.append(float(memory.weights() @ memory.inputs.flatten().double()))

    # All four old ones stay and stand for 10 each, the eight new ones for 2.5.
    assert sorted(memory.weights().unique().tolist()) == [2.5, 10.0]
    truth = sum(range(60))
    assert stats.ttest_1samp(estimates, truth).pvalue > ONE_IN_A_MILLION


def test_weights_stay_right_when_a_balanced_memory_becomes_a_reservoir():
    labels = labelled(*[0] * 90, *[1] * 10)
    balanced = nothing(2).updated(numbered(0, 100), labels, memory_per_class=5, generator=seeded())

    memory = balanced.updated(
        numbered(0, 0), labels[:0], memory_per_class=5, generator=seeded(), selection="reservoir"
    )

    assert memory.weights().tolist() == [18.0] * 5 + [2.0] * 5


def test_new_examples_stand_for_a_class_of_which_nothing_was_kept():
    memory = in_parts(seeded(), (30,), 0)

    memory = memory.updated(
        numbered(30, 10), torch.zeros(10, dtype=torch.int64), memory_per_class=5, generator=seeded()
    )

    assert memory.weights().tolist() == [8.0] * 5


def test_without_stored_weights_a_class_stands_for_what_was_seen_of_it():
    memory = in_parts(seeded(), (30,), 5)

    assert replace(memory, stands_for=None).weights().tolist() == [6.0] * 5


def test_a_smaller_memory_keeps_a_part_of_the_larger():
    large = in_parts(seeded(), (8,), 8)

    small = large.updated(
        numbered(0, 0), labelled(), memory_per_class=3, generator=seeded(), num_classes=2
    )

    assert len(small) == 3
    assert small.seen.tolist() == [8, 0]
    assert small.weights().tolist() == pytest.approx([8 / 3] * 3)


def test_the_generator_alone_decides():
    one, two = (in_parts(seeded(3), (30, 30)) for _ in range(2))
    other = in_parts(seeded(4), (30, 30))

    assert numbers(one) == numbers(two)
    assert numbers(one) != numbers(other)


def test_sixty_thousand_new_examples_take_a_moment():
    images = torch.zeros(60_000, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(60_000) % 100
    memory = ReplayMemory.empty((1, 4, 4), 100)

    seconds = []
    for _ in range(5):
        began_s = time.process_time()
        memory.updated(images, labels, memory_per_class=20, generator=seeded())
        seconds.append(time.process_time() - began_s)

    assert min(seconds) < 0.1


# ---------------------------------------------------------------- herding


def herded_by_loop(features: torch.Tensor, num: int, weights: torch.Tensor) -> list[int]:
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    mean = (weights[:, None] * unit).sum(0) / weights.sum()
    chosen: list[int] = []
    for k in range(1, num + 1):
        distances = [
            math.inf
            if i in chosen
            else float((mean - (unit[chosen].sum(0) + unit[i]) / k).square().sum())
            for i in range(len(unit))
        ]
        chosen.append(min(range(len(unit)), key=distances.__getitem__))
    return chosen


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 12), wanted=st.integers(0, 14), seed=st.integers(0, 999))
def test_herding_is_the_greedy_approach_of_the_mean(num, wanted, seed):
    generator = seeded(seed)
    features = torch.randn(num, 4, generator=generator)
    weights = torch.rand(num, generator=generator, dtype=torch.float64) + 0.1

    order = herding_order(features, wanted, weights).tolist()

    assert order == herded_by_loop(features, min(num, wanted), weights)


def test_herding_the_first_so_many_is_herding_so_many():
    features = torch.randn(30, 5, generator=seeded())

    assert herding_order(features, 12)[:5].tolist() == herding_order(features, 5).tolist()


def test_herded_examples_are_nearer_to_the_mean_than_drawn_ones():
    features = torch.randn(200, 8, generator=seeded()) + 1
    unit = torch.nn.functional.normalize(features, dim=1)

    def distance(positions: torch.Tensor) -> float:
        return float((unit[positions].mean(0) - unit.mean(0)).norm())

    drawn = [distance(torch.randperm(200, generator=seeded(i))[:10]) for i in range(50)]
    assert distance(herding_order(features, 10)) < min(drawn)


def herd(memory: ReplayMemory, features: torch.Tensor | None, labels, first, places, **more):
    return memory.updated(
        numbered(first, len(labels)),
        labels,
        memory_per_class=places,
        generator=seeded(),
        selection="herding",
        features=features,
        **more,
    )


def test_a_herded_memory_keeps_the_first_ones_when_places_become_fewer():
    features = torch.randn(20, 3, generator=seeded())
    large = herd(nothing(), features, labelled(*[0] * 20), 0, 8)

    small = herd(large, None, labelled(), 0, 3)

    assert numbers(large) == herding_order(features, 8).tolist()
    assert numbers(small) == numbers(large)[:3]
    assert small.weights().tolist() == pytest.approx([20 / 3] * 3)


def test_a_class_without_new_examples_is_not_herded_anew():
    features = torch.randn(20, 3, generator=seeded())
    before = herd(nothing(), features, labelled(*[0] * 20), 0, 6)
    anew = torch.randn(6 + 10, 3, generator=seeded(1))

    after = herd(before, anew, labelled(*[1] * 10), 20, 4, num_classes=2)

    assert numbers(after)[:4] == numbers(before)[:4]
    assert numbers(after)[4:] == (herding_order(anew[6:], 4) + 20).tolist()
    assert after.counts().tolist() == [4, 4]


def test_a_class_with_new_examples_is_herded_from_both_by_what_they_stand_for():
    before = herd(nothing(), torch.randn(20, 3, generator=seeded()), labelled(*[0] * 20), 0, 4)
    features = torch.randn(4 + 6, 3, generator=seeded(1))
    pool = [*numbers(before), *range(20, 26)]

    after = herd(before, features, labelled(*[0] * 6), 20, 4)

    weights = torch.tensor([5.0] * 4 + [1.0] * 6)
    assert numbers(after) == [pool[i] for i in herding_order(features, 4, weights).tolist()]
    assert after.weights().tolist() == [6.5] * 4


def test_herding_needs_features_of_remembered_and_new_examples():
    before = herd(nothing(), torch.ones(4, 2), labelled(0, 0, 0, 0), 0, 3)

    with pytest.raises(ValueError, match=r"of 3 remembered and 2 new examples, not \(2, 2\)"):
        herd(before, torch.ones(2, 2), labelled(0, 0), 4, 3)


# ---------------------------------------------------------------- what is kept with an example


def test_logits_are_kept_with_their_example_and_unknown_where_there_were_none():
    generator = seeded()
    memory = nothing(2).updated(
        numbered(0, 2), labelled(0, 1), memory_per_class=5, generator=generator
    )
    logits = torch.tensor([[2.0, 20.0], [3.0, 30.0]])
    memory = memory.updated(
        numbered(2, 2), labelled(0, 1), memory_per_class=5, generator=generator, logits=logits
    )
    memory = memory.updated(
        numbered(4, 1),
        labelled(2),
        memory_per_class=5,
        generator=generator,
        num_classes=3,
        logits=torch.tensor([[4.0, 40.0, 400.0]]),
    )

    nan = math.nan
    expected = {
        0: [nan, nan, nan],
        1: [nan, nan, nan],
        2: [2.0, 20.0, nan],
        3: [3.0, 30.0, nan],
        4: [4.0, 40.0, 400.0],
    }
    torch.testing.assert_close(
        memory.logits, torch.tensor([expected[n] for n in numbers(memory)]), equal_nan=True
    )


def test_a_memory_without_logits_stays_without():
    memory = in_parts(seeded(), (8, 8))

    assert memory.logits.shape == (6, 0)
    assert memory.padded(4).logits.shape == (6, 0)


def test_padding_adds_unseen_classes_that_stored_logits_do_not_know():
    memory = in_parts(seeded(), (2,), logits=torch.ones(2, 1)).padded(3)

    assert memory.num_classes == 3
    assert memory.seen.tolist() == [2, 0, 0]
    assert memory.logits[:, 0].tolist() == [1.0, 1.0]
    assert memory.logits[:, 1:].isnan().all()
    with pytest.raises(ValueError, match="never taken away"):
        memory.padded(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_are_kept_where_images_may_not_be(dtype):
    features = torch.arange(6, dtype=dtype).reshape(3, 2)
    memory = ReplayMemory.empty((2,), 1, dtype).updated(
        features, labelled(0, 0, 0), memory_per_class=3, generator=seeded()
    )

    assert memory.content == "features"
    assert memory.inputs.dtype == dtype
    assert memory.inputs.tolist() == features.tolist()
    assert nothing().content == "images"


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0], "memory of another image size"),
        (torch.zeros(1, 1, 1, 1), [0], "torch.uint8 of shape .* torch.float32 of shape"),
        (numbered(0, 1), [2], "a memory label is 2, outside the 2 classes"),
        (numbered(0, 1), [-1], "a memory label is -1, outside"),
        (numbered(0, 2), [0], "2 examples but 1 memory labels"),
    ],
)
def test_examples_that_do_not_fit_the_memory_are_refused(inputs, labels, message):
    with pytest.raises(LearningError, match=message):
        nothing(2).updated(inputs, labelled(*labels), memory_per_class=1, generator=seeded())


def test_logits_that_do_not_fit_are_refused():
    for logits in (torch.zeros(1, 1), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="for 2 new examples and 1 classes"):
            in_parts(seeded(), (2,), logits=logits)


def test_a_memory_of_parts_that_do_not_fit_each_other_is_refused():
    memory = in_parts(seeded(), (8,))

    with pytest.raises(ValueError, match="6 labels but 5 rows of updates"):
        replace(memory, updates=memory.updates[1:])
    with pytest.raises(ValueError, match=r"inputs are torch\.int64"):
        replace(memory, inputs=memory.inputs.long())


# ---------------------------------------------------------------- erasure


def test_forgotten_examples_are_gone_and_the_others_stand_for_the_rest():
    memory = nothing(2).updated(
        numbered(0, 30),
        labelled(*[0] * 20, *[1] * 10),
        memory_per_class=4,
        generator=seeded(),
        logits=torch.arange(60.0).reshape(30, 2),
    )

    left = memory.without(torch.tensor([1, 2]))

    assert numbers(left) == [n for i, n in enumerate(numbers(memory)) if i not in (1, 2)]
    assert left.logits[:, 0].tolist() == [2.0 * n for n in numbers(left)]
    assert left.seen.tolist() == [18, 10]
    assert left.weights().tolist() == pytest.approx([9.0, 9.0] + [2.5] * 4)


def test_a_mask_forgets_what_positions_do():
    memory = in_parts(seeded(), (30,))
    mask = torch.tensor([False, True, False, False, True, False])

    by_mask, by_position = memory.without(mask), memory.without(torch.tensor([4, 1, 4]))

    assert numbers(by_mask) == numbers(by_position)
    assert by_mask.seen.tolist() == by_position.seen.tolist() == [28]


def test_erasing_also_counts_examples_that_were_not_remembered():
    memory = in_parts(seeded(), (30,))

    left = memory.without(torch.tensor([0]), erased=torch.tensor([10]))

    assert left.seen.tolist() == [20]
    assert left.weights().tolist() == pytest.approx([4.0] * 5)


def test_everything_can_be_forgotten():
    memory = in_parts(seeded(), (30,))

    left = memory.without(torch.ones(6, dtype=torch.bool), erased=torch.tensor([30]))

    assert len(left) == 0
    assert left.seen.tolist() == [0]


@short_and_long("rounds", 200, 6_000)
def test_what_is_left_after_erasing_is_as_fair_as_before(rounds):
    gone = 5

    def offer(generator: torch.Generator) -> ReplayMemory:
        memory = in_parts(generator, (20,))
        memory = memory.without(memory.inputs.flatten() == gone, erased=torch.tensor([1]))
        return memory.updated(
            numbered(20, 10),
            torch.zeros(10, dtype=torch.int64),
            memory_per_class=6,
            generator=generator,
        )

    kept_N = how_often(offer, 30, rounds)

    assert kept_N[gone] == 0
    assert_fair(torch.cat([kept_N[:gone], kept_N[gone + 1 :]]), 6 / 29, rounds)


def test_what_cannot_be_forgotten_is_named():
    memory = in_parts(seeded(), (8,))

    with pytest.raises(ValueError, match="memory has 6 examples"):
        memory.without(torch.tensor([6]))
    with pytest.raises(ValueError, match="mask has 2 entries"):
        memory.without(torch.tensor([True, False]))
    for erased in (0, 4):
        with pytest.raises(ValueError, match=rf"\[{erased}\] examples by class .* of \[8\] seen"):
            memory.without(torch.tensor([0]), erased=torch.tensor([erased]))


# ---------------------------------------------------------------- batches


@settings(max_examples=60, deadline=None)
@given(
    num_new=st.integers(1, 90),
    num_remembered=st.integers(0, 40),
    share=st.floats(0, 0.9),
    batch_size=st.integers(1, 33),
)
def test_an_epoch_shows_all_new_and_enough_of_the_old(num_new, num_remembered, share, batch_size):
    plan = mix_batches(num_new, num_remembered, share, batch_size)

    batches = plan(seeded())

    shown = torch.cat(batches)
    assert sorted(shown[shown < num_new].tolist()) == list(range(num_new))
    remembered = shown[shown >= num_new]
    if share and num_remembered:
        assert set(remembered.tolist()) == set(range(num_new, num_new + num_remembered))
        assert len(remembered) >= share * len(shown) - 1e-9
    else:
        assert not len(remembered)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size + 1
    assert len(plan(seeded(1))) == len(batches)


def test_replay_without_place_for_new_examples_is_refused():
    with pytest.raises(LearningError, match="below 1"):
        mix_batches(3, 3, 1.0, 4)


@settings(max_examples=60, deadline=None)
@given(
    num_new=st.integers(1, 30),
    num_remembered=st.integers(0, 30),
    new_per_batch=st.integers(1, 9),
    remembered_per_batch=st.integers(0, 9),
    num_batches=st.integers(0, 12),
)
def test_endless_batches_have_their_sizes_and_show_all_alike(
    num_new, num_remembered, new_per_batch, remembered_per_batch, num_batches
):
    plan = endless_batches(
        num_new, num_remembered, new_per_batch, remembered_per_batch, num_batches
    )

    batches = plan(seeded())

    assert len(batches) == num_batches
    replayed = remembered_per_batch if num_remembered else 0
    for batch in batches:
        assert (batch[:new_per_batch] < num_new).all()
        assert (batch[new_per_batch:] >= num_new).all()
        assert len(batch) == new_per_batch + replayed
    shown = torch.bincount(torch.cat([*batches, labelled()]), minlength=num_new + num_remembered)
    for part in (shown[:num_new], shown[num_new:]):
        assert not len(part) or part.max() - part.min() <= 1


def test_endless_batches_go_through_all_before_any_comes_again_in_a_new_order():
    batches = endless_batches(50, 0, 25, 0, 4)(seeded())

    first, second = torch.cat(batches[:2]), torch.cat(batches[2:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()


def test_endless_batches_follow_from_the_generator_alone():
    plan = endless_batches(50, 20, 8, 4, 9)

    one, two, other = plan(seeded(1)), plan(seeded(1)), plan(seeded(2))

    assert all(map(torch.equal, one, two))
    assert not all(map(torch.equal, one, other))


def test_endless_batches_of_nothing_new_are_refused():
    with pytest.raises(LearningError, match="of 0 new examples"):
        endless_batches(0, 5, 4, 4, 1)
