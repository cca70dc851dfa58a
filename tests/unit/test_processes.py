"""Two processes do what one does; one that is left alone says so instead of waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from command import image_folder
from models import CLASSES, FlattenCNN
from safetensors.torch import save_file

from pxcompress import processes
from pxcompress.report.build import read_report
from pxcompress.state import seeded

COMMAND = "from pxcompress.cli import main; main()"

SCRIPT = """
import json, sys
import torch
from models import subject

from pxcompress.stages import prune_and_repair
from pxcompress.processes import is_first, join_processes, mean_gradients_, rank, share_parts
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.state import seeded

known = subject("resnet_basic")
with seeded(0):
    batches = [(torch.randn(6, *known.inputs.shape[1:]), torch.randint(5, (6,))) for _ in range(4)]
results = {}
with join_processes():
    parts = share_parts({"score": batches, "repair": batches, "select": batches})
    for scorer in sys.argv[2].split(";"):
        recipe = Recipe("x", 0.5, scorer=scorer, round_to=1, repair=tuple(sys.argv[3].split(";")))
        with seeded(0):
            slim = prune_and_repair(known.model, known.example, Run(recipe, parts)).pruned
        with torch.no_grad():
            results[scorer] = [slim.plan.removed, slim.model(known.inputs).tolist()]
    layer = torch.nn.Linear(1, 1)
    layer.weight.grad = torch.full((1, 1), float(1 + 2 * rank()))
    mean_gradients_(layer)
    results["gradient"], results["none"] = layer.weight.grad.item(), layer.bias.grad is None
    if is_first():
        print(json.dumps(results))
    if rank() == int(sys.argv[1]):
        raise SystemExit(7)
    share_parts({"again": batches})
    if int(sys.argv[1]) >= 0:
        from pxcompress.processes import sum_over_processes
        sum_over_processes(torch.ones(1))
"""


def _job() -> dict[str, str]:
    """What a launcher puts into the environment of two processes, beside RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}


def _start(job: dict[str, str], rank: int, *arguments: str, script: str = SCRIPT) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "RANK": str(rank)}
    words = [sys.executable, "-c", script, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env={**os.environ, **job, **own}, stdout=pipe, stderr=pipe, text=True)


def _start_both(*arguments: str, script: str = SCRIPT) -> list[subprocess.Popen[str]]:
    job = _job()
    return [_start(job, rank, *arguments, script=script) for rank in (0, 1)]


SCORERS = "lrp-residual;taylor"
REPAIRS = "fold;least-squares;batchnorm"


def test_two_processes_make_the_plan_and_the_model_of_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _job()
    second = _start(job, 1, "-1", SCORERS, REPAIRS)
    monkeypatch.setattr(sys, "argv", ["", "-1", SCORERS, REPAIRS])
    exec(SCRIPT, {})
    one = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=120))
    for name, value in {**job, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    exec(SCRIPT, {})
    two = json.loads(capsys.readouterr().out)
    nothing, other = second.communicate(timeout=120)
    assert (second.returncode, nothing) == (0, ""), other
    assert (one["gradient"], two["gradient"], two["none"]) == (1, (1 + 3) / 2, True)
    for scorer in SCORERS.split(";"):
        assert two[scorer][0] == one[scorer][0]
        torch.testing.assert_close(torch.tensor(two[scorer][1]), torch.tensor(one[scorer][1]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_left_alone_ends_with_one_line(lost: int) -> None:
    processes = _start_both(str(lost), "magnitude", "batchnorm")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert processes[lost].returncode == 7
    assert processes[1 - lost].returncode == 1
    assert f"ProcessError: process {1 - lost} has lost another process" in outputs[1 - lost][1]


def test_alone_nothing_has_an_effect() -> None:
    parts = {"score": [(torch.zeros(1), torch.zeros(1))]}
    with processes.join_processes():
        assert (processes.rank(), processes.processes(), processes.is_first()) == (0, 1, True)
        assert processes.share_parts(parts) == parts
        value = torch.ones(3)
        assert processes.sum_over_processes(value) is value
        assert processes.from_first("plan") == "plan"


@pytest.mark.slow
def test_processes_fine_tune_one_model_together() -> None:
    """With the same weights in the end: the first process's outputs are not worse than before, and nobody hangs."""
    first, second = _start_both("-1", "magnitude", "fold;finetune:steps=4,batch_size=4")
    output, complaint = first.communicate(timeout=120)
    _, other = second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), complaint + other
    assert torch.tensor(json.loads(output)["magnitude"][1]).isfinite().all()


@pytest.mark.slow
def test_a_run_in_two_processes_is_one_run(tmp_path: Path) -> None:
    """The first one writes the folder and prints, the other says nothing; what is wrong is said before any work."""
    images = image_folder(tmp_path / "images", {"train": 60, "val": 110}, CLASSES, 16)
    with seeded(1):
        save_file(FlattenCNN().state_dict(), tmp_path / "net.safetensors")
    words = ["run", "--model", "models:FlattenCNN", "--data", images, "--checkpoint", tmp_path / "net.safetensors"]
    words += ["--input-size", 16, "--score", "magnitude", "--repair", "fold", "--round-to", 1, "--ratio", 0.4]
    processes = _start_both(*map(str, [*words, "--out", tmp_path / "run"]), script=COMMAND)
    (table, told), (nothing, silence) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], told + silence
    assert (nothing, silence) == ("", "")
    assert "removed" in table
    assert read_report(tmp_path / "run").parity.passed
    again = _start_both(*map(str, [*words, "--max-drop", 0.1, "--out", tmp_path / "other"]), script=COMMAND)
    complaints = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [2, 2]
    assert all("in 2 processes; run it in one" in each for each in complaints)
