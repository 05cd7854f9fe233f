from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.learning import ReplayMemory, mix_batches
from lifelong_ray.types import LearningError


def numbered(first: int, count: int) -> torch.Tensor:
    """Images whose only pixel is their number."""
    return torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None]


def test_every_example_ever_offered_is_kept_with_the_same_probability():
    generator = torch.Generator().manual_seed(0)
    rounds, kept = 3_000, torch.zeros(24)
    for _ in range(rounds):
        memory = ReplayMemory.empty((1, 1, 1), 1)
        for first, count in ((0, 4), (4, 13), (17, 7)):
            labels = torch.zeros(count, dtype=torch.int64)
            memory = memory.updated(numbered(first, count), labels, 6, generator)
        kept[memory.images.flatten().long()] += 1

    # Each count is binomial(3000, 1/4): a deviation of 4.5 standard errors is 0.036.
    assert len(memory) == 6
    assert memory.seen.tolist() == [24]
    assert (kept / rounds - 6 / 24).abs().max() < 0.036


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4),
    per_class=st.integers(0, 5),
)
def test_memory_is_balanced_and_counts_what_it_stands_for(batches, per_class):
    generator = torch.Generator().manual_seed(0)
    memory = ReplayMemory.empty((1, 1, 1), 3)
    for batch in batches:
        labels = torch.tensor(batch, dtype=torch.int64)
        memory = memory.updated(
            labels.to(torch.uint8)[:, None, None, None], labels, per_class, generator
        )

    seen = torch.bincount(
        torch.tensor([c for batch in batches for c in batch], dtype=torch.int64), minlength=3
    )
    assert torch.equal(memory.seen, seen)
    assert torch.equal(memory.counts(), seen.clamp(max=per_class))
    assert torch.equal(memory.images.flatten().long(), memory.labels)
    if per_class:
        total = torch.zeros(3, dtype=torch.float64).index_add(0, memory.labels, memory.weights())
        torch.testing.assert_close(total, seen.double())


def test_a_smaller_memory_keeps_a_part_of_the_larger():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(8, dtype=torch.int64)
    large = ReplayMemory.empty((1, 1, 1), 1).updated(numbered(0, 8), labels, 8, generator)

    small = large.updated(numbered(0, 0), labels[:0], 3, generator, num_classes=2)

    assert len(small) == 3
    assert small.seen.tolist() == [8, 0]


@settings(max_examples=60, deadline=None)
@given(
    num_new=st.integers(1, 90),
    num_remembered=st.integers(0, 40),
    share=st.floats(0, 0.9),
    batch_size=st.integers(1, 33),
)
def test_an_epoch_shows_all_new_and_enough_of_the_old(num_new, num_remembered, share, batch_size):
    plan = mix_batches(num_new, num_remembered, share, batch_size)

    batches = plan(torch.Generator().manual_seed(0))

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
    assert len(plan(torch.Generator().manual_seed(1))) == len(batches)


def test_replay_without_place_for_new_examples_is_refused():
    with pytest.raises(LearningError, match="below 1"):
        mix_batches(3, 3, 1.0, 4)
