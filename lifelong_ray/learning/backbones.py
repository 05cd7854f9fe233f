"""Backbones: from standardised images to features, in stages that training may freeze.

Knows architectures and where their first weights come from; does not know heads or training.
The settings are those of `ModelConfig`: the built-in ``convnet``, ``mlp``, ``resnet20`` and
``resnet32``, any classifier of torchvision, or a function of the user's.

Axes: N images, D features, K channels of the last map, H its height, W its width.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lifelong_ray.config import ModelConfig
from lifelong_ray.types import LearningError

_BUILT_IN = ("convnet", "mlp", "resnet20", "resnet32")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_GROUPS = 8
_VIT_STAGES = 4
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_Piece = tuple[str, nn.Module]


class Backbone(nn.Module):
    """Stages that are run one after the other, and what is made of the last one's output.

    Attributes:
        stages: In order; the first takes float images (N, channels, image_size, image_size)
            that `standardise` has been over, the last returns (N, K, H, W) or (N, D).
        stage_names: One per stage, for people.
        grid: A map that leaves the last stage is averaged to `grid` by `grid`.
        num_features: D, after that.
    """

    def __init__(self, stages: Sequence[_Piece], *, grid: int, num_features: int = 0) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage for _, stage in stages)
        self.stage_names = tuple(name for name, _ in stages)
        self.grid = grid
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, D) of standardised float images."""
        h = images
        for stage in self.stages:
            h = stage(h)
        if h.dim() == 4:
            h = F.adaptive_avg_pool2d(h, self.grid)
        return h.flatten(1)


def build_backbone(config: ModelConfig) -> Backbone:
    """Build the backbone that `config` describes, with its first weights.

    Random weights are drawn from torch's global random state; whoever calls seeds it.

    Raises:
        LearningError: If there is no such architecture, the weights do not fit it, or it
            cannot take images of this size.
    """
    if config.name in _BUILT_IN:
        _check_built_in(config)
        backbone = Backbone(_built_in_stages(config), grid=_built_in_grid(config))
        if config.weights:
            _load(backbone, _weights_file(config), config)
    elif config.name.startswith("torchvision:"):
        backbone = _from_torchvision(config)
    elif ":" in config.name:
        backbone = _from_function(config)
    else:
        raise _unknown_name(config)
    shape = _probe(backbone, config)
    if config.name not in _BUILT_IN and len(shape) == 4:
        backbone.grid = min(config.pool_size, *shape[2:])
    backbone.num_features = shape[1] * (backbone.grid**2 if len(shape) == 4 else 1)
    return backbone


def standardise(images: Tensor, pixels: Literal["unit", "imagenet"]) -> Tensor:
    """Return uint8 images (N, channels, height, width) as the floats that a backbone takes.

    ``unit`` runs from 0 to 1; ``imagenet`` has about mean 0 and deviation 1 per channel over
    ImageNet, as torchvision's weights want. Grey images get the average of the three channels'
    constants.
    """
    unit = images.float() / 255
    if pixels == "unit":
        return unit
    mean, std = unit.new_tensor(_IMAGENET_MEAN), unit.new_tensor(_IMAGENET_STD)
    if images.shape[1] == 1:
        mean, std = mean.mean()[None], std.mean()[None]
    return (unit - mean[:, None, None]) / std[:, None, None]


# ---------------------------------------------------------------- batch statistics


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether any part normalises over its batch."""
    return any(isinstance(part, _BATCH_NORMS) for part in module.modules())


@torch.no_grad()
def settle_statistics(
    forward: Callable[[Tensor], object], module: nn.Module, inputs: Tensor, chunk: int = 256
) -> None:
    """Give every batch normalisation of `module` the statistics of given examples.

    Running averages trail behind weights that move, and hang on the order of the batches. Here
    the examples pass in fixed chunks, each normalised by its own statistics as in training; mean
    and unbiased variance of all that entered a layer become its running ones, the chunks pooled
    exactly. The same weights and examples give the same statistics, to the bit. Everything else
    runs as in evaluation, so that no dropout is drawn; modes are put back at the end.

    Args:
        forward: Called with one chunk at a time; runs `module` on it.
        module: Changed in place. A layer that `forward` does not reach stays as it is.
        inputs: The examples (N, ...).
        chunk: Examples at once, at most; chunks differ in size by one at most.

    Raises:
        ValueError: If there are no examples.

    Source: Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """
    if not len(inputs):
        raise ValueError("settle_statistics needs at least one example; inputs is empty")
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _BATCH_NORMS) and part.track_running_stats
    ]
    modes = [(part, part.training) for part in module.modules()]
    moments = [_Moments() for _ in norms]
    hooks = [
        norm.register_forward_pre_hook(moment.see)
        for norm, moment in zip(norms, moments, strict=True)
    ]
    module.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        for piece in inputs.tensor_split(math.ceil(len(inputs) / chunk)):
            forward(piece)
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.track_running_stats = True
        for part, mode in modes:
            part.training = mode
    for norm, moment in zip(norms, moments, strict=True):
        if moment.count:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(moment.mean)
            norm.running_var.copy_(moment.squares / max(moment.count - 1, 1))
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()  # No average runs any more.


class _Moments:
    """Count, mean and sum of squared deviations per channel, pooled over what it sees."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1).double()
        count, mean = values.shape[1], values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        if self.count:  # Chan et al.'s update: no difference of large squares
            total = self.count + count
            shift = mean - self.mean
            squares = self.squares + squares + shift.square() * (self.count * count / total)
            mean = self.mean + shift * (count / total)
            count = total
        self.count, self.mean, self.squares = count, mean, squares


# ---------------------------------------------------------------- the built-in ones


def _check_built_in(config: ModelConfig) -> None:
    if config.name.startswith("resnet"):
        if config.norm == "none":
            raise LearningError(
                f"{config.name} does not train without normalisation; set model.norm to group "
                "or batch, or model.name to convnet"
            )
        if config.image_size < 8:
            raise LearningError(
                f"{config.name} needs images of at least 8 pixels, model.image_size is "
                f"{config.image_size}; raise it, or set model.name to convnet"
            )


def _built_in_stages(config: ModelConfig) -> list[_Piece]:
    if config.name == "mlp":
        return _mlp(config)
    if config.name == "convnet":
        return _convnet(config)
    return _cifar_resnet(config, depth=int(config.name.removeprefix("resnet")))


def _built_in_grid(config: ModelConfig) -> int:
    """Side of what is left of the last map; ResNets end in global average pooling."""
    if config.name != "convnet":
        return 1
    side = config.image_size
    for _ in config.widths[1:]:
        side = side // 2 if side >= 2 else side
    return min(config.pool_size, side)


def _mlp(config: ModelConfig) -> list[_Piece]:
    stages: list[_Piece] = []
    inputs = config.channels * config.image_size**2
    for index, width in enumerate(config.widths):
        layers = (nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
        stages.append((f"layer{index + 1}", nn.Sequential(*layers)))
        inputs = width
    return stages


def _convnet(config: ModelConfig) -> list[_Piece]:
    stages: list[_Piece] = []
    channels: int = config.channels
    side = config.image_size
    for index, width in enumerate(config.widths):
        biased = config.norm != "batch"  # which would subtract it again
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=biased),
            *_norm(config.norm, width),
        ]
        if index < len(config.widths) - 1 and side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        # The larger of two values stays the larger under a ReLU: behind the pooling it gives
        # the same, to the bit, for a quarter of the work.
        layers.append(nn.ReLU())
        stages.append((f"stage{index + 1}", _ConvStage(*layers)))
        channels = width
    return stages


class _ConvStage(nn.Sequential):
    """A convolution, a norm, and what follows; one layer less where nothing is trained.

    Batch normalisation by fixed statistics is a scale and a shift of each channel, which the
    convolution takes over: a seventh of the time of an answer.
    """

    def forward(self, h: Tensor) -> Tensor:
        convolution, norm = self[0], self[1]
        trains = torch.is_grad_enabled() or norm.training
        # Of integers there is no other convolution to take it over.
        if trains or not (isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d)):
            for layer in self:
                h = layer(h)
            return h
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        h = F.conv2d(h, weight, bias, convolution.stride, convolution.padding)
        for layer in list(self)[2:]:
            h = layer(h)
        return h


def _norm(kind: str, width: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(width)]
    return [nn.GroupNorm(_num_groups(width), width)] if kind == "group" else []


def _num_groups(width: int) -> int:
    """Groups of at least two channels where possible.

    In groups of one the norm cancels the convolution's bias: its gradient is rounding error,
    which Adam would blow up to full steps.
    """
    groups = math.gcd(_NORM_GROUPS, width)
    return groups if groups < width else max(1, width // 2)


def _cifar_resnet(config: ModelConfig, depth: int) -> list[_Piece]:
    """The narrow ResNets for images of 32 pixels: 3 layers of (depth - 2) / 6 blocks.

    Where width and side change, the shortcut drops every other pixel and fills up with channels
    of zeros: option A, which the paper uses here and which has no weights.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.
    """
    stem = nn.Sequential(
        nn.Conv2d(config.channels, 16, kernel_size=3, padding=1, bias=False),
        *_norm(config.norm, 16),
        nn.ReLU(),
    )
    stages: list[_Piece] = [("stem", stem)]
    channels = 16
    for index, width in enumerate((16, 32, 64)):
        blocks = []
        for block in range((depth - 2) // 6):
            stride = 2 if index and not block else 1
            blocks.append(_ResidualBlock(channels, width, stride, config.norm))
            channels = width
        stages.append((f"layer{index + 1}", nn.Sequential(*blocks)))
    for _, stage in stages:
        for part in stage.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return stages


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights."""

    def __init__(self, channels: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.stride = stride
        self.num_fresh = width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        (self.norm1,) = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        (self.norm2,) = _norm(norm, width)

    def forward(self, h: Tensor) -> Tensor:
        shortcut = h[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.num_fresh))
        h = F.relu(self.norm1(self.conv1(h)))
        return F.relu(self.norm2(self.conv2(h)) + shortcut)


# ---------------------------------------------------------------- torchvision's


@dataclass(frozen=True)
class _Cut:
    """A torchvision net without its last layer.

    Attributes:
        net: Images to features (N, D).
        classifier: Name of the layer that is gone.
    """

    net: nn.Module
    classifier: str


def _from_torchvision(config: ModelConfig) -> Backbone:
    """Any of torchvision's classifiers; the features are what entered its last layer.

    With one channel the first convolution's weights are summed over red, green and blue: grey
    images give what they would give as colour images of three equal channels.

    The split is not taken on trust: unless the stages have all weights of the net and give its
    features, the whole net is the one stage. A new stage starts wherever the resolution falls,
    in vision transformers at every quarter of the blocks.
    """
    from torchvision import models  # noqa: PLC0415 - slow to import, and few configs need it

    name = config.name.removeprefix("torchvision:")
    if name not in models.list_models(module=models):
        raise _unknown_name(config)
    settings: dict[str, Any] = {"weights": None}
    if name in {"googlenet", "inception_v3"}:
        # Their weights want pixels from -1 to 1, and they turn ImageNet's standard into that.
        standard = config.pixels == "imagenet" and config.channels == 3
        settings |= {"aux_logits": False, "transform_input": standard, "init_weights": True}
    cut = _without_classifier(models.get_model(name, **settings))
    state = _torchvision_state(config, name) if config.weights else None
    if state is not None and not _is_ours(state):
        _load(cut.net, state, config, dropped=(cut.classifier, "aux1", "aux2", "AuxLogits"))
    if config.channels == 1:
        _take_grey(cut.net)
    whole = Backbone([(name, cut.net)], grid=1)
    _probe(whole, config)
    backbone = Backbone(_grouped(_pieces(cut)), grid=1)
    if not _same(whole, backbone, config):
        backbone = whole
    if state is not None and _is_ours(state):
        _load(backbone, state, config)
    return backbone


def _without_classifier(net: nn.Module) -> _Cut:
    """Put the identity in place of the last linear layer."""
    linear = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    if linear:
        path, _, last = linear[-1].rpartition(".")
        setattr(net.get_submodule(path), last, nn.Identity())
        return _Cut(net, linear[-1])
    # SqueezeNet's last layer is a convolution whose outputs are averaged.
    dropout, _, _, pool = net.get_submodule("classifier").children()
    net.classifier = nn.Sequential(dropout, nn.Identity(), nn.Identity(), pool)
    return _Cut(net, "classifier.1")


def _take_grey(net: nn.Module) -> None:
    for path, part in net.named_modules():
        if isinstance(part, nn.Conv2d):
            above, _, last = path.rpartition(".")
            grey = copy.deepcopy(part)
            grey.in_channels = 1
            grey.weight = nn.Parameter(part.weight.detach().sum(1, keepdim=True))
            setattr(net.get_submodule(above), last, grey)
            return


def _pieces(cut: _Cut) -> list[tuple[str, nn.Module, bool]]:
    """Name, module and whether a stage starts there, in the order the net is taken to run."""
    from torchvision.models.densenet import DenseNet  # noqa: PLC0415 - as above
    from torchvision.models.swin_transformer import (  # noqa: PLC0415 - as above
        PatchMerging,
        PatchMergingV2,
    )
    from torchvision.models.vision_transformer import VisionTransformer  # noqa: PLC0415 - as above

    net = cut.net
    if isinstance(net, VisionTransformer):
        return _vit_pieces(net)
    top = cut.classifier.partition(".")[0]
    pieces = []
    for name, child in net.named_children():
        if name == top:
            continue
        inner = list(child.named_children())
        opened = name in {"features", "layers", "trunk_output", "blocks"} and bool(inner)
        pieces += [(f"{name}_{i}", part) for i, part in inner] if opened else [(name, child)]
    end = net.get_submodule(top)
    if not any(isinstance(part, nn.Flatten) for part in end.modules()):
        if isinstance(net, DenseNet):
            pieces.append(("relu", nn.ReLU()))
        if not hasattr(net, "avgpool") and not any(
            isinstance(part, nn.AdaptiveAvgPool2d) for part in end.modules()
        ):
            pieces.append(("avgpool", nn.AdaptiveAvgPool2d(1)))
        if not any(isinstance(part, nn.AdaptiveAvgPool2d) for part in end.modules()):
            pieces.append(("flatten", nn.Flatten(1)))
    pieces.append((top, end))
    return [
        (
            name,
            piece,
            any(
                isinstance(part, PatchMerging | PatchMergingV2)
                or _largest(getattr(part, "stride", 1)) > 1
                for part in piece.modules()
            ),
        )
        for name, piece in pieces
    ]


def _largest(stride: object) -> int:
    return max(stride) if isinstance(stride, tuple) else stride if isinstance(stride, int) else 1


def _vit_pieces(net: Any) -> list[tuple[str, nn.Module, bool]]:
    blocks = list(net.encoder.layers)
    each = math.ceil(len(blocks) / _VIT_STAGES)
    return [
        ("tokens", _Tokens(net), True),
        *((f"block{i}", block, i % each == 0) for i, block in enumerate(blocks)),
        ("norm", net.encoder.ln, False),
        ("class_token", _FirstToken(), False),
        ("heads", net.heads, False),
    ]


class _Tokens(nn.Module):
    """Images to patch tokens behind a class token, positions added."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.conv_proj = net.conv_proj
        self.class_token = net.class_token
        self.pos_embedding = net.encoder.pos_embedding
        self.dropout = net.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(images), -1, -1)
        tokens: Tensor = self.dropout(torch.cat([first, patches], dim=1) + self.pos_embedding)
        return tokens


class _FirstToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _grouped(pieces: list[tuple[str, nn.Module, bool]]) -> list[_Piece]:
    """Each stage is named after its piece with the most weights."""
    groups: list[list[_Piece]] = []
    for name, piece, starts in pieces:
        if starts or not groups:
            groups.append([])
        groups[-1].append((name, piece))
    return [(max(group, key=_size)[0], nn.Sequential(OrderedDict(group))) for group in groups]


def _size(piece: _Piece) -> int:
    return sum(weight.numel() for weight in piece[1].parameters())


def _same(whole: Backbone, split: Backbone, config: ModelConfig) -> bool:
    """Whether both have the same weights and give the same features of an uneven image."""
    if {*map(id, whole.parameters())} != {*map(id, split.parameters())}:
        return False
    size, channels = config.image_size, config.channels
    ramp = torch.linspace(-1, 1, 2 * channels * size**2).reshape(2, channels, size, size)
    with _undisturbed(whole), _undisturbed(split):
        expected = whole(ramp)
        try:
            features = split(ramp)
        except (RuntimeError, TypeError, ValueError):
            return False
    # Not to the bit: which stages there are must not hang on a processor's rounding.
    return features.shape == expected.shape and bool(
        (features - expected).abs().max() <= 1e-4 * expected.abs().max()
    )


# ---------------------------------------------------------------- the user's own


def _from_function(config: ModelConfig) -> Backbone:
    """A backbone of the user's: the function is imported and called, so its module is trusted."""
    module_name, _, function_name = config.name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise LearningError(
            f"model.name is {config.name}, but the module {module_name} cannot be imported: "
            f"{error}; install it, or put its folder on PYTHONPATH"
        ) from error
    except AttributeError:
        raise LearningError(
            f"model.name is {config.name}, but {module_name} has no {function_name}"
        ) from None
    if not callable(function):
        raise LearningError(
            f"model.name is {config.name}, which is a {type(function).__name__}; it must be a "
            "function that takes image_size and channels and returns a torch.nn.Module"
        )
    try:
        net = function(image_size=config.image_size, channels=config.channels)
    except Exception as error:
        raise LearningError(
            f"{config.name}(image_size={config.image_size}, channels={config.channels}) "
            f"failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise LearningError(
            f"{config.name} returned a {type(net).__name__}; it must return a torch.nn.Module"
        )
    state = _weights_file(config) if config.weights else None
    if state is not None and not _is_ours(state):
        _load(net, state, config)
    if isinstance(net, nn.Sequential) and len(net):
        backbone = Backbone(list(net.named_children()), grid=1)
    else:
        backbone = Backbone([(function_name, net)], grid=1)
    if state is not None and _is_ours(state):
        _load(backbone, state, config)
    return backbone


# ---------------------------------------------------------------- weights


def _torchvision_state(config: ModelConfig, name: str) -> dict[str, Tensor]:
    """A file's weights, or a set of torchvision's hub, in today's names."""
    if Path(config.weights).suffix in {".safetensors", ".pth", ".pt"}:
        state = _weights_file(config)
    else:
        from torchvision import models  # noqa: PLC0415 - as above

        known = models.get_model_weights(name).__members__
        if config.weights not in known:
            raise LearningError(
                f"model.weights is {config.weights!r}, but {config.name} has "
                f"{', '.join(known) or 'none'}; name one of them, or a .safetensors or .pth file"
            )
        weights = known[config.weights]
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise LearningError(
                f"the weights {config.weights} of {config.name} cannot be downloaded: {error}; "
                f"download {weights.url} elsewhere and set model.weights to the file's path"
            ) from error
    # DenseNet's files are older than the rule that names have no dots.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in state.items()
    }


def _weights_file(config: ModelConfig) -> dict[str, Tensor]:
    path = Path(config.weights).expanduser()
    if path.suffix not in {".safetensors", ".pth", ".pt"}:
        raise LearningError(
            f"model.weights is {config.weights!r}; for {config.name} it must be empty or a "
            ".safetensors, .pth or .pt file"
        )
    if not path.is_file():
        raise LearningError(f"the weights file {path} (model.weights) does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise LearningError(
            f"the weights file {path} (model.weights) cannot be read: {error}; save the state "
            "dict alone, best as .safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise LearningError(
            f"the weights file {path} (model.weights) does not hold a state dict, which has a "
            "tensor for each name; save module.state_dict()"
        )
    return state


def _is_ours(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of a backbone of this module, such as a version's file has."""
    return any(key.startswith("stages.") for key in state)


def _load(
    net: nn.Module, state: dict[str, Tensor], config: ModelConfig, dropped: tuple[str, ...] = ()
) -> None:
    """Load by name, strictly; what follows the stages in a file of ours is a head, and left."""
    if isinstance(net, Backbone):
        given = {key: value for key, value in state.items() if key.startswith("stages.")}
    else:
        given = {
            k: v for k, v in state.items() if not k.startswith(tuple(f"{d}." for d in dropped))
        }
    wanted = net.state_dict()
    for key, value in wanted.items():
        if key not in given:
            if key.endswith("num_batches_tracked"):  # older files have none, and nothing needs it
                given[key] = value
                continue
            problem = f"it has no {key}"
        elif given[key].shape != value.shape:
            problem = f"{key} is {tuple(given[key].shape)} there and {tuple(value.shape)} here"
        else:
            continue
        raise _misfit(config, problem)
    if odd := [key for key in given if key not in wanted]:
        raise _misfit(config, f"it has {odd[0]}, which the architecture has not")
    net.load_state_dict(given)


def _misfit(config: ModelConfig, problem: str) -> LearningError:
    return LearningError(
        f"the weights {config.weights} (model.weights) do not fit {config.name}: {problem}; set "
        "model.name and its sizes to what they were saved from, or model.weights to others"
    )


# ---------------------------------------------------------------- checks


def _unknown_name(config: ModelConfig) -> LearningError:
    from torchvision import models  # noqa: PLC0415 - as above

    known = [*_BUILT_IN, *(f"torchvision:{name}" for name in models.list_models(module=models))]
    bare = {name.removeprefix("torchvision:"): name for name in reversed(known)}
    asked = config.name.removeprefix("torchvision:")
    candidates = [n for n in bare if n not in _BUILT_IN] if asked != config.name else list(bare)
    nearest = difflib.get_close_matches(asked, candidates, n=1, cutoff=0.0)
    return LearningError(
        f"model.name is {config.name!r}, which is no known backbone; the nearest is "
        f"{bare[nearest[0]]}. It may be {', '.join(_BUILT_IN)}, torchvision:NAME or "
        "package.module:function"
    )


def _probe(backbone: Backbone, config: ModelConfig) -> torch.Size:
    """Run blank images and return the shape that leaves the last stage."""
    size = config.image_size
    blank = torch.zeros(2, config.channels, size, size)
    try:
        with _undisturbed(backbone):
            h = blank
            for stage in backbone.stages:
                h = stage(h)
    except Exception as error:
        raise LearningError(
            f"{config.name} cannot take images of {size} x {size} pixels with {config.channels} "
            f"channels: {error}; set model.image_size (most networks of torchvision were made "
            "for 224) or choose another model.name"
        ) from error
    rule = "it must return features (N, D) or a map (N, K, H, W) of floats"
    if not isinstance(h, Tensor):
        raise LearningError(f"{config.name} returned a {type(h).__name__}; {rule}")
    if h.dim() not in {2, 4} or len(h) != len(blank) or not h.numel() or not h.is_floating_point():
        raise LearningError(
            f"{config.name} returned {str(h.dtype).removeprefix('torch.')} of shape "
            f"{tuple(h.shape)} for {len(blank)} images; {rule}"
        )
    if not h.isfinite().all():
        raise LearningError(
            f"{config.name} returned values that are not finite for a blank image; check its "
            "weights, and that nothing is divided by a deviation of zero"
        )
    return h.shape


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and the random state are put back."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
            for buffer, value in buffers:
                buffer.copy_(value)
    finally:
        for part, mode in modes:
            part.training = mode
