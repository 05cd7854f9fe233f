from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F

from lifelong_ray.config import TrainerConfig
from lifelong_ray.learning import (
    Classifier,
    ExampleTerm,
    WeightTerm,
    build_model,
    train,
)
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.rates import rate_and_momentum
from lifelong_ray.types import LearningError
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
SHIFTING = CONFIG.model_copy(update={"max_shift_px": 2})
FRESH = build_model(MODEL, 4, seed=0)
IMAGES, LABELS = make_images([0, 1, 2, 3] * 5 + [1, 2], seed=0)


def trained(config: TrainerConfig = CONFIG, **kwargs) -> Classifier:
    model = FRESH.copy()
    train(model, IMAGES, LABELS, config=config, seed=7, clock=TickingClock(), **kwargs)
    return model


def pull(weight: float) -> WeightTerm:
    def add_gradient(weights: dict[str, torch.nn.Parameter], scale: float) -> None:
        weights["head.weight"].grad.add_(weights["head.weight"].detach(), alpha=2 * scale)

    return WeightTerm("pull", weight, lambda now: now["head.weight"].square().sum(), add_gradient)


def flatten(weight: float) -> ExampleTerm:
    return ExampleTerm("flatten", weight, lambda logits_BC, _: logits_BC.square().sum(1))


def test_without_terms_training_is_plain_fine_tuning_to_the_bit():
    plain = FRESH.copy().train().to(memory_format=torch.channels_last)
    images = IMAGES.float().contiguous(memory_format=torch.channels_last) / 255
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=9)
    for epoch in range(3):
        order = torch.randperm(22, generator=generator_for(7, "batches", epoch))
        for batch in order.split(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images[batch]), LABELS[batch], reduction="sum")
            (loss / len(batch)).backward()
            optimizer.step()
            schedule.step()

    assert_same_weights(trained(), plain)


def test_terms_of_weight_zero_change_nothing_to_the_bit():
    assert_same_weights(trained(terms=(pull(0.0), flatten(0.0))), trained())


def test_terms_compose():
    def head_size(*terms) -> float:
        return float(trained(terms=terms).head.weight.detach().norm())

    neither, one, other = head_size(), head_size(pull(0.1)), head_size(flatten(0.1))
    both = head_size(pull(0.1), flatten(0.1))

    assert both < min(one, other) < max(one, other) < neither


def test_the_schedule_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=23)

    for step in range(23):
        group = optimizer.param_groups[0]
        assert rate_and_momentum("one_cycle", step, 23, 1e-2) == (group["lr"], group["betas"][0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_schedule_of_very_few_steps_is_usable(num_steps):
    rates = [rate_and_momentum("one_cycle", step, num_steps, 0.1)[0] for step in range(num_steps)]

    assert all(0 < rate <= 0.1 for rate in rates)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_number_of_workers_does_not_change_the_result(num_workers):
    config = SHIFTING.model_copy(update={"num_shards": 4})
    terms = (pull(0.01), flatten(0.01))

    workers = on_workers(num_workers, lambda group: trained(config, terms=terms, collective=group))

    alone = trained(config, terms=terms)
    for worker in workers:
        assert_same_weights(worker, alone, tolerance=2e-4)
        assert_same_weights(worker, workers[0])


def test_workers_without_a_shard_are_warned_of_and_do_no_harm(caplog):
    with caplog.at_level(logging.WARNING):
        workers = on_workers(3, lambda group: trained(collective=group))

    assert "3 workers share 2 shards" in caplog.text
    assert_same_weights(workers[2], trained(), tolerance=2e-4)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_training_resumes_to_the_same_bits(epoch):
    terms = (pull(0.01), flatten(0.01))
    interrupt = InterruptAfter(epoch)
    with pytest.raises(WorkerLostError):
        trained(SHIFTING, terms=terms, on_epoch=interrupt)

    resumed = trained(SHIFTING, terms=terms, resume=interrupt.checkpoint)

    assert_same_weights(resumed, trained(SHIFTING, terms=terms))


def test_a_resumed_training_reports_as_if_it_had_not_been_interrupted():
    interrupt = InterruptAfter(2)
    with pytest.raises(WorkerLostError):
        trained(on_epoch=interrupt)
    model = FRESH.copy()

    report = train(
        model,
        IMAGES,
        LABELS,
        config=CONFIG,
        seed=7,
        clock=TickingClock(),
        resume=interrupt.checkpoint,
    )

    assert [e.epoch for e in report.epochs] == [1, 2, 3]
    assert [e.samples_seen for e in report.epochs] == [22, 44, 66]
    assert [e.seconds for e in report.epochs] == [1, 2, 3]
    assert report.samples_seen == 66


def test_a_checkpoint_of_another_training_is_refused():
    interrupt = InterruptAfter(1)
    with pytest.raises(WorkerLostError):
        trained(on_epoch=interrupt)

    with pytest.raises(LearningError, match="max_shift_px is 0 there and 2 here"):
        trained(SHIFTING, resume=interrupt.checkpoint)
    with pytest.raises(LearningError, match="damaged"):
        trained(resume=interrupt.checkpoint[:-100])
    with pytest.raises(LearningError, match="damaged"):
        trained(resume=b"")


def test_on_epoch_stops_the_training():
    model = FRESH.copy()

    report = train(
        model,
        IMAGES,
        LABELS,
        config=CONFIG,
        seed=7,
        clock=TickingClock(),
        on_epoch=lambda report, _: report.epoch == 2,
    )

    assert report.stopped_early
    assert len(report.epochs) == 2


def test_one_worker_that_stops_stops_all():
    def work(group):
        model = FRESH.copy()
        return train(
            model,
            IMAGES,
            LABELS,
            config=CONFIG,
            seed=7,
            clock=TickingClock(),
            collective=group,
            on_epoch=lambda report, _: group.rank == 1 and report.epoch == 1,
        )

    assert [len(report.epochs) for report in on_workers(2, work)] == [1, 1]


def test_a_loss_that_is_not_finite_stops_with_its_name_and_step():
    broken = ExampleTerm("broken", 1.0, lambda logits_BC, _: logits_BC.sum(1) * float("inf"))

    with pytest.raises(LearningError, match=r"the broken loss is (nan|-?inf) at step 0"):
        trained(terms=(broken,))


def test_training_in_bfloat16_stays_close():
    model = trained(CONFIG.model_copy(update={"precision": "bf16"}))

    assert model.head.weight.dtype == torch.float32
    assert_same_weights(model, trained(), tolerance=0.2)


def test_activations_cannot_be_shifted():
    model = FRESH.copy()
    with torch.no_grad():
        inputs = model.activations(IMAGES, stop=1)

    with pytest.raises(ValueError, match="cannot be moved"):
        train(model, inputs, LABELS, config=SHIFTING, seed=0, clock=TickingClock(), start=1)
