"""What the command line prints: help, the parts of inspect, progress, and lines on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from command import Px

from pxcompress.commands.terminal import notes, show
from pxcompress.notes import Message, begin
from pxcompress.passes.parts import watch_batches
from pxcompress.recipe import Bench, Guarantee, Recipe


def test_a_closed_stdout_ends_no_command(px: Px, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    assert (px("methods").code, sys.stdout.name) == (0, os.devnull)
    sys.stdout.close()


def test_letters_that_a_terminal_lacks_end_no_command(px: Px, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert px("methods").code == 0
    stream.write("caf\u00e9\n")
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"caf?\n")  # type: ignore[attr-defined]


def test_inspect_needs_no_data(px: Px) -> None:
    outcome = px("inspect", "--model", "resnet18", "--input-size", 32, "--json")
    assert outcome.code == 0
    survey = json.loads(outcome.out)
    assert {group["kind"] for group in survey["groups"]} == {"channel"}
    assert [layer["name"] for layer in survey["fixed"]] == ["fc"]
    table = px("inspect", "--model", "resnet18", "--input-size", 32).out
    assert all(group["name"] in table for group in survey["groups"])
    assert outcome.err == ""


def test_inspect_names_every_layer_and_says_what_shares_are_of(px: Px) -> None:
    """Each layer is in a group or stays with a reason, those that only add to a stream included."""
    told = px("inspect", "--model", "vit_tiny_patch16_224", "--input-size", 32)
    assert "add up to more than 100 %" in told.out
    assert "stays whole: 1 layer (outputs in brackets); all others are in groups" in told.out
    assert all(len(line) <= 80 for line in told.out.splitlines()[1:])
    assert "head (1000)" in told.out.partition("stays whole")[2]
    told = px("inspect", "--model", "convnext_atto", "--input-size", 32)
    assert "stays whole: 29 layers (outputs in brackets); all others are in groups" in told.out
    for name in ("stem.0", "stages.3.downsample.1", "stages.0.blocks.1.mlp.fc2", "head.fc (1000)"):
        assert name in told.out.partition("stays whole")[2]


@pytest.mark.parametrize("data", [(), ("--relevance", "--data", "digits")])
def test_inspect_reads_its_task_with_data_and_without(px: Px, data: tuple[str, ...]) -> None:
    outcome = px("inspect", "--model", "resnet10t", "--input-size", 32, "--task", "segmentatoin", *data)
    assert outcome.code == 2
    assert "did you mean segmentation?" in outcome.err


def test_results_are_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    line = "a [b]line[/b] :smile: that is " + "longer than the terminal " * 3 + "/a/path/model.onnx"
    for stream, broken in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        show(line)
        shown = stream.getvalue()
        assert (max(map(len, shown.splitlines())) <= 40) == broken
        assert shown.split() == line.split()


def test_progress_leaves_a_terminal_as_it_was() -> None:
    """Nothing of the live line stands beside the result, the cursor is there again, NO_COLOR is obeyed."""
    script = "from pxcompress.commands.terminal import notes, show\nfrom pxcompress.notes import Message, begin\n"
    script += (
        "note = notes(False); note(begin('prune [x]')); note(Message('prune: 0.1 s', 'end')); note(begin('fold'))\n"
    )
    script += "note(Message('2 of 3 batches', 'count', 2, 3)); note('epoch [1]'); note(Message('fold: 1 s', 'end'))\n"
    script += "note('fold: top-1 90%'); show('table'); note(begin('half'))"
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    process, terminal = pty.fork()
    if not process:
        os.execve(sys.executable, [sys.executable, "-c", script], environment)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 65536):
            shown += part
    os.waitpid(process, 0)
    text = shown.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 3
    assert "\x1b[3" not in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r(?!\n)", "", text)
    assert "\ntable\r\n" in plain
    assert all(f"{line}\r\n" in plain for line in ("prune: 0.1 s", "epoch [1]", "fold: 1 s", "fold: top-1 90%"))
    assert "prune [x] ..." in plain
    assert "2 of 3 batches" not in plain  # a bar shows it


def test_long_passes_count_their_batches_for_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr("pxcompress.passes.parts.time.perf_counter", lambda: next(seconds))
    told: list[str] = []
    batches = [(torch.zeros(1), torch.zeros(1))] * 4
    seen = watch_batches({"score": batches, "endless": iter(())}, told.append)
    for _ in range(2):
        assert list(seen["score"]) == batches
    assert told == 2 * [f"{done} of 4 batches" for done in (1, 2, 3)]
    counts = [message for message in told if isinstance(message, Message)]
    assert [(each.kind, each.done, each.total) for each in counts] == 2 * [("count", done, 4) for done in (1, 2, 3)]
    note = notes(quiet=False)
    for message in (begin("score"), *told, Message("score: 8.0 s", "end")):
        note(message)
    assert capsys.readouterr().err.splitlines() == ["score ...", "score: 8.0 s"]


def test_inspect_tells_what_takes_long(px: Px) -> None:
    outcome = px("inspect", "--model", "models:AnyClasses", "--input-size", 16, "--latency", "--provider", "cpu")
    assert outcome.code == 0
    assert "time operators" in outcome.err


def test_methods_lists_what_can_be_asked_for(px: Px) -> None:
    listed = px("methods").out
    assert all(name in listed for name in ("lrp", "magnitude", "random", "macs", "fold", "batchnorm", "ridge"))


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_loads_no_heavy_library(words: list[str]) -> None:
    code = f"import sys; from pxcompress.cli import app; app({words}, standalone_mode=False); "
    code += "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heavy = {"numpy", "onnx", "onnxruntime", "optuna", "pandas", "scipy", "timm", "torch", "torchvision", "zennit"}
    assert not heavy & set(done.stderr.split())


def test_help_shows_first_what_most_people_need(px: Px) -> None:
    panels = _panels(px("run", "--help").out)
    assert list(panels) == [
        "Options",
        "goal",
        "scoring",
        "repair",
        "input",
        "guarantee",
        "export",
        "measuring",
        "expert",
    ]
    assert len(panels["Options"]) <= 12
    assert {"--model", "--data", "--checkpoint", "--ratio", "--budget", "--out"} <= set(panels["Options"])
    listed = [option for options in panels.values() for option in options]
    fields = sum(len(dataclasses.fields(part)) for part in (Recipe, Bench, Guarantee)) - 2  # the two parts themselves
    assert (
        len(listed) == len(set(listed)) == fields + len(["--out", "--config", "--force", "--quiet", "--json", "--help"])
    )
    assert list(_panels(px("doctor", "--help").out)) == ["Options"]


def _panels(help: str) -> dict[str, list[str]]:
    """First flag of every option of a command's help, by the title of its panel."""
    panels: dict[str, list[str]] = {}
    for line in help.splitlines():
        if re.fullmatch(r"(Options|[a-z]+):", line):
            panels[line[:-1]] = []
        elif flag := re.match(r"  (--[a-z-]+)", line):
            panels[list(panels)[-1]].append(flag[1])
    return panels
