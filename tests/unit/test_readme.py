"""What README and the guides in the rooms show works as it stands there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from models import plan_of, subject
from typer.testing import CliRunner

from pxcompress import cli, load, pipeline
from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import count_macs, count_params
from pxcompress.errors import InputError
from pxcompress.graph import prune
from pxcompress.recipe import Recipe
from pxcompress.registry import Registry
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.tasks import TASKS

ROOT = Path(__file__).parents[2]
GUIDES = (
    "README.md",
    *(
        f"pxcompress/{name}.md"
        for name in ("ARCHITECTURE", "scorers/README", "budgets/README", "repair/README", "tasks/README")
    ),
)
[MODULE], [SEGMENTER], [SCORER], [BUDGET], [REPAIR], [TASK] = (
    re.findall(r"```python\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL) for guide in GUIDES
)


def test_the_module_example_prints_a_slim_model(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        exec(compile(MODULE, "README", "exec"), {})
    printed = capsys.readouterr().out
    assert "Conv2d(64, 64" not in printed
    assert "out_features=10" in printed


def test_the_example_with_two_inputs_keeps_its_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        exec(compile(SEGMENTER, "README", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 5, 32, 32])\n"


def _registered(code: str, registry: Registry[Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Import a guide's example from a file of its own; the registry forgets it after the test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._all()))
    monkeypatch.syspath_prepend(folder)
    name = f"guide_{registry.kind}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    (folder / f"{name}.py").write_text(code)
    importlib.import_module(name)


def test_the_scorer_example_is_a_whole_scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _registered(SCORER, SCORERS, monkeypatch, tmp_path)
    net = subject("flatten_cnn")
    batches = [(net.inputs, torch.zeros(len(net.inputs), dtype=torch.int64))]
    scores, other = (
        SCORERS.build(f"relevance-norm:p=1,composite={rules}")(net.model, net.groups, batches)
        for rules in ("epsilon", "gamma")
    )
    assert not torch.equal(scores["conv1"], other["conv1"])
    assert {name: len(values) for name, values in scores.items()} == {group.name: group.units for group in net.groups}


def test_the_budget_example_is_a_whole_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _registered(BUDGET, BUDGETS, monkeypatch, tmp_path)
    assert Recipe("resnet50", 0.5, budget="energy:weight=3").label == "resnet50-guide_budget_Energy-0.50"
    net = subject("flatten_cnn")
    meter = BUDGETS.build("energy:weight=3").meter(net.model, net.groups, net.example)
    slim = prune(net.model, net.groups, plan_of({"conv1": (0, 1)})).model
    left = {"conv1": next(group.units for group in net.groups if group.name == "conv1") - 2}
    assert meter(left) == count_macs(slim, net.example) + 3 * count_params(slim)


def test_the_repair_example_is_a_whole_repair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _registered(REPAIR, REPAIRS, monkeypatch, tmp_path)
    assert Recipe("resnet50", 0.5, repair=("fold", "mean-logits")).repair == ("fold", "guide_repair:MeanLogits")
    net = subject("flatten_cnn")
    pruned = prune(net.model, net.groups, plan_of({"conv1": (0, 1)}))
    batches = [(inputs, torch.zeros(len(inputs), dtype=torch.int64)) for inputs in net.inputs.split(3)]
    slim = REPAIRS.build("mean-logits")(pruned, batches).model.eval()
    with torch.no_grad():
        torch.testing.assert_close(slim(net.inputs).mean(0), net.model(net.inputs).mean(0))


def test_the_task_example_is_a_whole_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _registered(TASK, TASKS, monkeypatch, tmp_path)
    task, outputs = TASKS.build("angle"), {"output": torch.tensor([[350.0], [90.0]])}
    statistics = task.statistics(outputs, torch.tensor([[10.0], [270.0]]), outputs)
    assert (task.quality(statistics), task.metric.format(task.quality(statistics))) == (100, "100")
    assert task.loss(statistics).tolist() == pytest.approx([1 / 9, 1])


def test_links_lead_to_files() -> None:
    for guide in (*GUIDES, "benchmarks/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / guide).read_text()):
            assert (ROOT / guide).parent.joinpath(target).is_file(), f"{guide}: {target}"


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_commands_that_guides_show_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `pxcompress run` line is parsed as far as the recipe that it stands for."""
    seen: list[Recipe] = []

    def work(recipe: Recipe, *args: object, **options: object) -> NoReturn:
        seen.append(recipe)
        raise InputError("seen")

    monkeypatch.setattr(pipeline, "compress_in_process", work)
    lines = [
        line.split("#")[0]
        for guide in GUIDES
        for line in re.findall(r"^    pxcompress (run .*)$", (ROOT / guide).read_text(), re.MULTILINE)
    ]
    for line in lines:
        result = CliRunner().invoke(cli.app, shlex.split(line))
        assert isinstance(result.exception, InputError), f"{line}: {result.output}"
    assert len(seen) == len(lines) > 5


def test_the_sample_in_the_repository_is_of_this_version() -> None:
    model = load(ROOT / "exported" / "sample")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
