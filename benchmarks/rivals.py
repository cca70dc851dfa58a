"""What other packages make of the same models: structured pruning by Torch-Pruning and by onnxsim, at given MACs.

Both remove a share of the channels; shares are tried until one leaves the MACs that are wanted. Neither repairs what is
left; `reestimate` gives Torch-Pruning's models BatchNorm statistics (in ONNX files those are part of the convolutions).
Where a package fails, its reason stands in the model's place.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
import torch_pruning as tp
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.cost.count import count_macs
from pxcompress.deploy import runtime
from pxcompress.errors import PxError, ResultError
from pxcompress.models.loading import classifier_names
from pxcompress.models.rewrite import ExplicitAttention
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batches

TRIALS = 40
TOLERANCE = 0.02
"""A model may have more MACs than wanted by this share of the dense model's."""

FAILURES = (
    PxError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)
"""What packages raise on models that they cannot handle: mostly Python's own errors."""

Kept = TypeVar("Kept")
Shape = tuple[int, ...]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""The loss of a model on inputs and targets."""


def class_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of a classifier."""
    return cross_entropy(model(inputs), labels)


@dataclass(frozen=True)
class Refused:
    """Why there is no model: one line, in the package's own words where it raised an error."""

    reason: str


def closest(trials: Iterator[tuple[float, Kept] | Refused], targets: Sequence[float]) -> dict[float, Kept | Refused]:
    """For each target the trial (share of the dense MACs, model) next to it, never above it by more than `TOLERANCE`.

    Stops at the first trial below all targets. A target that no trial comes down to gets the reason: the last refusal,
    unless a trial after it worked.
    """
    best: dict[float, tuple[float, Kept]] = {}
    refused, smallest = None, 1.0
    for trial in trials:
        if isinstance(trial, Refused):
            refused = trial
            continue
        (share, model), refused = trial, None
        smallest = min(smallest, share)
        for target in targets:
            gap = abs(share - target)
            if share <= target + TOLERANCE and gap < best.get(target, (math.inf,))[0]:
                best[target] = gap, model
        if share < min(targets):
            break
    nothing = refused or Refused(f"removes no more than leaves {smallest:.2f} of the MACs")
    return {target: best[target][1] if target in best else nothing for target in targets}


class SummedHessian(tp.importance.GroupHessianImportance):
    """What the package documents: squared gradients of all samples. Its own sum only ever holds the last sample's.

    It asks for parameters by name in a dictionary that has the parameters themselves as keys.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0.0) + parameter.grad.square()
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


IMPORTANCES = {
    "L2": tp.importance.GroupMagnitudeImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "Hessian": tp.importance.GroupHessianImportance,
    "Hessian, summed": SummedHessian,
}
SCOPES = {
    "local": {"global_pruning": False, "isomorphic": False},
    "global": {"global_pruning": True, "isomorphic": False},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


@dataclass(frozen=True)
class TorchPruning:
    """Torch-Pruning's own pruner, importance and order, as its README and its examples use them.

    `iterative`: one model goes through all steps, with gradients taken anew before each (its `reproduce/main.py`);
    else every trial prunes the dense model in one step (its README). Which of them loses less depends on the
    importance. Timm's ViTs keep the width of their residual stream (`--bottleneck` of its ViT example; without that
    they lose far more) and lose dimensions of every head, or whole heads with `whole_heads` (in one step; iterative,
    the pruner fails). Layers named in `whole` stay as they are, beside the classifier; gradients are those of `loss`.
    """

    importance: str
    scope: str
    iterative: bool = False
    whole_heads: bool = False
    round_to: int = 4
    loss: Loss = class_loss
    whole: tuple[str, ...] = ()

    def __call__(
        self, model: nn.Module, example: Tensor, batches: Batches, targets: Sequence[float]
    ) -> dict[float, nn.Module | Refused]:
        """Pruned copies of `model` by share of its MACs; Taylor and Hessian read the labels of `batches`."""
        trials = self._steps if self.iterative else self._shots
        with warnings.catch_warnings(action="ignore"), torch.enable_grad():
            return closest(trials(model, example, batches), targets)

    def _steps(
        self, model: nn.Module, example: Tensor, batches: Batches
    ) -> Iterator[tuple[float, nn.Module] | Refused]:
        try:
            twin, scorer, dense = _trainable(model), IMPORTANCES[self.importance](), count_macs(model, example)
            pruner = self._pruner(twin, example, scorer, _shares())
            for _ in range(TRIALS):
                accumulate(twin, scorer, batches, self.loss)
                _step(twin, pruner)
                yield _share(twin, example, dense), copy.deepcopy(twin)
        except FAILURES as error:
            yield Refused(_line(error))

    def _shots(
        self, model: nn.Module, example: Tensor, batches: Batches
    ) -> Iterator[tuple[float, nn.Module] | Refused]:
        source, scorer, dense = _trainable(model), IMPORTANCES[self.importance](), count_macs(model, example)
        accumulate(source, scorer, batches, self.loss)
        for share in _shares()[1:]:
            twin, twins_scorer = copy.deepcopy((source, scorer))
            try:
                pruner = self._pruner(twin, example, twins_scorer, [0.0, share])
                for parameter, original in zip(twin.parameters(), source.parameters(), strict=True):
                    parameter.grad = None if original.grad is None else original.grad.clone()
                _step(twin, pruner)
                twin.zero_grad()
                yield _share(twin, example, dense), twin
            except FAILURES as error:
                yield Refused(_line(error))

    def _pruner(
        self, model: nn.Module, example: Tensor, scorer: tp.importance.Importance, shares: Sequence[float]
    ) -> tp.pruner.BasePruner:
        """A pruner that has removed shares[i] of the channels after step i.

        Every dictionary is given, because the default ones are shared by all pruners of the process.
        """
        attentions = _attentions(model)
        heads = {layer: each.num_heads for each in attentions for layer in _projections(each)}
        whole_layers = [model.get_submodule(name) for name in (*classifier_names(model, example), *self.whole)]
        if attentions:
            whole_layers += [module.fc2 for module in model.modules() if isinstance(module, Mlp)]
        return tp.pruner.BasePruner(
            model,
            example.to(device_of(model)),
            scorer,
            pruning_ratio=shares[-1],
            iterative_steps=len(shares) - 1,
            iterative_pruning_ratio_scheduler=lambda ratio, steps: list(shares),
            ignored_layers=whole_layers,
            round_to=self.round_to,
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
            num_heads=heads,
            prune_num_heads=self.whole_heads,
            prune_head_dims=not self.whole_heads,
            head_pruning_ratio=shares[-1],
            **SCOPES[self.scope],
        )


def _shares() -> list[float]:
    """Shares of the channels that take away equal parts of the MACs, these being quadratic in the widths."""
    return [1 - math.sqrt(1 - step / TRIALS) for step in range(TRIALS + 1)]


def _trainable(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(True)


def accumulate(model: nn.Module, scorer: tp.importance.Importance, batches: Batches, loss: Loss = class_loss) -> None:
    """Gradients of the loss, as the package's ViT example collects them for `scorer`.

    For Hessian importance sample by sample, which is what its loop over a batch's losses comes to.
    """
    model.zero_grad()
    device = device_of(model)
    if isinstance(scorer, tp.importance.GroupTaylorImportance):
        for inputs, labels in batches:
            loss(model, inputs.to(device), labels.to(device)).backward()
    if isinstance(scorer, tp.importance.GroupHessianImportance):
        scorer.zero_grad()
        for inputs, labels in batches:
            for image, label in zip(inputs.to(device).split(1), labels.to(device).split(1), strict=True):
                model.zero_grad()
                loss(model, image, label).backward()
                scorer.accumulate_grad(model)


def _step(model: nn.Module, pruner: tp.pruner.BasePruner) -> None:
    """Prune, and write down what timm's attention reads besides its weights.

    Raises `ResultError` where all heads of a layer shall go: the pruner leaves its weights then and says 0 heads.
    """
    pruner.step()
    for attention in _attentions(model):
        projections = _projections(attention)
        attention.num_heads = pruner.num_heads[projections[0]]
        if not attention.num_heads:
            raise ResultError("an attention layer is left with 0 heads")
        attention.attn_dim = sum(layer.out_features for layer in projections) // 3
        attention.head_dim = attention.attn_dim // attention.num_heads


def _attentions(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(module, ExplicitAttention) or (hasattr(module, "qkv") and hasattr(module, "num_heads"))
    ]


def _projections(attention: Any) -> list[nn.Linear]:
    """The layers that make queries, keys and values."""
    return [attention.q, attention.k, attention.v] if isinstance(attention, ExplicitAttention) else [attention.qkv]


def _share(model: nn.Module, example: Tensor, dense: int) -> float:
    """MACs as a share of `dense`. Raises `ResultError` where outputs are not finite."""
    with torch.no_grad():
        if not model(example.to(device_of(model))).isfinite().all():
            raise ResultError("the pruned model's outputs are not finite")
    return count_macs(model, example) / dense


def reestimate(model: nn.Module, batches: Batches) -> nn.Module:
    """`model`, in place, with BatchNorm statistics of `batches` (no labels); without BatchNorm nothing changes."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for inputs, _ in batches:
            if len(inputs) > 1:
                model(inputs.to(device_of(model)))
    return model


@dataclass(frozen=True)
class Onnxsim:
    """onnxsim's structured pruning of an ONNX file: the same share of every layer's channels and, if asked, heads."""

    importance: str
    heads: bool = False

    def __call__(self, dense: Path, batches: Batches, targets: Sequence[float]) -> dict[float, Path | Refused]:
        """Pruned files beside `dense`, by share of its MACs; Wanda reads activations on `batches`, without labels."""
        models_at = closest(self._shots(dense, batches), targets)
        paths: dict[float, Path | Refused] = {}
        for target, model in models_at.items():
            path = dense.with_name(f"{dense.stem}-onnxsim-{self.importance}-{target:.2f}.onnx".lower())
            paths[target] = model if isinstance(model, Refused) else _saved(model, path)
        return paths

    def _shots(self, path: Path, batches: Batches) -> Iterator[tuple[float, onnx.ModelProto] | Refused]:
        try:
            onnxsim = importlib.import_module("onnxsim")
        except ImportError as error:
            yield Refused(f"{_line(error)}; pip install 'pxcompress[benchmarks]'")
            return
        model = onnx.load(path)
        dense = onnx_macs(model)
        name = model.graph.input[0].name
        options = {"calibration_data": [{name: inputs.numpy()} for inputs, _ in batches]}
        kind, needed = {"magnitude": ("", {}), "Wanda": ("wanda_", options)}[self.importance]
        for share in _shares()[1:-1]:
            slim = copy.deepcopy(model)
            try:
                for units in ("structured", "attention_head") if self.heads else ("structured",):
                    slim = getattr(onnxsim, f"apply_{units}_{kind}pruning")(slim, sparsity=share, **needed)
                yield onnx_macs(slim) / dense, slim
            except FAILURES as error:
                yield Refused(_line(error))


def onnxsim_repairs(dense: Path, slim: Path, batches: Batches) -> Iterator[Path]:
    """`slim` after onnxsim's ridge refit towards `dense`, then with BatchNorm recovered too; without what fails."""
    onnxsim = importlib.import_module("onnxsim")
    model = onnx.load(slim)
    data = {"calibration_data": [{model.graph.input[0].name: inputs.numpy()} for inputs, _ in batches]}
    try:
        model = onnxsim.apply_pruning_finetune(dense.as_posix(), model, **data)
        yield from _files(_saved(model, slim.with_suffix(".refit.onnx")))
        model = onnxsim.recover_batch_norm(model, target_model=dense.as_posix(), **data)
        yield from _files(_saved(model, slim.with_suffix(".batchnorm.onnx")))
    except FAILURES as error:
        print(f"onnxsim's repairs of {slim.name}: {_line(error)}")


def _files(made: Path | Refused) -> Iterator[Path]:
    if isinstance(made, Path):
        yield made


def _saved(model: onnx.ModelProto, path: Path) -> Path | Refused:
    """Writes the file and runs it once, on zeros."""
    onnx.save(model, path)
    try:
        session = runtime.open_session(path, "cpu")
        outputs = session.predict(np.zeros((2, *session.input.shape[1:]), np.float32))
    except FAILURES as error:
        return Refused(_line(error))
    return path if np.isfinite(outputs).all() else Refused("the pruned model's outputs are not finite")


def onnx_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one sample in convolutions and matrix products; equals `count_macs` of what was exported.

    Raises `ResultError` where a shape does not follow from the input's.
    """
    fixed = copy.deepcopy(model)
    del fixed.graph.value_info[:]
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in graph.node:
        if node.op_type in SUMMED:
            left, right, output = (shapes.get(name, (0,)) for name in (*node.input[:2], node.output[0]))
            macs = math.prod(SUMMED[node.op_type](left, right, node)) * math.prod(output)
            if not macs:
                raise ResultError(f"no shape can be inferred for the {node.op_type} {node.name!r}")
            total += macs
    return total


def _gemm_sum(left: Shape, right: Shape, node: onnx.NodeProto) -> Shape:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return left[:1] if transposed else left[1:]


SUMMED = {
    "Conv": lambda left, right, node: right[1:],
    "MatMul": lambda left, right, node: left[-1:],
    "Gemm": _gemm_sum,
}
"""Operator -> the axes that one output is summed over, from the shapes of both inputs."""


def _line(error: Exception) -> str:
    """The error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
