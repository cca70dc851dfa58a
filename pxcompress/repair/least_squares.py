"""Refits the layers behind removed units, in the order they run: least squares towards the dense model's outputs.

A layer's update D minimises E[w |D x - r|^2] + lambda |D|^2: x is its input in the slim model as repaired so far, and r
what its output lacks of the dense model's at the same sample and position, so that D also makes up for earlier layers.
The weights as they are, usually folded, are the prior; D = E[w r x^T] (E[w x x^T] + lambda I)^-1, all around the means.
After He et al. (https://arxiv.org/abs/1707.06168), with the asymmetric input of Zhang et al.
(https://arxiv.org/abs/1505.06798).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pxcompress.attribution.relevance import make_start
from pxcompress.layout.consumers import add_, find_consumers
from pxcompress.layout.padding import find_counted_positions
from pxcompress.layout.rows import complement, list_removed_rows, members_by_module
from pxcompress.models.adapter import Adapter
from pxcompress.passes.parts import SplitBatches
from pxcompress.processes import processes, rank, sum_over_processes
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, evaluating, gradients
from pxcompress.types import Batches, Phase, Pruned, Repair

T = TypeVar("T")

RIDGES = (10.0, 1.0, 1e-1, 1e-2)
"""Candidate ridge strengths of a layer, as shares of the mean variance of its inputs; the first wins a tie."""

ROWS_PER_INPUT = 16
ROWS_PER_SAMPLE = 64
"""Most positions of a sample that are used as rows of the regression."""

ROUNDING = 1e-9
"""Added to the variance of the inputs, as a share of their mean square, to cover rounding of float32 inputs."""

WIDEST = 8192
"""Most inputs per output of a layer that is refitted: about five float64 matrices (inputs, inputs) are needed."""

MEMORY_BYTES = 1 << 29
"""Most memory at a time for rows of the dense model, and for matrices of layers refitted together, bytes."""

EXACT_BYTES = 1 << 24
"""Size of a layer's float32 rows above which they are stored in half precision; sums over them stay float64."""

LARGEST_HALF = 1024.0
"""Value to which the largest number is scaled when rows are stored in half precision."""

LAYERS_TOGETHER = 3
"""Most layers refitted together (a wave). Each corrects the whole error so far: too many together overshoot."""

PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
"""Forward methods of layers that can be refitted; a subclass with its own forward may read other inputs."""


@REPAIRS.register("least-squares")
@dataclass(frozen=True)
class LeastSquares(Repair):
    """Refit every layer that lost inputs by least squares. With few data, refitting all layers does harm."""

    waves: int = option(16, "sets of layers that are refitted one after the other, in order", low=1, high=9999)
    rows: int = option(
        16_384, f"samples and positions to fit to, or {ROWS_PER_INPUT} for every input", low=1, high=10**9, log=True
    )
    weighting: str = option(
        "auto",
        "relevance: rows weighted by the squared gradient of the predicted class's margin at the dense output; none: "
        "all alike; auto: by relevance for classifiers alone",
        choices=("auto", "relevance", "none"),
    )
    phase: ClassVar[Phase] = "refit"
    costly: ClassVar[bool] = True

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Refit on `batches`; `held_out` is not needed.

        It takes a pass of the dense model (several if its rows take more than `MEMORY_BYTES`), with a backward pass for
        the weighting, and for each wave a pass of the slim model up to its last layer. A layer gets the ridge that does
        best on one half of the samples after a fit to the other half, or stays if every update does worse. Layers that
        run more than once, have a forward of their own or more than `WIDEST` inputs stay too.
        """
        batches = SplitBatches(batches)
        first_batch = next(iter(batches), None)
        layers = [] if first_batch is None else _find_layers(pruned.whole, first_batch[0][:1], self.rows)
        sizes = [len(inputs) for inputs, _ in batches]
        count, samples = sum_over_processes(torch.tensor([len(sizes), sum(sizes)])).tolist()
        size = min(-(-len(layers) // self.waves), LAYERS_TOGETHER)
        waves = _split_by_size(layers, lambda layer: max(1 / size, layer.sum_bytes / MEMORY_BYTES))
        for stretch in _split_by_size(waves, lambda wave: sum(layer.row_bytes for layer in wave) / MEMORY_BYTES):
            batches_by_layer = {layer: _count_batches(wave, count, samples) for wave in stretch for layer in wave}
            rows = self._rows(pruned.whole.dense, batches_by_layer, batches)
            for wave in stretch:
                for layer, (fit, check) in _collect_sums(pruned.model, wave, rows, batches).items():
                    _refit_(layer, fit.sum_processes(), check.sum_processes())
        return pruned

    def _rows(
        self, model: nn.Module, batches_by_layer: Mapping[_Layer, int], batches: Batches
    ) -> dict[_Layer, list[_Rows]]:
        """Rows of the dense model's outputs by layer, from its first `batches_by_layer` batches over all processes."""
        rows_by_layer: dict[_Layer, list[_Rows]] = {layer: [] for layer in batches_by_layer}

        def hook(layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                number = rank() + processes() * len(rows_by_layer[layer])  # of the batch, over all processes
                if number >= batches_by_layer[layer]:
                    return
                values, counted = _channels_first(output.detach(), module), find_counted_positions(output)
                rows = _draw_rows(layer, values, counted, number, batches_by_layer[layer])
                rows_by_layer[layer].append(rows)
                if output.requires_grad:
                    output.register_hook(lambda gradient: rows.weigh_(layer, _channels_first(gradient, module)))

            return add

        by_relevance, start = self._weighs_by_relevance(model), make_start("margin", "prediction")
        with evaluating(model):
            for layer in batches_by_layer:
                model.get_submodule(layer.name).register_forward_hook(hook(layer))
            for inputs, labels in islice(batches, -(-max(batches_by_layer.values()) // processes())):
                with gradients(by_relevance):
                    inputs = inputs.detach().to(device_of(model)).requires_grad_(by_relevance)
                    logits = model(inputs)
                    if by_relevance:
                        torch.autograd.grad(logits, inputs, start(logits.detach(), labels.to(logits.device)))
        return rows_by_layer

    def _weighs_by_relevance(self, model: nn.Module) -> bool:
        """Whether rows are weighted by relevance; "auto": for classifiers (U-Net: 6.2 points lost, 5.7 without)."""
        several = isinstance(model, Adapter) and model.signature_.logits is not None
        return self.weighting == "relevance" or (self.weighting == "auto" and not several)


def _count_batches(wave: Sequence[_Layer], batches: int, samples: int) -> int:
    """How many of all `batches`, which hold `samples` together, suffice to fit the layers of a wave."""
    needed_samples = max(layer.rows / min(layer.positions, ROWS_PER_SAMPLE) for layer in wave)
    return max(1, min(batches, math.ceil(batches * needed_samples / samples)))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer to refit; `outputs` are the indices of the dense layer's outputs that remain.

    `rows` is the number of rows of the regression; a sample gives one at each of its `positions`.
    """

    name: str
    slim: nn.Module
    outputs: Tensor
    rows: int
    positions: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of convolution groups, outputs in a group, and inputs of an output."""
        weight: Tensor = self.slim.weight  # type: ignore[assignment]
        groups = getattr(self.slim, "groups", 1)
        return groups, len(weight) // groups, weight[0].numel()

    @property
    def sum_bytes(self) -> int:
        """Memory for two float64 matrices (inputs, inputs) of every convolution group, bytes."""
        groups, _, inputs = self.shape
        return 2 * 8 * groups * inputs**2

    def row_type(self, rows: int) -> torch.dtype:
        """Type in which `rows` of the dense model's output rows are stored."""
        return torch.float16 if 4 * rows * len(self.outputs) > EXACT_BYTES else torch.float32

    @property
    def row_bytes(self) -> int:
        """Most memory for the dense model's output rows, bytes."""
        return self.row_type(self.rows).itemsize * self.rows * len(self.outputs)


@dataclass(eq=False)
class _Rows:
    """Rows drawn from one batch at a layer: their indices `places` (m,) among samples x positions, and dense outputs.

    The latter are `values` (m, kept outputs) times `scale`. `weights` is (m,) float64; `fits` (m,) is true for rows
    that are fitted to, and false for those by which the fit is judged.
    """

    places: Tensor
    values: Tensor
    scale: Tensor
    weights: Tensor
    fits: Tensor

    @property
    def dense(self) -> Tensor:
        """The dense model's outputs at these rows, (m, kept outputs) float32."""
        return self.values.float() * self.scale

    def weigh_(self, layer: _Layer, gradient: Tensor) -> None:
        """Add the squared `gradient` (n, outputs, positions ...) at these rows to their weights."""
        self.weights += _pick_rows(gradient, self.places)[:, layer.outputs].double().square().sum(1)


def _draw_rows(layer: _Layer, values: Tensor, counted: Tensor | None, number: int, batches: int) -> _Rows:
    """Draw rows from `values` (n, outputs, ...), the layer's outputs for the batch `number` of `batches`.

    The same number always gives the same rows. Of texts only positions that `counted` (n, length) marks are drawn.
    """
    samples, positions = len(values), prod(values.shape[2:])
    draw = torch.Generator().manual_seed(number)
    places = torch.randperm(samples * positions, generator=draw)
    places = places if counted is None else places[counted.flatten()[places.to(counted.device)].cpu()]
    places = places[: -(-layer.rows // batches)].sort().values
    fits = (2 * (places // positions) < samples) == (number % 2 == 0)  # of batches of one sample every second one
    weights = torch.full((len(places),), 1e-30, dtype=torch.float64)  # where no gradient comes, all are alike
    places, weights, fits = (each.to(values.device) for each in (places, weights, fits))
    rows = _pick_rows(values, places)[:, layer.outputs]
    scale = rows.new_ones(())
    row_type = layer.row_type(len(rows) * batches)
    if row_type == torch.float16:  # the largest far from the end of its range
        scale = rows.abs().amax().clamp_min(1e-30) / LARGEST_HALF
    return _Rows(places, (rows / scale).to(row_type), scale, weights, fits)


@dataclass(eq=False)
class _Sums:
    """Sums over weighted rows, float64: x is an input row with a 1 appended, r the error of the outputs there.

    `gram` is sum w x x^T (groups, inputs + 1, inputs + 1), `cross` sum w r x^T (groups, outputs, inputs + 1), `power`
    sum w |r|^2.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def of(cls, layer: _Layer) -> _Sums:
        """Sums without any rows, all zero."""
        groups, outputs, inputs = layer.shape
        sizes = ((groups, inputs + 1, inputs + 1), (groups, outputs, inputs + 1), ())
        return cls(*(torch.zeros(size, dtype=torch.float64, device=layer.outputs.device) for size in sizes))

    def add_(self, inputs: Tensor, lack: Tensor, weights: Tensor) -> None:
        """Add rows: inputs (groups, m, inputs), errors `lack` (groups, m, outputs) and weights (m,)."""
        x = F.pad(inputs.double(), (0, 1), value=1.0)
        weighted_rows = x * weights[:, None]
        self.gram.baddbmm_(weighted_rows.transpose(1, 2), x)
        self.cross.baddbmm_(lack.double().transpose(1, 2), weighted_rows)
        self.power += (lack.double().square() * weights[:, None]).sum()

    def sum_processes(self) -> _Sums:
        """The sums added up over all processes."""
        return _Sums(sum_over_processes(self.gram), sum_over_processes(self.cross), sum_over_processes(self.power))

    def update(self, ridge: float) -> Tensor:
        """Ridge regression of r on x, as [D d] (groups, outputs, inputs + 1), lambda = ridge * mean variance.

        Where inputs hardly vary, or the numbers fail, D is 0 or nearly so: there is nothing to learn it from.
        """
        total = self.gram[:, -1:, -1:]
        second, mean = self.gram[:, :-1, :-1] / total, self.gram[:, :-1, -1:] / total
        cross, lack = self.cross[:, :, :-1] / total, self.cross[:, :, -1:] / total
        rounding = ROUNDING * second.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
        covariance = second.baddbmm_(mean, mean.transpose(1, 2), alpha=-1)
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        diagonal += (ridge * diagonal.mean(1) + rounding)[:, None]
        target = (cross - lack @ mean.transpose(1, 2)).transpose(1, 2)
        factor, info = torch.linalg.cholesky_ex(covariance)
        weight = torch.cholesky_solve(target, factor).transpose(1, 2)
        weight = torch.where(info[:, None, None] == 0, weight, 0)
        return torch.cat([weight, lack - weight @ mean], 2)

    def error(self, update: Tensor) -> float:
        """The squared error that an update leaves, sum w |D x + d - r|^2."""
        return float(self.power + (update * (update @ self.gram - 2 * self.cross)).sum())


class _WaveFinished(Exception):
    """Raised to stop a pass once the last layer of a wave has run."""


def _collect_sums(
    model: nn.Module, wave: Sequence[_Layer], rows: dict[_Layer, list[_Rows]], batches: Batches
) -> dict[_Layer, tuple[_Sums, _Sums]]:
    """Sums for a refit, one for each half of the samples, by a slim pass up to the last layer of the wave."""
    sums = {layer: (_Sums.of(layer), _Sums.of(layer)) for layer in wave}
    turns = len(rows[wave[0]])
    streams = {layer: iter(rows.pop(layer)) for layer in wave}

    def hook(layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        groups = layer.shape[0]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            batch_rows = next(streams[layer])
            lack = batch_rows.dense - _pick_rows(_channels_first(output, module), batch_rows.places)
            x = _pick_rows(_unfold_patches(args[0], module), batch_rows.places, output.ndim - 2)
            x, lack = (each.reshape(len(each), groups, -1).transpose(0, 1) for each in (x, lack))
            for part, half in zip(sums[layer], (batch_rows.fits, ~batch_rows.fits), strict=True):
                part.add_(x[:, half], lack[:, half], batch_rows.weights[half])
            if layer is wave[-1]:
                raise _WaveFinished

        return add

    with evaluating(model), torch.no_grad():
        for layer in wave:
            layer.slim.register_forward_hook(hook(layer))
        for inputs, _ in islice(batches, turns):
            with suppress(_WaveFinished):
                model(inputs.to(device_of(model)))
    return sums


def _refit_(layer: _Layer, fit: _Sums, check: _Sums) -> None:
    """Update a layer with the ridge that does best on `check`, unless every update is worse than none."""
    errors = {ridge: check.error(fit.update(ridge)) for ridge in RIDGES}
    best_ridge = min(RIDGES, key=lambda ridge: errors[ridge])
    if errors[best_ridge] < float(check.power):
        sums = _Sums(fit.gram + check.gram, fit.cross + check.cross, fit.power + check.power)
        update = sums.update(best_ridge).flatten(0, 1)
        weight: Tensor = layer.slim.weight  # type: ignore[assignment]
        add_(layer.slim, update[:, :-1].reshape(weight.shape).to(weight), update[:, -1].to(weight))


def _find_layers(pruned: Pruned, example: Tensor, rows: int) -> list[_Layer]:
    """The layers to refit, which lost inputs, in the order they run."""
    positions: dict[str, list[int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            positions.setdefault(name, []).append(prod(_channels_first(output, module).shape[2:]))

        return add

    with evaluating(pruned.dense), torch.no_grad():
        for name, module in pruned.dense.named_modules():
            if isinstance(module, nn.Linear | _ConvNd):
                module.register_forward_hook(note(name))
        pruned.dense(example.to(device_of(pruned.dense)))
    consumer_names = {layer.name for layer in find_consumers(pruned)}
    producers = members_by_module(pruned.groups, "out")
    layers = []
    for name in (name for name in positions if name in consumer_names):
        slim = pruned.model.get_submodule(name)
        weight, slim_weight = (model.get_submodule(name).weight for model in (pruned.dense, pruned.model))
        assert isinstance(weight, Tensor)
        assert isinstance(slim_weight, Tensor)
        inputs = slim_weight.shape[1:].numel()
        if len(positions[name]) == 1 and type(slim).forward in PLAIN_FORWARDS and inputs <= WIDEST:
            outputs = complement(len(weight), list_removed_rows(producers.get(name, ()), pruned.plan)).to(weight.device)
            layers.append(_Layer(name, slim, outputs, max(rows, ROWS_PER_INPUT * inputs), positions[name][0]))
    return layers


def _split_by_size(items: Iterable[T], size: Callable[[T], float]) -> list[list[T]]:
    """Lists of consecutive items whose sizes sum to at most 1; a larger item is alone."""
    runs: list[list[T]] = []
    room = 0.0
    for item in items:
        room -= size(item)
        if not runs or room < -1e-9:  # sizes of 1 / n may add up to a little more
            runs.append([])
            room = 1.0 - size(item)
        runs[-1].append(item)
    return runs


def _channels_first(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's input or output as (n, rows, positions ...), with channels as rows."""
    return value.movedim(-1, 1) if isinstance(module, nn.Linear) else value


def _unfold_patches(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's inputs for each output position: a view (n, input rows, positions ..., kernel taps ...)."""
    if not isinstance(module, _ConvNd):
        return _channels_first(value, module)
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        value = F.pad(value, module._reversed_padding_repeated_twice, mode)
    geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(geometry, start=2):
        value = value.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return value


def _pick_rows(value: Tensor, places: Tensor, axes: int | None = None) -> Tensor:
    """(m, rows, taps ...) of (n, rows, positions ..., taps ...) at `places` (m,), with `axes` axes of positions."""
    positions = value.shape[2:] if axes is None else value.shape[2 : 2 + axes]
    sample, *position = torch.unravel_index(places, (len(value), *positions))
    index: tuple[Tensor | slice, ...] = (sample, slice(None), *position)
    return value[index]
