"""A module of the user's own, pruned in memory, and saved as a run folder where that is wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from pxcompress.clock import Clock
from pxcompress.errors import InputError
from pxcompress.guard import name_failures
from pxcompress.models.adapter import Adapted, Adapter, Inputs, Logits, adapted, everything, released_
from pxcompress.models.rewrite import plain, unwrapped
from pxcompress.models.suited import check_suited
from pxcompress.notes import Note, silent
from pxcompress.passes.moments import Remembered
from pxcompress.passes.parts import HeldOut
from pxcompress.pipeline import aligned
from pxcompress.recipe import Pruning, Recipe
from pxcompress.recipe.model_and_data import IN_PYTHON
from pxcompress.repair import REPAIRS
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.stages import shrink
from pxcompress.state import device_of, seeded, without_checkpointing
from pxcompress.tasks.choice import build_task, start_logits
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, PruneResult

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleOptions(Pruning):
    """What `compress_module` takes beside a module, an example and batches: how it is pruned, and what outputs mean.

    A `task`, or its text such as "segmentation", says where relevance starts and how near two outputs are. Without it
    relevance starts at an output (n, classes); other outputs count with the largest value along axis 1 at every
    position, as a mean, summed over all outputs, unless `logits` makes (n, classes) or (n,) of them. By `held_out`
    batches, or else by a sixth of the samples, scores and repairs are chosen. `note` is told about progress.
    """

    task: Task | str | None = None
    logits: Logits | None = None
    held_out: Iterable[Any] | None = None
    note: Note = silent
    seed: int = 0

    def recipe_for(self, model: nn.Module) -> Recipe:
        """The recipe of the run that prunes `model`."""
        pruning = {field.name: getattr(self, field.name) for field in fields(Pruning)}
        return Recipe(model=type(model).__name__, data=IN_PYTHON, seed=self.seed, **pruning)

    def built_task(self) -> Task | None:
        """The task; None where none is given."""
        return build_task(self.task) if isinstance(self.task, str) else self.task


Door = Callable[Concatenate[nn.Module, Inputs, Iterable[Any], P], R]


def takes(options: Callable[P, O]) -> Callable[[Callable[[nn.Module, Inputs, Iterable[Any], O], R]], Door[P, R]]:
    """Decorator: the function's last parameter, a record of `options`, becomes one argument for each of its fields."""

    def decorate(function: Callable[[nn.Module, Inputs, Iterable[Any], O], R]) -> Door[P, R]:
        @wraps(function)
        def with_options(
            model: nn.Module, example: Inputs, batches: Iterable[Any], /, *args: P.args, **kwargs: P.kwargs
        ) -> R:
            return function(model, example, batches, options(*args, **kwargs))

        own = [*inspect.signature(function).parameters.values()][:-1]
        signature = inspect.Signature([*own, *inspect.signature(options).parameters.values()])
        with_options.__signature__ = signature  # type: ignore[attr-defined]
        return with_options

    return decorate


@takes(ModuleOptions)
def compress_module(model: nn.Module, example: Inputs, batches: Iterable[Any], options: ModuleOptions) -> PruneResult:
    """Prune and repair your own module in memory; `result.pruned.model` is the slim one, `model` is left as it was.

    `example` is one input, shape (1, ...), or a tuple or dict of them: the module is called as model(x),
    model(*inputs) or model(**inputs). `batches`, read several times, are inputs or (inputs, labels) and serve scoring
    and repair. What else may be said are the fields of `ModuleOptions`, as keywords:

        slim = compress_module(net, (image, sound), batches, 0.5, logits=lambda out: out["class"], budget="macs")

    Everything that comes out keeps its shape; `result.agreements` says how near outputs are to those of `model` on
    samples that nothing was fitted to. Raises `InputError` for what cannot be handled, before any work, else as
    `shrink` does.
    """
    with name_failures("compress_module"), torch.inference_mode(False), without_checkpointing():
        recipe = options.recipe_for(model)
        model = unwrapped(model)
        check_suited(model)
        task, logits = options.built_task(), options.logits
        if task is not None and logits is None and not isinstance(task, Classification):
            logits = start_logits(task)
        module = adapted(model, example, batches, logits)
        _check_answers(module, recipe)
        recipe = aligned(recipe, Clock(silent))
        with seeded(recipe.seed):
            ready = plain(module.model, lambda view: everything(view, module.example.to(device_of(view))))
            parts = _module_parts(module, ready, options.held_out)
            slim = shrink(ready, module.example, Run(recipe, parts, Clock(options.note), task))
    for each in (slim.pruned.model, slim.pruned.dense):
        released_(each)
    return slim


def _module_parts(module: Adapted, net: nn.Module, held_out: Iterable[Any] | None) -> dict[str, Batches]:
    """What to fit to, and what to choose by: `held_out`, or a part of the module's batches where they are enough."""
    fit: Batches = module.batches
    held: Batches = HeldOut(module.batches)
    if held_out is not None:
        held = module.packed(held_out)
    elif next(iter(held), None) is not None:
        fit = HeldOut(module.batches, others=True)
    remembered = Remembered(fit, net)
    parts: dict[str, Batches] = {"score": remembered, "repair": remembered}
    return parts if next(iter(held), None) is None else {**parts, "held-out": held}


def _check_answers(module: Adapted, pruning: Pruning) -> None:
    """Refuse what needs labels or logits that a user's module or batches do not have."""
    needs_labels = pruning.class_scores
    needs_labels |= any(SCORERS.build(text).target == "label" for text in pruning.scorers)
    if needs_labels and not module.labelled:
        raise InputError(
            f"scorer {pruning.scorer!r}, or class scores, need labels (n,) and logits (n, classes); give batches of "
            "(inputs, labels), logits=FUNCTION where the module returns something else, or take another scorer"
        )
    if isinstance(module.model, Adapter) and any(REPAIRS.build(text).phase == "train" for text in pruning.repair):
        raise InputError("repairs that train take a module with one input and logits (n, classes); leave out finetune")
