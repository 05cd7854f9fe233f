from __future__ import annotations

import copy
import sys
import types
from urllib.error import URLError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import build_model
from lifelong_ray.learning.backbones import (
    build_backbone,
    has_batch_statistics,
    settle_statistics,
    standardise,
)
from lifelong_ray.types import LearningError

SMALL = "torchvision:shufflenet_v2_x0_5"


def build(name, seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(ModelConfig(name=name, **config))


def images(size, channels=3, num=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, channels, size, size, generator=generator)


@torch.no_grad()
def features(net, inputs):
    return net.eval()(inputs)


# ---------------------------------------------------------------- the built-in ones


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("size", "grid"), [(4, 1), (5, 1), (16, 2)])
def test_a_convnet_gives_its_last_width_times_the_grid(norm, size, grid):
    backbone = build("convnet", widths=(8, 12, 16), norm=norm, image_size=size)

    assert backbone.grid == grid
    assert backbone.num_features == 16 * grid**2
    assert features(backbone, images(size, 1)).shape == (3, 16 * grid**2)
    assert has_batch_statistics(backbone) == (norm == "batch")


def test_an_mlp_has_one_stage_per_width():
    backbone = build("mlp", widths=(12, 6), image_size=8)

    assert backbone.stage_names == ("layer1", "layer2")
    assert features(backbone, images(8, 1)).shape == (3, backbone.num_features) == (3, 6)


@pytest.mark.parametrize(("name", "weighted_layers"), [("resnet20", 19), ("resnet32", 31)])
def test_a_cifar_resnet_has_the_depth_of_its_name_without_the_classifier(name, weighted_layers):
    backbone = build(name, image_size=32, channels=3, norm="batch")

    convolutions = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == weighted_layers
    assert backbone.stage_names == ("stem", "layer1", "layer2", "layer3")


def test_resnet20_with_a_classifier_of_ten_has_as_many_weights_as_in_the_paper():
    backbone = build("resnet20", image_size=32, channels=3, norm="batch")

    num_weights = sum(weight.numel() for weight in backbone.parameters()) + 64 * 10 + 10

    assert num_weights == 269_722  # "0.27M", He et al. 2016, table 6


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (9, 3), (15, 1), (32, 3)])
def test_a_cifar_resnet_takes_any_size_and_averages_its_last_map(norm, size, channels):
    backbone = build("resnet20", image_size=size, channels=channels, norm=norm)

    last = images(size, channels)
    with torch.no_grad():
        for stage in backbone.eval().stages:
            last = stage(last)

    expected = last.mean(dim=(2, 3))
    torch.testing.assert_close(features(backbone, images(size, channels)), expected)
    assert backbone.num_features == 64


def test_the_first_block_of_a_wider_layer_passes_every_other_pixel_on():
    block = build("resnet20", image_size=8).stages[2][0]
    nn.init.zeros_(block.norm2.weight)
    h = torch.rand(2, 16, 8, 8)

    out = features(block, h)

    assert torch.equal(out[:, :16], h[:, :, ::2, ::2])
    assert torch.count_nonzero(out[:, 16:]) == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"norm": "none"}, "resnet20 does not train without normalisation; set model.norm"),
        ({"image_size": 7}, "at least 8 pixels, model.image_size is 7"),
    ],
)
def test_a_cifar_resnet_says_what_it_cannot_be(config, words):
    with pytest.raises(LearningError, match=words):
        build("resnet20", **config)


@pytest.mark.parametrize("name", ["convnet", "mlp", "resnet20", SMALL])
def test_weights_follow_from_the_global_random_state_alone(name):
    one, other, third = (build(name, seed=seed, image_size=32) for seed in (4, 4, 5))

    weights = [torch.cat([w.flatten() for w in b.parameters()]) for b in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_new_backbone_is_in_training_mode_with_fresh_statistics():
    backbone = build("convnet", norm="batch")

    assert all(part.training for part in backbone.modules())
    assert torch.count_nonzero(backbone.stages[0][1].running_mean) == 0
    assert int(backbone.stages[0][1].num_batches_tracked) == 0


# ---------------------------------------------------------------- torchvision's

FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vgg11": 32,
    "vit_b_32": 32,
}


def slender(get_model, name, **settings):
    """A net of the family with fewer weights, where drawing them all would take seconds."""
    from torchvision import models

    if name == "vit_b_32":
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32
        )
    if name == "swin_t":
        return models.SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 2, 2, 2], [7, 7])
    if name not in {"alexnet", "vgg11"}:
        return get_model(name, **settings)
    with torch.device("meta"):
        net = get_model(name, **settings)
    width = next(part for part in net.classifier if isinstance(part, nn.Linear)).in_features
    for index, part in enumerate(net.classifier):
        if isinstance(part, nn.Linear):
            net.classifier[index] = nn.Linear(width, 24)
            width = 24
    for index, part in enumerate(net.features):
        if isinstance(part, nn.Conv2d):
            net.features[index] = part.to_empty(device="cpu")
            part.reset_parameters()
    return net


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_of_a_torchvision_net_give_what_enters_its_last_layer(name, monkeypatch):
    from torchvision import models

    get_model, undivided = models.get_model, []

    def keep_a_copy(asked, **settings):
        net = slender(get_model, asked, **settings)
        undivided.append(copy.deepcopy(net))
        return net

    monkeypatch.setattr(models, "get_model", keep_a_copy)
    inputs = images(FAMILIES[name], num=2) - 0.5

    backbone = build(f"torchvision:{name}", image_size=FAMILIES[name], channels=3)

    (net,) = undivided
    linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
    last = linear[-1] if linear else net.classifier[1]  # SqueezeNet's is a convolution
    entered = []
    last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    features(net, inputs)
    expected = entered[0] if linear else entered[0].mean((2, 3))
    assert torch.equal(features(backbone, inputs), expected)
    assert backbone.num_features == expected.shape[1]
    assert 4 <= len(backbone.stages) == len(backbone.stage_names) <= 6


def test_grey_images_give_what_they_give_as_colour_images():
    grey, colour = (build(SMALL, image_size=32, channels=channels) for channels in (1, 3))
    inputs = images(32, channels=1)

    expected = features(colour, inputs.expand(-1, 3, -1, -1))

    torch.testing.assert_close(features(grey, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_net_made_for_one_size_says_so(monkeypatch):
    from torchvision import models

    get_model = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, **_: slender(get_model, name))

    with pytest.raises(
        LearningError,
        match=r"torchvision:vit_b_32 cannot take images of 48 x 48 .*Expected 32 but got 48",
    ):
        build("torchvision:vit_b_32", image_size=48, channels=3)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision:resnet19", "torchvision:resnet1"),
        ("resnet50", "torchvision:resnet50"),
        ("convnt", "convnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision:"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_known(name, nearest):
    with pytest.raises(LearningError, match=f"no known backbone; the nearest is {nearest}"):
        build(name, image_size=32)


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def torchvision_state():
    from torchvision import models

    torch.manual_seed(7)
    return models.get_model(SMALL.removeprefix("torchvision:"), num_classes=4).state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_with_another_number_of_classes_is_loaded_without_its_classifier(
    suffix, tmp_path, torchvision_state
):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": torchvision_state}, path)
    else:
        save_file(torchvision_state, path)

    backbone = build(SMALL, image_size=32, channels=3, weights=str(path))

    assert torch.equal(backbone.stages[0].conv1[0].weight, torchvision_state["conv1.0.weight"])


@pytest.mark.parametrize("name", ["convnet", "resnet20", SMALL])
def test_the_file_of_a_whole_model_gives_its_backbone_back(name, tmp_path):
    saved = build(name, seed=3, image_size=32)
    path = tmp_path / "model.safetensors"
    save_file({**saved.state_dict(), "head.weight": torch.zeros(4, 2)}, path)

    loaded = build(name, image_size=32, weights=str(path))

    inputs = images(32, 1)
    assert torch.equal(features(loaded, inputs), features(saved, inputs))


def test_weights_of_another_architecture_are_refused_with_the_first_odd_name(tmp_path):
    path = tmp_path / "model.safetensors"
    state = build("convnet", widths=(8, 16)).state_dict()
    save_file(state, path)

    with pytest.raises(LearningError, match=r"model\.safetensors .*do not fit convnet: stages.0.0"):
        build("convnet", widths=(4, 16), weights=str(path))
    with pytest.raises(LearningError, match=r"do not fit convnet: it has no stages\.2\.0\.weight"):
        build("convnet", widths=(8, 16, 16), weights=str(path))
    with pytest.raises(LearningError, match=r"it has stages\.1\..*, which the architecture"):
        build("convnet", widths=(8,), weights=str(path))
    save_file({"conv1.0.weight": torch.zeros(24, 3, 3, 3)}, path)
    with pytest.raises(LearningError, match=r"do not fit torchvision:shuffle.*it has no"):
        build(SMALL, image_size=32, weights=str(path))


def test_a_weights_file_that_is_missing_or_damaged_is_named(tmp_path):
    damaged = tmp_path / "damaged"
    for suffix in ("pth", "safetensors"):
        damaged.with_suffix(f".{suffix}").write_bytes(b"nothing")
        with pytest.raises(LearningError, match=rf"damaged\.{suffix} .*cannot be read"):
            build("convnet", weights=str(damaged.with_suffix(f".{suffix}")))
    torch.save([1, 2], damaged.with_suffix(".pt"))

    with pytest.raises(LearningError, match=r"damaged\.pt .*does not hold a state dict"):
        build("convnet", weights=str(damaged.with_suffix(".pt")))
    with pytest.raises(LearningError, match=r"gone\.pth \(model\.weights\) does not exist"):
        build("convnet", weights=str(tmp_path / "gone.pth"))
    with pytest.raises(LearningError, match=r"'DEFAULT'; for convnet it must be empty or a"):
        build("convnet", weights="DEFAULT")


def test_a_hub_set_is_loaded_under_its_name(monkeypatch, torchvision_state):
    from torchvision.models import _api

    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: dict(torchvision_state))

    backbone = build(SMALL, image_size=32, channels=3, weights="DEFAULT")

    assert torch.equal(backbone.stages[0].conv1[0].weight, torchvision_state["conv1.0.weight"])


def test_a_failed_download_says_how_to_go_on(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(LearningError, match=r"no route to host.*download https.*\.pth elsewhere"):
        build(SMALL, image_size=32, weights="IMAGENET1K_V1")


def test_an_unknown_hub_set_is_answered_with_the_known_ones():
    with pytest.raises(LearningError, match=r"'IMAGENET9'.* has IMAGENET1K_V1, DEFAULT"):
        build(SMALL, image_size=32, weights="IMAGENET9")


# ---------------------------------------------------------------- the user's own


class Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output


@pytest.fixture
def own(monkeypatch):
    """Puts a function, or something else, where `own:net` finds it."""

    def put(net):
        module = types.ModuleType("own")
        module.net = net
        monkeypatch.setitem(sys.modules, "own", module)

    return put


def test_the_children_of_a_sequential_of_ones_own_become_the_stages(own):
    own(
        lambda *, image_size, channels: nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3))
        )
    )

    backbone = build("own:net", image_size=8, channels=3, pool_size=2)

    assert len(backbone.stages) == 2
    assert backbone.num_features == 5 * 2**2
    assert features(backbone, images(8)).shape == (3, 20)


def test_any_other_module_of_ones_own_is_one_stage(own):
    class Mean(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    own(lambda **_: Mean())

    backbone = build("own:net", image_size=8, channels=3)

    assert backbone.stage_names == ("net",)
    assert backbone.num_features == 3


def test_finding_the_number_of_features_leaves_buffers_and_random_state_alone(own):
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images):
            self.calls += 1
            torch.rand(3)
            return images.flatten(1)

    own(lambda **_: Restless())
    torch.manual_seed(0)
    expected = torch.random.get_rng_state()

    backbone = build_backbone(ModelConfig(name="own:net", image_size=8))

    assert backbone.stages[0].calls == 0
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_a_function_of_ones_own_may_start_from_a_file(own, tmp_path):
    own(lambda *, channels, **_: nn.Sequential(nn.Conv2d(channels, 4, 3)))
    path = tmp_path / "own.safetensors"
    save_file({"0.weight": torch.ones(4, 1, 3, 3), "0.bias": torch.ones(4)}, path)

    backbone = build("own:net", image_size=8, weights=str(path))

    assert torch.equal(backbone.stages[0].weight, torch.ones(4, 1, 3, 3))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (3, "which is a int; it must be a function"),
        (lambda: None, r"own:net\(image_size=8, channels=1\) failed: TypeError"),
        (lambda **_: "net", "returned a str; it must return a torch.nn.Module"),
        (lambda **_: Constant("text"), r"returned a str; it must return features \(N, D\)"),
        (lambda **_: Constant(torch.zeros(2)), r"returned float32 of shape \(2,\) for 2 images"),
        (lambda **_: Constant(torch.zeros(1, 3)), r"shape \(1, 3\) for 2 images"),
        (lambda **_: Constant(torch.zeros(2, 3).long()), "returned int64"),
        (lambda **_: Constant(torch.full((2, 3), torch.nan)), "values that are not finite"),
        (lambda **_: nn.Conv2d(5, 3, 3), "cannot take images of 8 x 8 pixels with 1 channels"),
    ],
)
def test_what_is_wrong_with_a_backbone_of_ones_own_is_said(own, net, words):
    own(net)

    with pytest.raises(LearningError, match=words):
        build("own:net", image_size=8)


def test_a_module_or_function_that_is_not_there_is_named(own):
    own(None)

    with pytest.raises(LearningError, match="nowhere_at_all cannot be imported"):
        build("nowhere_at_all:net")
    with pytest.raises(LearningError, match="own has no other"):
        build("own:other")


# ---------------------------------------------------------------- pixels


def test_unit_pixels_run_from_0_to_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)

    assert torch.equal(standardise(pixels, "unit").flatten(), pixels.flatten().float() / 255)


def test_imagenet_pixels_are_standardised_per_channel():
    pixels = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8)

    floats = standardise(pixels, "imagenet")

    expected = [(128 / 255 - m) / s for m, s in [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]]
    torch.testing.assert_close(floats[1, :, 2, 3], torch.tensor(expected))


def test_grey_pixels_get_the_average_constants():
    floats = standardise(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "imagenet")

    torch.testing.assert_close(floats, torch.full((1, 1, 2, 2), -0.449 / 0.226))


# ---------------------------------------------------------------- batch statistics


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 40), chunk=st.integers(2, 50), seed=st.integers(0, 99))
def test_settled_statistics_are_those_of_all_examples_whatever_the_chunks(num, chunk, seed):
    norm = nn.BatchNorm2d(3)
    inputs = 100 + torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(seed))

    settle_statistics(norm, norm, inputs, chunk)

    values = inputs.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)


def test_a_later_layer_sees_what_an_earlier_one_makes_of_each_chunk():
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    inputs = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)).exp()

    settle_statistics(nn.Sequential(first, second), nn.Sequential(first, second), inputs, 5)

    pieces = [F.batch_norm(piece, None, None, training=True) for piece in inputs.split(5)]
    torch.testing.assert_close(second.running_var, torch.cat(pieces).var(0))


def test_settling_twice_gives_the_same_statistics_and_draws_nothing():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    settle_statistics(net, net, inputs, chunk=7)
    expected = copy.deepcopy(net.state_dict())

    settle_statistics(net, net, inputs, chunk=7)

    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_settling_changes_nothing_but_the_statistics():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[1].eval()
    modes = [part.training for part in net.modules()]
    before = copy.deepcopy(net.state_dict())

    settle_statistics(lambda h: net[1](net[0](h)), net, torch.rand(9, 4))

    changed = {name for name, v in net.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert [part.training for part in net.modules()] == modes
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_a_forward_that_fails_leaves_modes_and_statistics_as_they_were():
    norm = nn.BatchNorm1d(4)

    def fail(piece):
        norm(piece)
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        settle_statistics(fail, norm, torch.rand(9, 4))

    assert norm.training
    assert norm.track_running_stats
    assert torch.count_nonzero(norm.running_mean) == 0


def test_settling_needs_examples():
    with pytest.raises(ValueError, match="at least one example"):
        settle_statistics(nn.Identity(), nn.Identity(), torch.empty(0, 4))


def test_a_convolution_that_takes_its_norm_over_answers_as_both_did():
    model = build_model(ModelConfig(widths=(8, 16), image_size=8, norm="batch"), 4, seed=0)
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    for norm in (part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(1)
        for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    model.eval()

    apart = model(images)
    with torch.no_grad():
        together = model(images)

    assert apart.requires_grad
    assert not torch.equal(together, apart)
    torch.testing.assert_close(together, apart.detach(), rtol=1e-4, atol=1e-5)
