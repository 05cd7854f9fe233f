"""What cannot be learned from or judged is refused by name, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_ray.config import DistillationConfig, LearningConfig, ReplayConfig
from lifelong_ray.learning import (
    AnalyticSums,
    Classifier,
    Fit,
    Labelled,
    Learner,
    Predictor,
    ReplayMemory,
    Run,
    accuracy,
    allowed_classes,
    build_model,
    distillation_loss,
    endless_batches,
    estimate_fisher,
    evaluate,
    ewc_penalty,
    fit_base,
    fit_fast,
    fit_slow,
    fit_temperature,
    fit_update,
    forget,
    mix_batches,
    train,
)
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

NAMES = ("a", "b", "c", "d", "e", "f")
IMAGES, LABELS = make_images([0, 1, 2, 3] * 4, seed=1)
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
NAN, INF = float("nan"), float("inf")


def with_nan(images: Tensor) -> Tensor:
    odd = images.float()
    odd[0, 0, 0, 0] = NAN
    return odd


def with_entry(logits: Tensor, value: float) -> Tensor:
    odd = logits.clone()
    odd[1, 0] = value
    return odd


# ---------------------------------------------------------------- labels

ODD_LABELS = {
    "negative": (LABELS - 1, "label is -1, outside the 4 classes, which count from 0; leave"),
    "too large": (LABELS + 1, "label is 4, outside the 4 classes, which count from 0; leave"),
    "scores": (LABELS.float(), r"labels are torch.float32 .* convert them with .long\(\)"),
    "narrow": (LABELS.int(), r"labels are torch.int32 .* convert them with .long\(\)"),
    "columns": (LABELS[:, None], r"labels are torch.int64 of shape \(16, 1\).*\.reshape\(-1\)"),
    "too few": (LABELS[:3], "16 examples but 3 .*label"),
}


@pytest.mark.parametrize(("labels", "message"), ODD_LABELS.values(), ids=ODD_LABELS.keys())
def test_training_refuses_labels_that_are_no_classes(labels: Tensor, message: str) -> None:
    model = build_model(MODEL, 4, seed=0)

    with pytest.raises(LearningError, match=message):
        train(model, IMAGES, labels, config=CONFIG.base, seed=0, clock=TickingClock())


@pytest.mark.parametrize(("labels", "message"), ODD_LABELS.values(), ids=ODD_LABELS.keys())
def test_the_empirical_fisher_refuses_labels_that_are_no_classes(
    labels: Tensor, message: str
) -> None:
    model = build_model(MODEL, 4, seed=0)

    with pytest.raises(LearningError, match=message):
        estimate_fisher(model, IMAGES, labels, estimator="empirical", generator=torch.Generator())


@pytest.mark.parametrize("judge", [evaluate, fit_temperature], ids=["evaluate", "temperature"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, -1]), "a label is -1, outside the 2 classes"),
        (torch.tensor([0, 1, 2]), r"a label is 2, outside the 2 classes.*judge a model that"),
        (torch.tensor([0.0, 1, 0]), r"labels are torch.float32"),
        (torch.tensor([[0], [1], [0]]), r"of shape \(3, 1\)"),
        (torch.tensor([0, 1]), "logits of 3 examples but 2 labels"),
        (torch.zeros(0, dtype=torch.int64), "no examples to judge a model on"),
    ],
)
def test_nothing_is_judged_by_labels_that_are_no_classes(
    judge: Callable[..., Any], labels: Tensor, message: str
) -> None:
    with pytest.raises(LearningError, match=message):
        judge(LOGITS, labels)


def test_accuracy_refuses_labels_that_would_be_compared_with_every_row() -> None:
    with pytest.raises(LearningError, match=r"of shape \(3, 1\)"):
        accuracy(LOGITS, torch.tensor([[0], [1], [0]]))


@pytest.mark.parametrize("judge", [evaluate, fit_temperature, accuracy])
def test_logits_and_labels_are_tensors_with_rows(judge: Callable[..., Any]) -> None:
    labels = torch.tensor([0, 1, 0])

    with pytest.raises(LearningError, match="logits are of type ndarray; the engine takes torch"):
        judge(LOGITS.numpy(), labels)
    with pytest.raises(LearningError, match="labels are the single number 1"):
        judge(LOGITS, torch.tensor(1))
    with pytest.raises(LearningError, match=r"logits are torch.float32 of shape \(3, 0\)"):
        judge(LOGITS[:, :0], labels)


def test_tasks_are_whole_numbers() -> None:
    with pytest.raises(LearningError, match=r"tasks are torch.float32"):
        allowed_classes(torch.tensor([0.0, 1.0]), [[0], [1]], 2)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("judge", [evaluate, fit_temperature, accuracy])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_that_are_not_finite_are_not_judged(judge: Callable[..., Any], value: float) -> None:
    odd = with_entry(LOGITS, value)

    with pytest.raises(LearningError, match=r"1 of 6 numbers of the logits .*look at its weights"):
        judge(odd, torch.tensor([0, 1, 0]))


def test_logits_that_cancel_or_add_up_to_infinity_are_told_apart() -> None:
    labels = torch.tensor([0, 1, 0])
    cancelling = with_entry(with_entry(LOGITS, INF), INF)
    cancelling[0, 0] = -INF
    large = torch.full((3, 2), 3e38)

    with pytest.raises(LearningError, match="2 of 6 numbers"):
        accuracy(cancelling, labels)
    assert accuracy(large, labels) == pytest.approx(2 / 3)


def test_the_parents_logits_are_checked_too() -> None:
    labels = torch.tensor([0, 1, 0])

    with pytest.raises(LearningError, match="the parent's logits are not finite"):
        evaluate(LOGITS, labels, parent_logits=with_entry(LOGITS, NAN))
    with pytest.raises(LearningError, match="parent answers with 3 classes and the model with"):
        evaluate(LOGITS, labels, parent_logits=torch.zeros(3, 3))


def test_weights_of_a_temperature_fit_the_examples() -> None:
    labels = torch.tensor([0, 1, 0])

    with pytest.raises(LearningError, match=r"weights of shape \(2,\) for 3 examples"):
        fit_temperature(LOGITS, labels, torch.ones(2))
    with pytest.raises(LearningError, match="1 of 3 numbers of the examples' weights"):
        fit_temperature(LOGITS, labels, torch.tensor([1.0, NAN, 1.0]))
    for weights in ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(LearningError, match=r"weights run from .* and add up to"):
            fit_temperature(LOGITS, labels, torch.tensor(weights))


def test_scores_of_one_class_are_no_logits() -> None:
    with pytest.raises(LearningError, match=r"logits are torch.float32 of shape \(3,\)"):
        evaluate(torch.zeros(3), torch.tensor([0, 0, 0]))


# ---------------------------------------------------------------- images

Way = Callable[[Learner, Labelled], object]


def base_of(_: Learner, examples: Labelled) -> Fit:
    return fit_base(examples, "abcd", MODEL, CONFIG, Run(TickingClock()))


def updated_by(path: Callable[..., Any]) -> Way:
    return lambda parent, examples: path(parent, examples, "abcd", CONFIG, Run(TickingClock()))


def validated_by(path: Callable[..., Any]) -> Way:
    return lambda parent, examples: path(
        parent, (IMAGES, LABELS), "abcd", CONFIG, Run(TickingClock()), validation=examples
    )


WAYS: dict[str, Way] = {
    "base": base_of,
    "fast": updated_by(fit_fast),
    "slow": updated_by(fit_slow),
    "update": updated_by(fit_update),
    "fast validation": validated_by(fit_fast),
    "slow validation": validated_by(fit_slow),
    "forget": lambda learner, examples: forget(learner, examples, 0, CONFIG.analytic),
    "answer": lambda learner, examples: learner.logits(examples[0]),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_nan(IMAGES), r"torch.float32 .* NaN or infinity among them.*: repair these images"),
        (IMAGES.float() / 255, r"torch.float32 .* the model takes torch.uint8.*\.to\(torch.uint8"),
        (IMAGES.long(), r"torch.int64 .* the model takes torch.uint8"),
        (IMAGES[:, :, :6], r"of shape \(16, 1, 6, 8\); .* \(N, 1, 8, 8\): scale them to that size"),
        (IMAGES.expand(-1, 3, -1, -1), r"of shape \(16, 3, 8, 8\)"),
        (IMAGES[:, 0], r"of shape \(16, 8, 8\)"),
        (torch.tensor(3, dtype=torch.uint8), "are the single number 3; give one row for each"),
        (IMAGES.numpy(), "are of type ndarray; the engine takes torch tensors"),
    ],
    ids=["nan", "float", "int64", "not square", "colour", "no channel", "number", "numpy"],
)
def test_images_that_the_model_does_not_take_are_named_on_every_way(
    base: Fit, way: Way, images: Tensor, message: str
) -> None:
    with pytest.raises(LearningError, match=message):
        way(base.learner, (images, LABELS))


@pytest.mark.parametrize("value", [NAN, INF])
def test_pixels_that_are_not_finite_are_neither_trained_on_nor_measured(value: float) -> None:
    model = build_model(MODEL, 4, seed=0)
    images = with_nan(IMAGES).nan_to_num(value)

    with pytest.raises(LearningError, match=r"of the training inputs are not finite .* repair"):
        train(model, images, LABELS, config=CONFIG.base, seed=0, clock=TickingClock())
    with pytest.raises(LearningError, match=r"of the Fisher's inputs are not finite .* repair"):
        estimate_fisher(model, images, LABELS, generator=torch.Generator())


@pytest.mark.parametrize(
    ("images", "start", "message"),
    [
        (IMAGES[:, :, 1:], 0, r"of shape \(16, 1, 7, 8\); the model takes torch.uint8"),
        (IMAGES.long(), 0, r"torch.int64"),
        (torch.zeros(16, 1, 7, 8), 0, r"stage 0 .* floating-point activations of shape \(N, 1, 8"),
        (torch.zeros(16, 8, 4, 5), 1, r"stage 1 .* floating-point activations of shape \(N, 8, 4"),
        (IMAGES, 1, r"torch.uint8 .* stage 1 of this model takes floating-point activations"),
        (torch.zeros(16, 5), 2, r"stage 2 .* \(N, 16, 4, 4\): compute them with this model's"),
    ],
)
def test_inputs_that_cannot_enter_their_stage_are_named(
    images: Tensor, start: int, message: str
) -> None:
    model = build_model(MODEL, 4, seed=0)
    config = CONFIG.update.trainer

    with pytest.raises(LearningError, match=message):
        train(model, images, LABELS, config=config, seed=0, clock=TickingClock(), start=start)
    with pytest.raises(LearningError, match=message):
        estimate_fisher(model, images, LABELS, generator=torch.Generator(), start=start)


def test_a_stage_that_is_not_there_is_a_mistake() -> None:
    model = build_model(MODEL, 4, seed=0)

    with pytest.raises(ValueError, match="has 2 stages, so none enters 3"):
        estimate_fisher(model, IMAGES, LABELS, generator=torch.Generator(), start=3)


def test_asking_for_the_shape_of_a_stage_leaves_statistics_and_modes_alone() -> None:
    model = build_model(MODEL.model_copy(update={"norm": "batch"}), 4, seed=0)
    model.learns_statistics = True
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    assert model.entering_shape(1) == (8, 4, 4)

    assert all(module.training for module in model.stages.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- what a parent carries


def with_update(**settings: object) -> LearningConfig:
    return CONFIG.model_copy(update={"update": CONFIG.update.model_copy(update=settings)})


BOTH = pytest.mark.parametrize("path", [fit_fast, fit_slow], ids=["fast", "slow"])


def refusal(path: Callable[..., Any], parent: Learner, config: LearningConfig = CONFIG) -> str:
    examples = make_images([0, 1, 2, 3, 4, 5] * 3, seed=5)
    with pytest.raises(LearningError) as caught:
        path(parent, examples, NAMES, config, Run(TickingClock()))
    return str(caught.value)


def altered(values: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {**values, "head.weight": change(values["head.weight"].clone())}


@BOTH
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_fisher_that_is_not_finite_is_named(
    path: Callable[..., Any], base: Fit, value: float
) -> None:
    fisher = base.learner.fisher
    odd = replace(fisher, values=altered(fisher.values, lambda f: f.fill_(value)))

    refused = refusal(path, replace(base.learner, fisher=odd))

    assert "numbers of the parent's Fisher of head.weight are not finite" in refused
    assert "go on from a version" in refused


@BOTH
def test_an_anchor_that_is_not_finite_is_named(path: Callable[..., Any], base: Fit) -> None:
    anchor = altered(base.learner.anchor, lambda a: a.fill_(NAN))

    refused = refusal(path, replace(base.learner, anchor=anchor))

    assert "numbers of the parent's anchor of head.weight are not finite" in refused


@BOTH
def test_an_anchor_of_another_architecture_is_named(path: Callable[..., Any], base: Fit) -> None:
    anchor = altered(base.learner.anchor, lambda a: a[:, 1:])

    refused = refusal(path, replace(base.learner, anchor=anchor))

    assert "the anchor is of another architecture: head.weight" in refused


@BOTH
def test_weights_that_are_not_finite_are_named(path: Callable[..., Any], base: Fit) -> None:
    model = base.learner.model.copy()
    with torch.no_grad():
        model.head.weight[0, 0] = NAN

    refused = refusal(path, replace(base.learner, model=model))

    assert "1 of 256 numbers of the parent's weights of head.weight are not finite" in refused


@BOTH
def test_a_memory_of_another_image_size_is_named(path: Callable[..., Any], base: Fit) -> None:
    memory = base.learner.memory
    larger = replace(memory, inputs=torch.nn.functional.pad(memory.inputs, (2, 2, 2, 2)))

    refused = refusal(path, replace(base.learner, memory=larger))

    assert refused.startswith("a memory of another image size: it holds (1, 12, 12)")
    assert "(1, 8, 8)" in refused


@BOTH
def test_a_memory_of_features_of_another_size_is_named(
    path: Callable[..., Any], of_features: Learner
) -> None:
    memory = of_features.memory
    narrower = replace(memory, inputs=memory.inputs[:, :5])

    refused = refusal(path, replace(of_features, memory=narrower), FEATURES)

    assert refused.startswith("a memory of features of another size: it holds (5, 4, 4)")
    assert "1 stages of this model give (8, 4, 4)" in refused


@BOTH
def test_remembered_features_that_are_not_finite_are_named(
    path: Callable[..., Any], of_features: Learner
) -> None:
    memory = of_features.memory
    odd = replace(memory, inputs=torch.full_like(memory.inputs, NAN))

    assert "remembered features are not finite" in refusal(
        path, replace(of_features, memory=odd), FEATURES
    )


@BOTH
def test_a_memory_of_other_classes_is_named(path: Callable[..., Any], base: Fit) -> None:
    memory = base.learner.memory
    odd = replace(memory, labels=memory.labels + 1)

    assert "a remembered label is 4, outside the 4 classes" in refusal(
        path, replace(base.learner, memory=odd)
    )


@BOTH
def test_a_memory_whose_stage_is_not_what_it_holds_is_named(
    path: Callable[..., Any], of_features: Learner
) -> None:
    refused = refusal(path, replace(of_features, memory_stage=0), CONFIG)

    assert "the memory holds features that passed 0 stages" in refused


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": tuple("abcde")}, "class names are of 5 classes and its model of 4"),
        ({"sums": AnalyticSums.empty(64, 7)}, "analytic sums are of 7 classes and its model of 4"),
        ({"sums": AnalyticSums.empty(5, 4)}, "are over 5 random features and its model has 64"),
        ({"memory": ReplayMemory.empty((1, 8, 8), 9)}, "memory are of 9 classes"),
        ({"temperature": 0.0}, "temperature is 0.0; it divides logits"),
        ({"temperature": NAN}, "temperature is nan; it divides logits"),
    ],
)
def test_a_parent_whose_parts_are_not_of_one_model_is_named(
    path: Callable[..., Any], base: Fit, change: dict[str, Any], message: str
) -> None:
    assert message in refusal(path, replace(base.learner, **change))


FEATURES = with_update(replay=ReplayConfig(memory_per_class=6, content="features"))


@pytest.fixture(scope="module")
def of_features() -> Learner:
    examples = make_images([0, 1, 2, 3] * 6, seed=1)
    return fit_base(examples, "abcd", MODEL, FEATURES, Run(TickingClock())).learner


# ---------------------------------------------------------------- one class, no examples, no sense


def test_an_update_may_show_one_class_only_and_a_base_training_may_not(base: Fit) -> None:
    one = IMAGES, LABELS * 0

    for path in (fit_fast, fit_slow):
        learner = path(base.learner, one, "abcd", CONFIG, Run(TickingClock())).learner
        assert bool(learner.logits(IMAGES).isfinite().all())
    with pytest.raises(LearningError, match="no training example of class b; add some or leave"):
        base_of(base.learner, one)


def test_examples_that_were_never_learned_cannot_be_forgotten(base: Fit) -> None:
    strange = make_images([0, 1, 2, 3] * 12, seed=99)

    with pytest.raises(LearningError, match="not what update 0 brought; give the very images"):
        forget(base.learner, strange, 0, CONFIG.analytic)


def test_what_a_training_cannot_go_on_with_is_named() -> None:
    def trained(model: Classifier, **how: Any) -> None:
        train(model, IMAGES, LABELS, config=CONFIG.base, seed=0, clock=TickingClock(), **how)

    model = build_model(MODEL, 4, seed=0)
    with pytest.raises(ValueError, match=r"class offsets have shape \(3,\) for 4 classes"):
        trained(model, class_offsets=torch.zeros(3))
    with pytest.raises(ValueError, match="plan of batches has none"):
        trained(model, batches=lambda generator: [])
    with pytest.raises(ValueError, match="no weight of the model requires a gradient"):
        trained(model.requires_grad_(False))


def test_a_loss_that_is_infinite_names_every_weight_that_may_be_too_large(base: Fit) -> None:
    config = with_update(distillation=DistillationConfig(weight=1e38))
    examples = make_images([0, 1, 2, 3, 4, 5] * 3, seed=5)

    with pytest.raises(LearningError, match=r"diverged; lower .* \(among them distillation 1e\+38"):
        fit_slow(base.learner, examples, NAMES, config, Run(TickingClock()))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"estimator": "true"}, "estimator is 'true', not one of"),
        ({"allowed_C": torch.ones(4)}, r"allowed classes are torch.float32 of shape \(4,\)"),
        ({"allowed_C": torch.tensor([True])}, "each of the 4 classes whether it competes"),
        ({"allowed_C": torch.zeros(4, dtype=torch.bool)}, "no class is allowed to compete"),
    ],
)
def test_a_fisher_of_what_is_not_there_is_a_mistake(how: dict[str, Any], message: str) -> None:
    model = build_model(MODEL, 4, seed=0)

    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, IMAGES, LABELS, generator=torch.Generator(), **how)


@pytest.mark.parametrize("sizes", [(0, 1), (-1, 1), (2, -1)])
def test_a_model_needs_a_class(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="make no classifier; at least one class"):
        build_model(MODEL, sizes[0], seed=0, num_random_features=sizes[1])


@pytest.mark.parametrize(
    ("teacher", "temperature"),
    [(torch.zeros(2, 2), 1.0), (torch.zeros(3), 1.0), (torch.zeros(3, 2), 0.0)],
    ids=["rows", "dimensions", "temperature"],
)
def test_a_teacher_answers_to_the_same_examples(teacher: Tensor, temperature: float) -> None:
    with pytest.raises(ValueError, match="give both a row for each example"):
        distillation_loss(LOGITS, teacher, temperature)


def test_ewc_needs_the_fisher_of_what_it_holds() -> None:
    weights = {"head.weight": torch.ones(2, 3)}

    with pytest.raises(ValueError, match=r"anchor has head.weight, and the Fisher has not"):
        ewc_penalty(weights, weights, {})
    with pytest.raises(ValueError, match="the anchor names none"):
        ewc_penalty(weights, {}, {})


@pytest.mark.parametrize(
    "plan",
    [(0, 0, 0.5, 4), (0, 3, 0.5, 4), (3, -1, 0.5, 4), (3, 3, 0.5, 0)],
    ids=["nothing", "nothing new", "fewer than none", "no place"],
)
def test_batches_need_a_new_example_and_a_place(plan: tuple[int, int, float, int]) -> None:
    with pytest.raises(LearningError, match="train nothing; there must be a new example"):
        mix_batches(*plan)


@pytest.mark.parametrize("share", [-0.1, 1.0, NAN])
def test_a_share_of_replay_is_a_share(share: float) -> None:
    with pytest.raises(LearningError, match=r"set learning.update.replay.share to 0 or more"):
        mix_batches(3, 3, share, 2)


def test_endless_batches_have_no_numbers_below_0() -> None:
    for sizes in ((3, -1, 2, 1, 4), (3, 1, 2, -1, 4), (3, 1, 2, 1, -4)):
        with pytest.raises(LearningError, match="no number may be below 0"):
            endless_batches(*sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"modes_N": LABELS[:3]},
        {"modes_N": LABELS.float()},
        {"modes_N": LABELS[:, None]},
        {"features_NM": torch.zeros(16)},
        {"weights_N": torch.ones(3)},
    ],
    ids=["too few", "scores", "columns", "one feature", "weights"],
)
def test_sums_need_a_row_a_mode_and_a_weight_of_each_example(change: dict[str, Tensor]) -> None:
    features = torch.arange(48.0).reshape(16, 3)
    sums = AnalyticSums.of(features, LABELS, 4)
    given = {"features_NM": features, "modes_N": LABELS, "weights_N": torch.ones(16)} | change

    with pytest.raises(ValueError, match="do not fit together; give each example a row"):
        AnalyticSums.of(num_classes=4, **given)
    with pytest.raises(ValueError, match="do not fit together or sums over 3 features"):
        sums.left_out_scores(ridge=0.1, **given)


def test_a_memory_is_told_how_to_choose(base: Fit) -> None:
    memory = base.learner.memory

    def offered(**how: Any) -> None:
        settings = {"memory_per_class": 2, "generator": torch.Generator()} | how
        memory.updated(IMAGES, LABELS, **settings)

    with pytest.raises(ValueError, match="selection is 'best', not one of"):
        offered(selection="best")
    with pytest.raises(ValueError, match="-2 places"):
        offered(memory_per_class=-2)
    with pytest.raises(ValueError, match="share of nan"):
        offered(memory_share=NAN)
    with pytest.raises(ValueError, match=r"not \(\d+,\); pass both in this order, a row for each"):
        offered(selection="herding", features=torch.zeros(len(memory) + 16))
    with pytest.raises(ValueError, match=r"is torch.float32 of shape \(1,\); give whole positions"):
        memory.without(torch.tensor([0.5]))


def test_a_predictor_knows_three_precisions(base: Fit) -> None:
    with pytest.raises(ValueError, match="precision is 'fp8'; a predictor knows fp32, bf16, int8"):
        Predictor(base.learner, precision="fp8")
