from __future__ import annotations

import pytest
import torch

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import build_model
from lifelong_ray.learning.widening import RandomFeatures
from tests.unit.learning.world import MODEL, make_images

IMAGES, _ = make_images([0, 1, 2, 3, 4], seed=0)
MLP = ModelConfig(name="mlp", widths=(12, 6), image_size=8)


@pytest.mark.parametrize("head", ["linear", "analytic"])
@pytest.mark.parametrize("config", [MODEL, MLP])
def test_growing_the_head_leaves_old_logits_as_they_are_to_the_bit(config, head):
    model = build_model(config, 4, seed=0, num_random_features=20).eval()
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(30, model.analytic.widening.num_inputs, generator=generator)
    model.analytic.widening = RandomFeatures.fitted(sample, 20, seed=0)
    model.analytic.weights_MK.normal_(generator=generator)
    model.active_head = head
    rows, columns = model.head.weight.clone(), model.analytic.weights_MK.clone()

    model.grow(7, torch.Generator().manual_seed(0))

    assert torch.equal(model.head.weight[:4], rows)
    assert torch.equal(model.analytic.weights_MK[:, :4], columns)
    assert model(IMAGES).shape == (5, 7)


def test_grown_logits_of_old_classes_equal_those_before():
    model = build_model(MODEL, 4, seed=0).eval()
    before = model(IMAGES)

    model.grow(16, torch.Generator().manual_seed(0))

    assert torch.equal(model(IMAGES)[:, :4], before)


def test_a_head_does_not_shrink():
    with pytest.raises(ValueError, match="cannot shrink to 3"):
        build_model(MODEL, 4, seed=0).grow(3, torch.Generator())


def test_building_and_growing_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    build_model(MODEL, 4, seed=0).grow(6, torch.Generator())

    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("config", [MODEL, MLP])
def test_stages_can_be_run_in_two_parts(config):
    model = build_model(config, 4, seed=0).eval()

    first = model.activations(IMAGES, stop=1)

    assert torch.equal(model.features(first, start=1), model.features(IMAGES))


def test_an_answer_does_not_depend_on_its_batch():
    model = build_model(MODEL, 4, seed=0).train()

    together, alone = model(IMAGES), model(IMAGES[2:3])

    torch.testing.assert_close(together[2:3], alone)


def test_frozen_stages_take_no_gradient():
    model = build_model(MODEL, 4, seed=0)

    model.freeze_stages(1)

    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {f"stages.0.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="cannot freeze 3 stages"):
        model.freeze_stages(3)


@pytest.mark.parametrize("side", [4, 5, 8])
def test_small_images_pass_through_many_stages(side):
    config = ModelConfig(widths=(8, 8, 8, 8, 8), image_size=side, channels=3, pool_size=2)

    logits = build_model(config, 4, seed=0)(torch.zeros(2, 3, side, side, dtype=torch.uint8))

    assert logits.shape == (2, 4)
