"""Squared gradients of single examples, added up over examples.

Knows how gradients of single examples come out of one batched backward pass; does not know
which gradients are wanted, or what for.

A layer's weight enters the model once, so the gradient of one example is a product of what
entered the layer and of the gradient at its output. Where that does not hold, as with a
class token or a layer used twice, the gradients are taken of the model as a whole. Which of
the two it is, is not guessed from the architecture: one example is computed both ways.

Axes: N examples, C classes, O outputs of a layer, K inputs of one output, L positions,
G groups of a convolution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from lifelong_ray.learning.model import Classifier

logger = logging.getLogger(__name__)

Cotangents = Callable[[Tensor, slice], Iterator[Tensor]]
"""From logits (N, C) of the examples in a slice to one gradient at the logits (N, C) or more;
squares are added up over them too."""

# On a processor more would be slower: layers would read from memory what others have written.
_MAX_BYTES_ON_CPU, _MAX_BYTES_ON_DEVICE = 100_000_000, 2_000_000_000
# Of a processor: products of a few examples that stay in its second-level cache are squared
# and added up twice as fast as those of a whole batch.
_CACHE_BYTES = 2_000_000
_MAX_BATCH = 512
_MIN_INPUTS_PER_PRODUCT = 32
_FEW_POSITIONS, _EXAMPLES_PER_PAIRS = 4, 64
# Far above rounding, far below what a wrong formula does.
_AGREES_WITHIN, _NEGLIGIBLE = 1e-3, 1e-6


def weights_after(model: Classifier, start: int) -> dict[str, nn.Parameter]:
    """The weights that inputs of stage `start` meet, by name."""
    passed = tuple(f"stages.{index}." for index in range(start))
    return {
        name: weight for name, weight in model.named_parameters() if not name.startswith(passed)
    }


def sums_of_squares(
    model: Classifier,
    inputs: Tensor,
    cotangents: Cotangents,
    *,
    start: int = 0,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Add up the squared gradients of every example, for each weight after stage `start`.

    Layer by layer where possible, else by `torch.func.vmap` over the whole model, else in a
    loop over single examples; the log says which. All of it in full float32.

    Args:
        model: In eval mode, float32.
        inputs: uint8 images, or activations that enter stage `start`; may be none.
        cotangents: Gives the gradients at the logits that are pulled back.
        start: Stages passed already.
        max_bytes: Roughly what may be held at once beside the model; None means 100 MB on a
            CPU and 2 GB elsewhere.
    """
    weights = weights_after(model, start)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    if not len(inputs):
        return sums
    on_cpu = model.device.type == "cpu"
    budget = max_bytes or (_MAX_BYTES_ON_CPU if on_cpu else _MAX_BYTES_ON_DEVICE)
    whole = _Whole(_Logits(model, start), weights)
    with torch.autocast(model.device.type, enabled=False), _full_precision(model.device):
        by_layer = _ByLayer(
            model,
            start,
            weights,
            min(budget, _CACHE_BYTES * torch.get_num_threads()) if on_cpu else budget,
        )
        try:
            bytes_per_example = _check(by_layer, whole, _entering(model, inputs[:1]))
        except _NotByLayerError as reason:
            _add_whole(sums, whole, model, inputs, cotangents, budget, str(reason))
            return sums
        logger.info("gradients of single examples are taken layer by layer")
        batch = max(1, min(_MAX_BATCH, budget // bytes_per_example))
        for first in range(0, len(inputs), batch):
            piece = slice(first, first + batch)
            logits_NC = by_layer.forward(_entering(model, inputs[piece]))
            rounds = cotangents(logits_NC.detach(), piece)
            cotangent_NC = next(rounds, None)
            while cotangent_NC is not None:
                following_NC = next(rounds, None)
                by_layer.add(logits_NC, cotangent_NC, more=following_NC is not None)
                cotangent_NC = following_NC
        by_layer.collect(sums)
    return sums


class _NotByLayerError(Exception):
    """The gradients do not follow from the layers' inputs and outputs; says why."""


class _Logits(nn.Module):
    """From activations to the trained head's logits, as one module."""

    def __init__(self, model: Classifier, start: int) -> None:
        super().__init__()
        self.model = model
        self.start = start

    def forward(self, h: Tensor) -> Tensor:
        logits_NC: Tensor = self.model.trained_logits(h, start=self.start)
        return logits_NC


def _entering(model: Classifier, inputs: Tensor) -> Tensor:
    """Activations that enter the first stage in question, laid out as is fastest."""
    h = model.activations(inputs.to(model.device), stop=0).detach().float()
    if h.device.type == "cpu" and h.dim() == 4 and _has_convolutions(model):
        channels, height, width = h.shape[1:]
        # A single channel is laid out alike either way, and says so by its strides alone.
        h = h.contiguous(memory_format=torch.channels_last).as_strided(
            h.shape, (channels * height * width, 1, width * channels, channels)
        )
    return h.requires_grad_()


def _has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in model.modules())


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep accelerators from rounding products to fewer bits than float32 has."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# Layer by layer


class _Layer(Protocol):
    """Adds up squares of one layer's weights."""

    sums: dict[str, Tensor]
    """By the weight's name in the layer; shapes as the weights once `finish` was called."""

    def enter(self, inputs: Tensor) -> None:
        """Take what entered the layer."""

    def add(self, delta: Tensor) -> None:
        """Add squares for the gradient at the layer's output."""

    def finish(self) -> None:
        """Bring the sums into the weights' shapes."""


class _ByLayer:
    """One forward pass that every layer takes notes of, and backward passes to use them."""

    def __init__(
        self,
        model: Classifier,
        start: int,
        weights: Mapping[str, nn.Parameter],
        chunk_bytes: int,
    ) -> None:
        self._logits = _Logits(model, start)
        self._modules: dict[str, nn.Module] = {}
        self._layers: dict[str, _Layer] = {}
        self._edges: dict[str, GradientEdge] = {}
        self._weights = weights
        self._chunk_bytes = chunk_bytes
        self.noted_bytes = 0
        for name, module in model.named_modules():
            own = [f"{name}.{kind}".lstrip(".") for kind, _ in _own_weights(module)]
            if any(weight in weights for weight in own):
                self._modules[name] = module
        self.restart()

    def restart(self) -> None:
        """Forget all squares."""
        self._layers = {
            name: _layer_for(module, self._chunk_bytes) for name, module in self._modules.items()
        }

    def forward(self, h: Tensor) -> Tensor:
        """Return logits (N, C); every layer notes what enters and leaves it."""
        self._edges, self.noted_bytes = {}, 0
        hooks = [
            module.register_forward_hook(self._note(name)) for name, module in self._modules.items()
        ]
        try:
            logits_NC: Tensor = self._logits(h)
        finally:
            for handle in hooks:
                handle.remove()
        if len(self._edges) < len(self._modules):
            idle = next(name for name in self._modules if name not in self._edges)
            raise _NotByLayerError(f"{idle} is not called as a layer")
        return logits_NC

    def _note(self, name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_: nn.Module, received: tuple[object, ...], output: object) -> None:
            if name in self._edges:
                raise _NotByLayerError(f"{name} is used twice")
            if len(received) != 1 or not isinstance(received[0], Tensor):
                raise _NotByLayerError(f"{name} takes more than one tensor")
            if not isinstance(output, Tensor) or not output.requires_grad:
                raise _NotByLayerError(f"{name} does not return one differentiable tensor")
            # Not the output itself, which the next layer may overwrite.
            self._edges[name] = get_gradient_edge(output)
            self._layers[name].enter(received[0].detach())
            self.noted_bytes += 4 * (received[0].numel() + output.numel())

        return hook

    def add(self, logits_NC: Tensor, cotangent_NC: Tensor, *, more: bool) -> None:
        """Add the squares for one gradient at the logits; `more` says that others follow."""
        deltas = torch.autograd.grad(
            [logits_NC],
            list(self._edges.values()),
            grad_outputs=[cotangent_NC],
            retain_graph=more,
            allow_unused=True,
        )
        with torch.no_grad():
            for name, delta in zip(self._edges, deltas, strict=True):
                if delta is not None:
                    self._layers[name].add(delta)

    def collect(self, sums: dict[str, Tensor]) -> None:
        """Add all squares so far to `sums`, by name."""
        for name, layer in self._layers.items():
            layer.finish()
            for kind, value in layer.sums.items():
                sums[f"{name}.{kind}"] += value


def _own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _layer_for(module: nn.Module, chunk_bytes: int) -> _Layer:
    if isinstance(module, nn.Linear):
        return _Linear(module, chunk_bytes)
    if isinstance(module, nn.Conv2d):
        return _Convolution(module, chunk_bytes)
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
        return _Norm(module)
    return _Other(module, chunk_bytes)


def _add_products(total_X: Tensor, left_NOL: Tensor, right_NLK: Tensor, chunk_bytes: int) -> None:
    """Add the squares of ``left @ right`` of every example to `total_X`, a few at a time."""
    num, num_outputs, num_positions = left_NOL.shape
    num_inputs = right_NLK.shape[2]
    per_product = total_X.numel() // (num_outputs * num_inputs)
    if num_positions <= _FEW_POSITIONS and per_product == 1:
        total_X += _squares_over_pairs(left_NOL, right_NLK).view(-1)
        return
    if num_inputs < num_outputs:  # Products with few columns are slow, those with few rows not.
        turned = torch.zeros_like(total_X)
        _add_products(turned, right_NLK.transpose(1, 2), left_NOL.transpose(1, 2), chunk_bytes)
        total_X += turned.view(-1, num_inputs, num_outputs).transpose(1, 2).flatten()
        return
    chunk = max(1, chunk_bytes // (4 * num_outputs * num_inputs)) * per_product
    products = left_NOL.new_empty(min(chunk, num), num_outputs, num_inputs)
    ones = left_NOL.new_ones(len(products) // per_product)
    for first in range(0, num, chunk):
        left = left_NOL[first : first + chunk]
        out = products[: len(left)]
        torch.bmm(left, right_NLK[first : first + chunk], out=out)
        flat = out.square_().view(-1, total_X.numel())
        total_X.addmv_(flat.T, ones[: len(flat)])


def _squares_over_pairs(left_NOL: Tensor, right_NLK: Tensor) -> Tensor:
    """Return the sum of squared products (O, K) without any product of a single example.

    The square of a sum over positions is a sum over pairs of them, and that sum and the one
    over examples are one matrix product. Of a single position nothing is left but squares:
    Goodfellow 2015, arXiv:1510.01799.
    """
    positions = left_NOL.shape[2]
    one, other = torch.triu_indices(positions, positions, device=left_NOL.device)
    times_P = 2.0 - (one == other).to(left_NOL.dtype)
    left_NOP = left_NOL[:, :, one] * left_NOL[:, :, other] * times_P
    right_NPK = right_NLK[:, one] * right_NLK[:, other]
    left_OX = left_NOP.transpose(0, 1).flatten(1)
    # Rounding may leave less than nothing where the positions cancel out.
    squares_OK: Tensor = (left_OX @ right_NPK.flatten(0, 1)).clamp(min=0)
    return squares_OK


class _Linear:
    """Of `nn.Linear`, applied to vectors or to sequences of them."""

    def __init__(self, layer: nn.Linear, chunk_bytes: int) -> None:
        self.sums = {kind: torch.zeros_like(weight) for kind, weight in _own_weights(layer)}
        self._chunk_bytes = chunk_bytes
        self._inputs_NLK = torch.empty(0)
        self._squares_NK = torch.empty(0)

    def enter(self, inputs: Tensor) -> None:
        self._inputs_NLK = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        if self._inputs_NLK.shape[1] == 1:
            self._squares_NK = self._inputs_NLK[:, 0].square()

    def add(self, delta: Tensor) -> None:
        delta_NLO = delta.reshape(len(delta), -1, delta.shape[-1])
        if delta_NLO.shape[1] == 1:
            self.sums["weight"].addmm_(delta_NLO[:, 0].square().T, self._squares_NK)
        else:
            total = self.sums["weight"].view(-1)
            _add_products(total, delta_NLO.transpose(1, 2), self._inputs_NLK, self._chunk_bytes)
        if "bias" in self.sums:
            self.sums["bias"] += delta_NLO.sum(1).square().sum(0)

    def finish(self) -> None:
        pass


class _Convolution:
    """Of `nn.Conv2d` with any stride, padding, dilation and groups.

    The gradient of one example is a matrix product over positions, for each row of the kernel
    one: channels-last, the inputs of all output positions lie side by side but for that row's
    offset, so that only the kernel's columns have to be laid out anew.
    """

    def __init__(self, layer: nn.Conv2d, chunk_bytes: int) -> None:
        self._layer = layer
        self._chunk_bytes = chunk_bytes
        self._inputs = torch.empty(0)
        height, width = layer.kernel_size
        self._columns = width * layer.in_channels // layer.groups
        # Products with few inputs are slow: rather one of all rows.
        self._joined = self._columns < _MIN_INPUTS_PER_PRODUCT
        products = 1 if self._joined else height
        self._totals = layer.weight.new_zeros(products, layer.weight.numel() // products)
        self.sums = {kind: torch.zeros_like(weight) for kind, weight in _own_weights(layer)}

    def enter(self, inputs: Tensor) -> None:
        self._inputs = inputs

    def add(self, delta: Tensor) -> None:
        layer = self._layer
        if "bias" in self.sums:
            self.sums["bias"] += delta.sum((2, 3)).square().sum(0)
        out_height, out_width = delta.shape[2:]
        positions = out_height * out_width
        inputs_per_output = self._totals.shape[1] // layer.out_channels
        per_example = 4 * max(
            self._totals.shape[1],
            positions * (layer.out_channels + layer.groups * inputs_per_output),
        )
        chunk = max(1, self._chunk_bytes // per_example)
        if positions <= _FEW_POSITIONS and layer.groups == 1:
            chunk = _EXAMPLES_PER_PAIRS
        for first in range(0, len(delta), chunk):
            delta_NOL = delta[first : first + chunk].flatten(2)
            if layer.groups > 1:
                delta_NOL = delta_NOL.unflatten(1, (layer.groups, -1)).flatten(0, 1)
            rows = self._rows(self._inputs[first : first + chunk], out_height, out_width)
            for total, row_NLK in zip(self._totals, rows, strict=True):
                _add_products(total, delta_NOL, row_NLK, self._chunk_bytes)

    def _rows(self, inputs: Tensor, out_height: int, out_width: int) -> list[Tensor]:
        """For each kernel row, the inputs of every position; groups count as examples."""
        layer = self._layer
        padded = _padded(inputs, layer).permute(0, 2, 3, 1).contiguous()
        num, height, _, channels = padded.shape
        (stride_y, stride_x), (step_y, step_x) = layer.stride, layer.dilation
        kernel_height, kernel_width = layer.kernel_size
        by_image, by_row = padded.stride()[:2]
        columns = padded.as_strided(
            (num, height, out_width, kernel_width, channels),
            (by_image, by_row, stride_x * channels, step_x * channels, 1),
        )
        columns = columns.unflatten(4, (layer.groups, -1)).permute(0, 4, 1, 2, 3, 5)
        columns = columns.reshape(num * layer.groups, height, out_width, self._columns)
        reach = (out_height - 1) * stride_y + 1
        rows = [
            columns[:, first : first + reach : stride_y].flatten(1, 2)
            for first in range(0, kernel_height * step_y, step_y)
        ]
        return [torch.cat(rows, dim=2)] if self._joined else rows

    def finish(self) -> None:
        layer = self._layer
        products, (height, width) = len(self._totals), layer.kernel_size
        outputs = layer.out_channels
        squares = self._totals.view(products, outputs, height // products, width, -1)
        self.sums["weight"] += squares.permute(1, 4, 0, 2, 3).reshape_as(layer.weight)
        self._totals.zero_()


def _padded(inputs: Tensor, layer: nn.Conv2d) -> Tensor:
    sides: list[int] = []
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            both = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            both = both if layer.padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [layer.padding[axis]] * 2
    if not any(sides):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, sides, mode=mode)


class _Norm:
    """Of the scale and shift of a normalisation whose statistics do not cross examples."""

    def __init__(
        self, layer: nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm
    ) -> None:
        self._layer = layer
        self._normal = torch.empty(0)
        self.sums = {kind: torch.zeros_like(weight) for kind, weight in _own_weights(layer)}

    def enter(self, inputs: Tensor) -> None:
        layer = self._layer
        if isinstance(layer, nn.GroupNorm):
            self._normal = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
        elif isinstance(layer, nn.LayerNorm):
            self._normal = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
        elif layer.running_mean is None:
            raise _NotByLayerError("a batch normalisation has no fixed statistics")
        else:
            self._normal = F.batch_norm(
                inputs, layer.running_mean, layer.running_var, eps=layer.eps
            )

    def add(self, delta: Tensor) -> None:
        first = 2
        last = delta.dim()
        if isinstance(self._layer, nn.LayerNorm):
            first, last = 1, delta.dim() - len(self._layer.normalized_shape)
        positions = tuple(range(first, last))

        def squares(gradients: Tensor) -> Tensor:
            of_examples = gradients.sum(positions) if positions else gradients
            return of_examples.square().sum(0)

        self.sums["weight"] += squares(delta * self._normal)
        if "bias" in self.sums:
            self.sums["bias"] += squares(delta)

    def finish(self) -> None:
        pass


class _Other:
    """Of any layer from one tensor to one tensor: its own backward pass, over examples."""

    def __init__(self, layer: nn.Module, chunk_bytes: int) -> None:
        self._layer = layer
        self._inputs = torch.empty(0)
        self.sums = {kind: torch.zeros_like(weight) for kind, weight in _own_weights(layer)}
        num_weights = sum(value.numel() for value in self.sums.values())
        self._chunk = max(1, chunk_bytes // (8 * num_weights))

    def enter(self, inputs: Tensor) -> None:
        self._inputs = inputs

    def add(self, delta: Tensor) -> None:
        weights = {kind: weight.detach() for kind, weight in _own_weights(self._layer)}

        def gradients(one: Tensor, delta_of_one: Tensor) -> dict[str, Tensor]:
            def run(at: dict[str, Tensor]) -> Tensor:
                return cast("Tensor", functional_call(self._layer, at, (one[None],)))

            pulled: dict[str, Tensor] = vjp(run, weights)[1](delta_of_one[None])[0]
            return pulled

        for first in range(0, len(delta), self._chunk):
            piece = slice(first, first + self._chunk)
            try:
                found = vmap(gradients)(self._inputs[piece], delta[piece])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                kind = type(self._layer).__name__
                raise _NotByLayerError(f"{kind} cannot be differentiated by itself") from error
            for kind, value in found.items():
                self.sums[kind] += value.square().sum(0)

    def finish(self) -> None:
        pass


# The model as a whole


@dataclass(frozen=True)
class _Whole:
    """Gradients of single examples without looking into the model."""

    logits: _Logits
    weights: Mapping[str, nn.Parameter]

    def _at(self) -> dict[str, Tensor]:
        return {f"model.{name}": weight.detach() for name, weight in self.weights.items()}

    def by_vmap(self, h: Tensor, cotangent_NC: Tensor) -> dict[str, Tensor]:
        """Return the sums of squares over a few examples at once."""
        weights = self._at()

        def gradients(one: Tensor, cotangent_C: Tensor) -> dict[str, Tensor]:
            def run(at: dict[str, Tensor]) -> Tensor:
                return cast("Tensor", functional_call(self.logits, at, (one[None],))[0])

            pulled: dict[str, Tensor] = vjp(run, weights)[1](cotangent_C)[0]
            return pulled

        found = vmap(gradients)(h.detach(), cotangent_NC)
        return {name[len("model.") :]: value.square().sum(0) for name, value in found.items()}

    def by_loop(self, h: Tensor, cotangent_NC: Tensor) -> dict[str, Tensor]:
        """The same, one example after the other."""
        weights = {name: value.requires_grad_() for name, value in self._at().items()}
        sums = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        for one, cotangent_C in zip(h.detach(), cotangent_NC, strict=True):
            with torch.enable_grad():
                logits_C = functional_call(self.logits, weights, (one[None],))[0]
            gradients = torch.autograd.grad(
                logits_C, list(weights.values()), grad_outputs=cotangent_C, allow_unused=True
            )
            for name, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    sums[name].addcmul_(gradient, gradient)
        return sums


def _add_whole(
    sums: dict[str, Tensor],
    whole: _Whole,
    model: Classifier,
    inputs: Tensor,
    cotangents: Cotangents,
    budget: int,
    reason: str,
) -> None:
    """Add the squares of all examples, by vmap or, where it cannot, in a loop."""
    num_weights = sum(weight.numel() for weight in sums.values())
    batch = max(1, min(_MAX_BATCH, budget // (12 * num_weights)))
    squares_of, how = whole.by_vmap, "by vmap over the whole model"
    try:
        h = _entering(model, inputs[:1])
        whole.by_vmap(h, h.new_zeros(1, model.num_classes))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        squares_of, how = whole.by_loop, "one example after the other"
        reason = f"{reason}, and vmap cannot: {str(error).splitlines()[0]}"
    logger.warning("gradients of single examples are taken %s, as %s", how, reason)
    for first in range(0, len(inputs), batch):
        piece = slice(first, first + batch)
        h = _entering(model, inputs[piece])
        with torch.no_grad():
            logits_NC = whole.logits(h)
        for cotangent_NC in cotangents(logits_NC, piece):
            for name, value in squares_of(h, cotangent_NC).items():
                sums[name] += value


def _check(by_layer: _ByLayer, whole: _Whole, h: Tensor) -> int:
    """Compare one example with plain autograd and return the bytes that it takes.

    Raises:
        _NotByLayerError: If they do not agree.
    """
    logits_NC = by_layer.forward(h)
    cotangent_NC = torch.linspace(-1, 1, logits_NC.shape[1], device=h.device)[None]
    by_layer.add(logits_NC, cotangent_NC, more=False)
    sums = {name: torch.zeros_like(weight) for name, weight in whole.weights.items()}
    by_layer.collect(sums)
    by_layer.restart()
    expected = whole.by_loop(h, cotangent_NC)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        allowed = _AGREES_WITHIN * float(value.max()) + _NEGLIGIBLE * largest
        if float((sums[name] - value).abs().max()) > allowed:
            raise _NotByLayerError(f"{name} has an effect beyond its layer's output")
    # Most outputs are inputs too; the gradients come on top.
    return 2 * by_layer.noted_bytes
