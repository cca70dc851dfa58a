"""Prunes a user's own module in memory, and saves it as a run folder on request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from pxcompress.clock import Clock
from pxcompress.deploy.runtime import check_provider
from pxcompress.errors import InputError
from pxcompress.guard import name_failures
from pxcompress.models.adapter import AdaptedModule, Adapter, Inputs, adapt_module, all_outputs, release_
from pxcompress.models.rewrite import rewrite_plain, unwrap
from pxcompress.models.signature import Logits
from pxcompress.models.suited import check_suited
from pxcompress.module_folder import AllBatches, ModuleData, workload_of
from pxcompress.notes import Note, silent
from pxcompress.passes.parts import HeldOut
from pxcompress.pipeline import prove, with_measured_alignment
from pxcompress.recipe import Pruning, Recipe
from pxcompress.recipe.model_and_data import IN_PYTHON
from pxcompress.repair import REPAIRS
from pxcompress.report.record import Report
from pxcompress.run import Run
from pxcompress.run_folder.place import whole_folder
from pxcompress.run_folder.written import check_dynamic_size, export
from pxcompress.scorers import SCORERS
from pxcompress.stages import prune_and_repair
from pxcompress.state import device_of, seeded, without_checkpointing
from pxcompress.tasks import TASKS
from pxcompress.tasks.choice import start_logits
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, Preprocessing, PruneResult

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleOptions(Pruning):
    """Options of `compress_module` besides module, example and batches: how to prune, and what outputs mean.

    A `task`, or its text such as "segmentation", says where relevance starts and how similar two outputs are. Without
    it relevance starts at an output (n, classes); other outputs count with the largest value along axis 1 at every
    position, as a mean, summed over all outputs, unless `logits` makes (n, classes) or (n,) of them. Scores and repairs
    are chosen on the `held_out` batches, or else on a sixth of the samples. `note` receives progress messages.
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

    def build_own_task(self) -> Task | None:
        """The user's task as an object; None if none is given."""
        return TASKS.build(self.task) if isinstance(self.task, str) else self.task

    @property
    def start(self) -> Logits | None:
        """The user's or task's function from outputs to logits.

        None if outputs are logits already, or nothing is given.
        """
        task = self.build_own_task()
        if self.logits is None and task is not None and not task.is_classifier:
            return start_logits(task)
        return self.logits


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleResult(PruneResult):
    """The result of `compress_module`: the slim module, how it came to be, and what it was made from.

    `run` has the recipe and the stages; `example`, `batches` and `options` are as they were given.
    """

    run: Run
    example: Inputs
    batches: Iterable[Any]
    options: ModuleOptions

    def save(
        self,
        folder: Path | str,
        test: Iterable[Any] | None = None,
        *,
        classes: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
        force: bool = False,
    ) -> Report:
        """Export and measure the slim and the dense module, and write a run folder as `compress` does.

        `test` are batches of (inputs, targets) that were used for no choice, with targets as the task reads them;
        without them the folder says that figures look too good. Models are judged by the task that `compress_module`
        was given; without one by top-1 if there are labels and logits (n, classes), else by their agreement. `classes`
        are names of a classifier's outputs; with a `preprocessing` of images the folder has predict.py. The modules'
        present weights are saved, so it may be trained further before. `pxcompress.load(folder, model)` loads the slim
        module again, given a module like the dense one.

        Several inputs, and whole numbers, keep their names and types in the ONNX files. Raises as `compress` does.
        """
        with name_failures("save"), torch.inference_mode(False), without_checkpointing():
            place, recipe = Path(folder), self.run.recipe
            check_provider(recipe.bench.provider)
            dense, small = self._adapt_both(test)
            slim = replace(self, pruned=replace(self.pruned, dense=dense.model, model=small.model))
            data = ModuleData(
                dense.example, self.batches, dense.signature, self.options.held_out, test, classes, preprocessing
            )
            workload = workload_of(slim.pruned.dense, self.options.build_own_task(), data)
            check_dynamic_size(recipe, workload)
            run = replace(self.run, recipe=recipe.but(task=TASKS.text(workload.task)), task=workload.task)
            with whole_folder(place, force) as building, seeded(recipe.seed):
                with run.clock.stage("export"):
                    files = export(building, run.recipe, workload, slim)
                return prove(place, workload, slim, files, run)

    def _adapt_both(self, test: Iterable[Any] | None) -> tuple[AdaptedModule, AdaptedModule]:
        """The dense and the slim module as all stages take them, whole-number inputs with the range of all batches."""
        batches = [each for each in (self.batches, self.options.held_out, test) if each is not None]
        dense, slim = (
            adapt_module(each, self.example, AllBatches(batches), self.options.start)
            for each in (self.pruned.dense, self.pruned.model)
        )
        return dense, slim


Door = Callable[Concatenate[nn.Module, Inputs, Iterable[Any], P], R]


def takes(options: Callable[P, O]) -> Callable[[Callable[[nn.Module, Inputs, Iterable[Any], O], R]], Door[P, R]]:
    """A decorator that turns the function's last parameter, a record of type `options`, into one argument for each
    field.
    """

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
def compress_module(model: nn.Module, example: Inputs, batches: Iterable[Any], options: ModuleOptions) -> ModuleResult:
    """Prune and repair your own module in memory; `result.pruned.model` is the slim one, `model` is left as it was.

    `example` is one input, shape (1, ...), or a tuple or dict of them: the module is called as model(x),
    model(*inputs) or model(**inputs). `batches`, read several times, are inputs or (inputs, labels) and serve scoring
    and repair. Further options are the fields of `ModuleOptions`, as keywords:

        slim = compress_module(net, (image, sound), batches, 0.5, logits=lambda out: out["class"], budget="macs")

    All outputs keep their shapes. `result.agreements` says how near outputs are to those of `model` on
    samples that nothing was fitted to; `result.save(folder)` writes a run folder. Raises `InputError` for what cannot
    be handled, before any work, else as `prune_and_repair` does.
    """
    with name_failures("compress_module"), torch.inference_mode(False), without_checkpointing():
        recipe = options.recipe_for(model)
        model = unwrap(model)
        check_suited(model)
        module = adapt_module(model, example, batches, options.start)
        _check_answers(module, recipe)
        recipe = with_measured_alignment(recipe, Clock(silent))
        with seeded(recipe.seed):
            ready = rewrite_plain(module.model, lambda view: all_outputs(view, module.example.to(device_of(view))))
            parts = _split_parts(module, options.held_out)
            run = Run(recipe, parts, Clock(options.note), options.build_own_task())
            slim = prune_and_repair(ready, module.example, run)
    for each in (slim.pruned.model, slim.pruned.dense):
        release_(each)
    values = {field.name: getattr(slim, field.name) for field in fields(PruneResult)}
    return ModuleResult(**values, run=replace(run, parts={}), example=example, batches=batches, options=options)


def _split_parts(module: AdaptedModule, held_out: Iterable[Any] | None) -> dict[str, Batches]:
    """Batches by role: those to fit to, and those to choose on, `held_out` or, if there are enough, a part of the
    module's.
    """
    fit: Batches = module.batches
    held_out_batches: Batches = HeldOut(module.batches)
    if held_out is not None:
        held_out_batches = module.pack(held_out)
    elif next(iter(held_out_batches), None) is not None:
        fit = HeldOut(module.batches, others=True)
    parts: dict[str, Batches] = {"score": fit, "repair": fit}
    return parts if next(iter(held_out_batches), None) is None else {**parts, "held-out": held_out_batches}


def _check_answers(module: AdaptedModule, pruning: Pruning) -> None:
    """Raise `InputError` for options that need labels or logits which the user's module or batches do not have."""
    needs_labels = pruning.class_scores or pruning.temperature_scaling
    needs_labels |= any(SCORERS.build(text).target == "label" for text in pruning.scorers)
    if needs_labels and not module.labelled:
        raise InputError(
            f"scorer {pruning.scorer!r}, class scores or temperature scaling need labels (n,) and logits (n, classes); "
            "give batches of (inputs, labels), logits=FUNCTION where the module returns something else, or leave it out"
        )
    for text in pruning.repair:
        if REPAIRS.build(text).needs_labels and (isinstance(module.model, Adapter) or not module.labelled):
            raise InputError(
                f"repair {text!r} takes a module with one input and logits (n, classes), and batches of (inputs, "
                "labels); leave the labels out"
            )
