from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lifelong_ray.config import ModelConfig, TrainerConfig
from lifelong_ray.learning import (
    Alone,
    Classifier,
    ExampleTerm,
    Fit,
    Run,
    TrainReport,
    WeightTerm,
    build_model,
    fit_base,
    fit_fast,
    fit_slow,
    train,
)
from lifelong_ray.learning.trainer import Rivals
from lifelong_ray.types import LearningError
from tests.unit.learning import own_backbone
from tests.unit.learning.world import CONFIG as LEARNING
from tests.unit.learning.world import (
    MODEL,
    InterruptAfter,
    TickingClock,
    WorkerLostError,
    assert_same_weights,
    make_images,
    on_workers,
)

CONFIG = TrainerConfig(epochs=3, batch_size=8, learning_rate=1e-2, max_shift_px=0)
BATCH_NORM = MODEL.model_copy(update={"norm": "batch"})
IMAGES, LABELS = make_images([0, 1, 2, 3] * 5 + [1, 2], seed=0)
NAMES = tuple("abcd")


def own(function: str) -> ModelConfig:
    return ModelConfig(name=f"{own_backbone.__name__}:{function}", image_size=8)


def with_settings(**kwargs: Any) -> TrainerConfig:
    return CONFIG.model_copy(update=kwargs)


def trained(
    config: TrainerConfig = CONFIG, model_config: ModelConfig = MODEL, **kwargs: Any
) -> tuple[Classifier, TrainReport]:
    model = fresh(model_config)
    report = train(model, IMAGES, LABELS, config=config, seed=7, clock=TickingClock(), **kwargs)
    return model, report


# Built once, so that workers that are threads share no global random state.
BUILT = {config: build_model(config, 4, seed=0) for config in (MODEL, BATCH_NORM)}


def fresh(model_config: ModelConfig) -> Classifier:
    built = BUILT.get(model_config)
    return build_model(model_config, 4, seed=0) if built is None else built.copy()


@pytest.fixture
def narrow() -> Iterator[type[own_backbone.Narrow]]:
    """A backbone stage in which little fits, put back afterwards."""
    own_backbone.Narrow.met.clear()
    yield own_backbone.Narrow
    own_backbone.Narrow.most = 10**9


@pytest.fixture
def overflowing() -> Iterator[type[own_backbone.Overflowing]]:
    """A backbone stage that can be made to overflow, put back afterwards."""
    yield own_backbone.Overflowing
    own_backbone.Overflowing.gives = None


# ---------------------------------------------------------------- rates and optimisers


def test_a_learning_rate_of_0_finds_one_and_reports_it():
    model, report = trained(with_settings(learning_rate=0))

    found = report.learning_rate
    assert 1e-5 < found < 0.2
    assert_same_weights(model, trained(with_settings(learning_rate=found))[0])


def test_a_resumed_training_finds_the_same_rate_and_the_same_bits():
    config = with_settings(learning_rate=0)
    interrupt = InterruptAfter(2)
    with pytest.raises(WorkerLostError):
        trained(config, on_epoch=interrupt)

    resumed, report = trained(config, resume=interrupt.checkpoint)

    whole, expected = trained(config)
    assert report.learning_rate == expected.learning_rate
    assert_same_weights(resumed, whole)


def test_workers_find_the_same_rate():
    config = with_settings(learning_rate=0)

    workers = on_workers(2, lambda group: trained(config, collective=group))

    assert workers[0][1].learning_rate == workers[1][1].learning_rate
    assert_same_weights(workers[0][0], workers[1][0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "constant"])
def test_every_optimiser_learns_on_every_schedule(optimizer, schedule):
    config = with_settings(optimizer=optimizer, schedule=schedule, learning_rate=2e-2)

    _, report = trained(config)

    assert report.epochs[-1].losses["labels"] < 0.8 * report.epochs[0].losses["labels"]


def test_sgd_at_a_constant_rate_is_that_of_torch():
    config = with_settings(
        optimizer="sgd", schedule="constant", learning_rate=0.05, epochs=1, batch_size=22
    )
    plain = build_model(MODEL, 4, seed=0).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    torch.nn.functional.cross_entropy(plain(IMAGES), LABELS).backward()
    optimizer.step()

    model, _ = trained(config)

    assert_same_weights(model, plain, tolerance=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_optimiser_resumes_to_the_same_bits(optimizer):
    config = with_settings(optimizer=optimizer, schedule="constant")
    interrupt = InterruptAfter(1)
    with pytest.raises(WorkerLostError):
        trained(config, on_epoch=interrupt)

    resumed, _ = trained(config, resume=interrupt.checkpoint)

    assert_same_weights(resumed, trained(config)[0])


@pytest.mark.parametrize(("iterations", "num_epochs"), [(2, 1), (3, 1), (7, 3)])
def test_iterations_count_steps_in_place_of_epochs(iterations, num_epochs):
    _, report = trained(with_settings(iterations=iterations))

    sizes = [8, 8, 6] * 3
    assert report.samples_seen == sum(sizes[:iterations])
    assert len(report.epochs) == num_epochs


def test_iterations_resume_to_the_same_bits():
    config = with_settings(iterations=7)
    interrupt = InterruptAfter(2)
    with pytest.raises(WorkerLostError):
        trained(config, on_epoch=interrupt)

    resumed, report = trained(config, resume=interrupt.checkpoint)

    whole, expected = trained(config)
    assert_same_weights(resumed, whole)
    assert report.samples_seen == expected.samples_seen


# ---------------------------------------------------------------- what an example is shown as


def test_mirrored_training_sees_images_from_both_sides():
    # Bars left of the middle and right of it: mirrored ones cannot be told apart.
    images, labels = make_images([5] * 8 + [6] * 8, seed=4)
    losses = {}
    for mirror in (False, True):
        model = build_model(MODEL, 2, seed=0)
        report = train(
            model,
            images,
            labels - 5,
            config=with_settings(mirror=mirror, epochs=10),
            seed=7,
            clock=TickingClock(),
        )
        losses[mirror] = report.epochs[-1].losses["labels"]

    assert losses[False] < 0.1
    assert losses[True] > 0.4


def test_mirroring_resumes_and_is_shared_out_to_the_same_result():
    config = with_settings(mirror=True)
    interrupt = InterruptAfter(1)
    with pytest.raises(WorkerLostError):
        trained(config, on_epoch=interrupt)

    resumed, _ = trained(config, resume=interrupt.checkpoint)
    workers = on_workers(2, lambda group: trained(config, collective=group)[0])

    whole, _ = trained(config)
    assert_same_weights(resumed, whole)
    assert_same_weights(workers[0], whole, tolerance=2e-4)


def test_activations_cannot_be_mirrored():
    model = build_model(MODEL, 4, seed=0)
    with torch.no_grad():
        inputs = model.activations(IMAGES, stop=1)

    with pytest.raises(ValueError, match="set max_shift_px to 0 and mirror to false"):
        train(
            model,
            inputs,
            LABELS,
            config=with_settings(mirror=True),
            seed=0,
            clock=TickingClock(),
            start=1,
        )


def test_rows_of_classes_that_do_not_compete_only_decay():
    rivals = Rivals(
        torch.zeros(22, dtype=torch.int64), torch.tensor([[True, True, True, True, False]])
    )
    model = build_model(MODEL, 5, seed=0)
    before = model.head.weight[4].detach().clone()

    train(
        model,
        IMAGES,
        LABELS,
        config=with_settings(weight_decay=0),
        seed=7,
        clock=TickingClock(),
        rivals=rivals,
    )

    assert torch.equal(model.head.weight[4], before)
    assert not torch.equal(model.head.weight[:4], build_model(MODEL, 5, seed=0).head.weight[:4])


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_smaller_pieces_give_the_same_weights_up_to_rounding(at_once):
    model, _ = trained(with_settings(max_examples_at_once=at_once))

    assert_same_weights(model, trained()[0], tolerance=2e-4)


def test_pieces_are_never_larger_than_asked_for(narrow):
    trained(with_settings(max_examples_at_once=3), own("that_needs_memory"))

    assert max(narrow.met) == 3
    assert sum(narrow.met) == 3 * 22


def test_running_out_of_memory_halves_the_pieces_and_gives_the_same_result(narrow, caplog):
    expected, _ = trained(model_config=own("that_needs_memory"))
    narrow.most = 3

    with caplog.at_level(logging.WARNING):
        model, _ = trained(model_config=own("that_needs_memory"))

    assert "out of memory with 8 examples at once; going on with 4" in caplog.text
    assert "out of memory with 4 examples at once; going on with 2" in caplog.text
    assert_same_weights(model, expected, tolerance=1e-5)


def test_a_base_training_that_runs_out_of_memory_goes_on_in_smaller_pieces(narrow, caplog):
    narrow.most = 3

    with caplog.at_level(logging.WARNING):
        fit_base(
            make_images([0, 1, 2, 3] * 6, seed=1),
            "abcd",
            own("that_needs_memory"),
            LEARNING,
            Run(TickingClock()),
        )

    assert "going on with 2, to the same result" in caplog.text


def test_smaller_pieces_are_kept_for_the_steps_to_come(narrow, caplog):
    narrow.most = 4

    with caplog.at_level(logging.WARNING):
        trained(model_config=own("that_needs_memory"))

    assert caplog.text.count("out of memory") == 1


def test_running_out_of_memory_with_terms_gives_the_same_result(narrow):
    def run() -> Classifier:
        flat = ExampleTerm("flat", 0.1, lambda logits_BC, _: logits_BC.square().sum(1))
        return trained(model_config=own("that_needs_memory"), terms=(flat,))[0]

    expected = run()
    narrow.most = 2

    assert_same_weights(run(), expected, tolerance=1e-5)


def test_where_not_one_example_fits_the_error_says_so(narrow):
    narrow.most = 0

    with pytest.raises(LearningError, match=r"not enough memory for a batch of 8.*smaller batch"):
        trained(model_config=own("that_needs_memory"))


def test_a_limit_that_batch_normalisation_does_not_keep_is_warned_of(caplog):
    model = build_model(BATCH_NORM, 4, seed=0)
    model.learns_statistics = True

    with caplog.at_level(logging.WARNING):
        train(
            model,
            IMAGES,
            LABELS,
            config=with_settings(max_examples_at_once=2),
            seed=0,
            clock=TickingClock(),
        )

    assert "max_examples_at_once is 2" in caplog.text
    assert "raise num_shards" in caplog.text


def test_an_error_that_is_not_about_memory_is_not_swallowed():
    def broken(logits_BC: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("quite another trouble")

    with pytest.raises(RuntimeError, match="quite another trouble"):
        trained(terms=(ExampleTerm("broken", 1.0, broken),))


# ---------------------------------------------------------------- terms


def test_a_weight_term_that_is_infinite_is_named():
    endless = WeightTerm(
        "ewc", 1.0, lambda now: now["head.weight"].sum() * math.inf, lambda now, scale: None
    )

    with pytest.raises(LearningError, match=r"the ewc loss is -?(inf|nan) at step 0.*weights of"):
        trained(terms=(endless,))


def test_an_ewc_so_heavy_that_training_diverges_is_named(base, new_examples):
    ewc = LEARNING.update.ewc.model_copy(update={"lambda_ewc": 1e4})
    trainer = LEARNING.update.trainer.model_copy(
        update={"optimizer": "sgd", "schedule": "constant", "epochs": 40, "learning_rate": 0.1}
    )
    update = LEARNING.update.model_copy(update={"ewc": ewc, "trainer": trainer})
    config = LEARNING.model_copy(update={"update": update})

    with pytest.raises(LearningError, match=r"is (inf|nan) at step .*weights of the terms"):
        fit_slow(base.learner, new_examples, "abcdef", config, Run(TickingClock()))


def test_an_ewc_that_only_makes_adams_steps_vanish_is_named_too(base, new_examples):
    ewc = LEARNING.update.ewc.model_copy(update={"lambda_ewc": 1e28})
    config = LEARNING.model_copy(update={"update": LEARNING.update.model_copy(update={"ewc": ewc})})

    with pytest.raises(LearningError, match=r"(gradient|ewc loss) is inf at step .*ewc 1e\+28"):
        fit_slow(base.learner, new_examples, "abcdef", config, Run(TickingClock()))


def test_lambdas_of_0_change_nothing_to_the_bit():
    def pull(now: Any) -> torch.Tensor:
        raise AssertionError("a term of weight 0 is computed")

    model, report = trained(
        terms=(WeightTerm("ewc", 0.0, pull, pull), ExampleTerm("distillation", 0.0, pull))
    )

    assert_same_weights(model, trained()[0])
    assert report.epochs[0].losses.keys() == {"labels"}


# ---------------------------------------------------------------- batch normalisation


def test_batch_normalisation_learns_the_same_on_any_number_of_workers():
    def work(group: Any) -> Classifier:
        model = fresh(BATCH_NORM)
        model.learns_statistics = True
        train(
            model,
            IMAGES,
            LABELS,
            config=with_settings(num_shards=2),
            seed=7,
            clock=TickingClock(),
            collective=group,
        )
        return model

    workers = on_workers(2, work)

    alone = dict(work(Alone()).state_dict())
    for name, value in workers[0].state_dict().items():
        assert torch.equal(value, workers[1].state_dict()[name]), name
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, alone[name], rtol=2e-3, atol=2e-3)


def test_the_number_of_shards_does_matter_to_batch_normalisation():
    def first_weight(num_shards: int) -> torch.Tensor:
        model = fresh(BATCH_NORM)
        model.learns_statistics = True
        train(
            model,
            IMAGES,
            LABELS,
            config=with_settings(num_shards=num_shards),
            seed=7,
            clock=TickingClock(),
        )
        return model.get_parameter("stages.0.0.weight").detach()

    assert (first_weight(1) - first_weight(4)).abs().max() > 1e-3


def test_a_batch_normalised_base_training_learns_and_resumes_to_the_same_bytes():
    examples = make_images([0, 1, 2, 3] * 12, seed=1)

    def fit(**how: Any) -> Fit:
        return fit_base(examples, NAMES, BATCH_NORM, LEARNING, Run(TickingClock(), **how))

    interrupt = InterruptAfter(2)
    with pytest.raises(WorkerLostError):
        fit(on_epoch=interrupt)

    resumed = fit(resume=interrupt.checkpoint).learner

    held_out = make_images([0, 1, 2, 3] * 10, seed=11)
    whole = fit(on_epoch=lambda report, checkpoint: False).learner
    assert resumed.to_files() == whole.to_files()
    assert float((resumed.logits(held_out[0]).argmax(1) == held_out[1]).float().mean()) >= 0.9


def test_statistics_of_batch_normalisation_are_frozen_in_updates(new_examples):
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, NAMES, BATCH_NORM, LEARNING, Run(TickingClock())).learner

    learner = fit_slow(parent, new_examples, "abcdef", LEARNING, Run(TickingClock())).learner

    before, after = dict(parent.model.named_buffers()), dict(learner.model.named_buffers())
    statistics = [name for name in before if "running" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(learner.anchor["stages.1.0.weight"], parent.anchor["stages.1.0.weight"])


# ---------------------------------------------------------------- the user's own backbone


def test_dropout_of_a_users_own_trains_reproducibly():
    torch.manual_seed(1)
    one, _ = trained(model_config=own("with_dropout"))
    torch.manual_seed(2)
    other, _ = trained(model_config=own("with_dropout"))

    assert_same_weights(one, other)


def test_dropout_of_a_users_own_does_drop(monkeypatch):
    dropping, _ = trained(model_config=own("with_dropout"))

    monkeypatch.setattr(own_backbone.UserDropout, "forward", lambda self, h: h)
    keeping, _ = trained(model_config=own("with_dropout"))

    assert not torch.equal(dropping.head.weight, keeping.head.weight)


def test_dropout_of_a_users_own_resumes_to_the_same_bytes():
    examples = make_images([0, 1, 2, 3] * 12, seed=1)

    def fit(**how: Any) -> Fit:
        return fit_base(examples, NAMES, own("with_dropout"), LEARNING, Run(TickingClock(), **how))

    interrupt = InterruptAfter(2)
    with pytest.raises(WorkerLostError):
        fit(on_epoch=interrupt)
    torch.manual_seed(99)

    resumed = fit(resume=interrupt.checkpoint)

    assert resumed.learner.to_files() == fit().learner.to_files()


@pytest.mark.parametrize("gives", [math.nan, math.inf])
def test_a_users_backbone_that_overflows_in_training_is_named(overflowing, gives):
    model = build_model(own("that_overflows"), 4, seed=0)
    overflowing.gives = gives

    with pytest.raises(LearningError, match=r"the labels loss is nan at step 0"):
        train(model, IMAGES, LABELS, config=CONFIG, seed=7, clock=TickingClock())


@pytest.mark.parametrize("gives", [math.nan, math.inf])
def test_a_users_backbone_that_overflows_after_training_is_named(overflowing, new_examples, gives):
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    run = Run(TickingClock())
    parent = fit_base(examples, NAMES, own("that_overflows"), LEARNING, run).learner
    overflowing.gives = gives

    with pytest.raises(LearningError, match="not finite") as caught:
        fit_fast(parent, new_examples, "abcdef", LEARNING, run)

    assert re.search("backbone|activations|inputs|features", str(caught.value))
