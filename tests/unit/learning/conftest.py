"""One base training that the learning tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lifelong_ray.learning import Fit, Labelled, Run, fit_base
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base() -> Fit:
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    validation = make_images([0, 1, 2, 3] * 5, seed=2)
    return fit_base(examples, "abcd", MODEL, CONFIG, Run(TickingClock()), validation=validation)


@pytest.fixture(scope="session")
def new_examples() -> Labelled:
    return make_images([0, 1, 2, 3, 4, 5] * 5, seed=5)
