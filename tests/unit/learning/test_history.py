from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.learning.history import History

ROWS = [
    [0.9, 0.2, 0.1],
    [0.7, 0.8, 0.3],
    [0.6, 0.5, 0.7],
]
SIZES = [100, 200, 700]
APPROX = pytest.approx


def hand_made(**more) -> History:
    return History.of(ROWS, num_examples=SIZES, **more)


def test_final_accuracy_counts_every_test_example_alike():
    assert hand_made().final_accuracy == APPROX((60 + 100 + 490) / 1000)
    assert hand_made().final_mean_accuracy == APPROX((0.6 + 0.5 + 0.7) / 3)


def test_average_incremental_accuracy_is_over_what_was_known_at_each_update():
    expected = (0.9 + (0.7 + 0.8) / 2 + (0.6 + 0.5 + 0.7) / 3) / 3

    assert hand_made().average_incremental_accuracy == APPROX(expected)


def test_forgetting_is_the_best_of_earlier_less_the_last():
    history = hand_made()

    assert history.forgetting_by_experience == APPROX((0.9 - 0.6, 0.8 - 0.5))
    assert history.forgetting == APPROX(0.3)


def test_forgetting_looks_for_the_best_at_any_earlier_time_but_the_last():
    history = History.of([[0.5], [0.8, 0.5], [0.9, 0.5, 0.5]])

    assert history.forgetting_by_experience[0] == APPROX(0.8 - 0.9)


def test_backward_transfer_compares_the_end_with_the_time_of_learning():
    assert hand_made().backward_transfer == APPROX(((0.6 - 0.9) + (0.5 - 0.8)) / 2)


def test_forward_transfer_compares_the_time_before_learning_with_no_training():
    history = hand_made(untrained=[0.1, 0.05, 0.1])

    assert history.forward_transfer == APPROX(((0.2 - 0.05) + (0.3 - 0.1)) / 2)


def test_plasticity_and_intransigence_look_at_the_time_of_learning():
    history = hand_made(joint=[0.9, 0.9, 0.95])

    assert history.plasticity == APPROX((0.9 + 0.8 + 0.7) / 3)
    assert history.intransigence == APPROX((0.0 + 0.1 + 0.25) / 3)


def test_retention_is_accuracy_on_known_classes_after_an_update_over_that_before():
    history = hand_made()
    second = (60 + 100) / (70 + 160)

    assert history.retention_by_update == APPROX((70 / 90, second))
    assert history.retention == APPROX((70 / 90 + second) / 2)


def test_final_retention_is_over_what_each_experience_was_learned_to():
    assert hand_made().final_retention == APPROX((60 + 100) / (90 + 160))


def test_retention_within_old_lets_only_known_classes_compete_after_the_update():
    history = hand_made(within_rows=[[], [0.88], [0.8, 0.7]])

    assert history.retention_within_old_by_update == APPROX((88 / 90, (80 + 140) / (70 + 160)))
    assert history.retention_within_old == APPROX((88 / 90 + 220 / 230) / 2)


def test_a_history_grows_update_by_update():
    history = History(num_examples=tuple(SIZES))
    for t, row in enumerate(ROWS):
        history = history.after_update(row, [[], [0.88], [0.8, 0.7]][t] or None)

    assert history.rows == tuple(map(tuple, ROWS))
    assert history.summary() == hand_made(within_rows=[[], [0.88], [0.8, 0.7]]).summary()


def test_an_update_without_accuracies_within_old_leaves_a_gap():
    history = History(num_examples=(1, 1, 1)).after_update([0.9]).after_update([0.7, 0.8], [0.8])
    history = history.after_update([0.6, 0.7, 0.7])

    assert history.retention_within_old_by_update == (APPROX(8 / 9), None)
    assert history.retention_within_old is None


def test_nothing_is_said_before_the_first_update():
    assert set(History(num_examples=(5,)).summary().values()) == {None}


def test_after_a_single_update_nothing_can_be_forgotten():
    history = History.of([[0.9]], untrained=[0.1], joint=[0.95])

    known = {name for name, value in history.summary().items() if value is not None}
    assert known == {
        "final_accuracy",
        "final_mean_accuracy",
        "average_incremental_accuracy",
        "plasticity",
        "intransigence",
    }


@pytest.mark.parametrize(
    ("update", "experience", "unknown"),
    [
        (2, 0, {"final_accuracy", "forgetting", "backward_transfer", "retention"}),
        (1, 1, {"plasticity", "forgetting", "backward_transfer", "final_retention"}),
        (0, 1, {"forward_transfer"}),
    ],
)
def test_a_figure_that_needs_what_was_not_measured_is_none(update, experience, unknown):
    rows = [list(row) for row in ROWS]
    rows[update][experience] = None

    figures = History.of(rows, untrained=[0.1] * 3).summary()

    assert {name for name in unknown if figures[name] is None} == unknown


def test_other_figures_are_not_touched_by_what_was_not_measured():
    history = History.of([[0.9], [0.7, 0.8], [0.6, 0.5, 0.7]], num_examples=SIZES)

    assert history.summary() == hand_made().summary()


def test_retention_of_what_was_never_right_is_none():
    assert History.of([[0.0], [0.5, 0.5]]).retention is None


shares = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 5).flatmap(
        lambda t: st.lists(st.lists(shares, min_size=t, max_size=t), min_size=t, max_size=t)
    )
)
def test_forgetting_is_at_least_the_loss_since_learning(size):
    history = History.of(size)

    assert history.forgetting >= -history.backward_transfer - 1e-9
    assert history.final_mean_accuracy == APPROX(history.final_accuracy, abs=1e-9)
    # Learned, then transferred: what is left at the end.
    num = len(size)
    left = history.plasticity + history.backward_transfer * (num - 1) / num
    assert left == APPROX(history.final_mean_accuracy, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[0.5, 0.5, 0.5]], "num_examples": [1, 1]}, "3 accuracies for 2 experiences"),
        ({"rows": [[0.5], [0.5]], "num_examples": [1]}, "2 updates but 1 experiences"),
        ({"rows": [[1.5]]}, "row 0 has accuracy 1.5"),
        ({"rows": [[float("nan")]]}, "row 0 has accuracy nan"),
        ({"rows": [[0.5]], "num_examples": [0]}, "at least one example"),
        ({"rows": [[0.5], [0.5, 0.5]], "within_rows": [[0.5]]}, "1 rows within old classes"),
        ({"rows": [[0.5]], "joint": [0.5, 0.5]}, "joint has 2 accuracies"),
    ],
)
def test_a_matrix_that_cannot_be_one_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        History.of(**arguments)
