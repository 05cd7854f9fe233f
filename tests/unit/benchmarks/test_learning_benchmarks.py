"""The learning benchmarks where images are few, classes many, or images not square."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lifelong_ray.config import ModelConfig
from lifelong_ray.datasets import SourceArrays
from lifelong_ray.learning import Labelled
from lifelong_ray.scenarios import split
from tests.unit.benchmarks.scripts import load

continual, sequence = load("continual"), load("sequence")
update_cost, common = load("update_cost"), load("common")

MODEL = ModelConfig(name="mlp", widths=(8,), image_size=8)


def arrays_of(num_classes: int, per_class: int) -> SourceArrays:
    """Images on whose brightness the class decides, class after class."""
    labels = np.repeat(np.arange(num_classes), per_class)
    noise = np.random.default_rng(0).integers(0, 20, (len(labels), 8, 8, 1))
    images = (noise + labels[:, None, None, None] * 4 % 230).astype(np.uint8)
    names = tuple(str(c) for c in range(num_classes))
    return SourceArrays(images, labels, images, labels, names)


def protocol(num_classes: int, num_experiences: int, memory_per_class: int = 100) -> object:
    return sequence.Protocol(
        scenario="class",
        iterations=2,
        batch_size=8,
        memory_per_class=memory_per_class,
        lambda_ewc=1.0,
        precision="fp32",
        device="cpu",
        num_experiences=num_experiences,
        num_classes=num_classes,
        classes_per_label=1,
    )


def labelled(*counts: int) -> Labelled:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels


# ---------------------------------------------------------------- few images of a class


@pytest.mark.parametrize(("per_class", "trained"), [(1, 1), (2, 1), (20, 10), (100, 80)])
def test_of_few_images_of_a_class_at_least_half_are_trained_on(
    per_class: int, trained: int
) -> None:
    training, aside = sequence._set_aside(labelled(per_class, per_class), 20, seed=0)

    assert torch.bincount(training[1]).tolist() == [trained] * 2
    assert torch.bincount(aside[1], minlength=2).tolist() == [per_class - trained] * 2


@pytest.mark.parametrize("per_class", [2, 20])
def test_methods_run_on_few_images_of_a_class(
    per_class: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continual, "_WIDE", 32)
    scenario = split(arrays_of(4, per_class), "class", 2)

    for name in ("default", "derpp", "datafree"):
        figures = sequence.run_method(
            scenario, MODEL, continual.method(name, protocol(4, 2), seed=0)
        )

        assert 0 <= figures["final_accuracy"] <= 1, name
        assert len(figures["rows"]) == 2, name


@pytest.mark.parametrize("seed", range(4))
def test_an_update_never_sets_the_last_image_of_a_class_aside(seed: int) -> None:
    training, held = update_cost._set_aside(labelled(1, 1), seed)
    assert sorted(training[1].tolist()) == [0, 1]
    assert len(held[1]) == 0

    training, held = update_cost._set_aside(labelled(40, 1, 1), seed)
    assert set(training[1].tolist()) == {0, 1, 2}
    assert held[1].tolist() == [0, 0]


def test_an_update_sets_images_aside_at_random_where_there_are_enough() -> None:
    training, held = update_cost._set_aside(labelled(200, 200), seed=0)

    assert len(held[1]) == 20
    assert len(training[1]) == 380
    assert set(held[1].tolist()) == {0, 1}


# ---------------------------------------------------------------- many classes


def test_methods_warm_up_on_every_one_of_many_classes() -> None:
    arrays = arrays_of(60, 12)
    last = np.argsort(arrays.train_labels == 7, kind="stable")  # far behind those of other classes
    arrays = replace(
        arrays,
        train_images=arrays.train_images[last],
        train_labels=arrays.train_labels[last],
    )
    scenario = split(arrays, "class", 1)
    how = continual.method("naive", protocol(60, 1), seed=0)

    sequence.warm_up(scenario, MODEL, how, "cpu")


def test_sixty_classes_in_three_experiences_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "_WIDE", 32)
    scenario = split(arrays_of(60, 4), "class", 3)
    how = continual.method("default", protocol(60, 3, 4), seed=0)

    figures = sequence.run_method(scenario, MODEL, how)

    assert [len(row) for row in figures["rows"]] == [3, 3, 3]
    assert figures["samples_seen"] > 0
