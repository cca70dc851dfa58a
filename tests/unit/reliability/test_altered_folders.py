"""Run folders that were altered, moved to where nothing can be written, or named like markup."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import Px, call_once, one_line
from odd_nets import MARKUP, TOO_MUCH
from onnx.external_data_helper import set_external_data
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import pxcompress
from pxcompress.deploy.export import artifact_of
from pxcompress.errors import InputError


@pytest.fixture(scope="module")
def made(run_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a certificate."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert call_once("run", *run_options, "--max-drop", 0.9, "--steps", 1, "--quiet", "--out", out).code == 0
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here, where nobody can write")
def test_where_nothing_can_be_written_one_line_says_so(px: Px, run_options: list[str], made: Path) -> None:
    place = "/proc/pxcompress"
    assert "cannot write" in one_line(px("run", *run_options, "--out", place, "--quiet"))
    assert "cannot write" in one_line(px("explain", made, "--samples", 2, "--out", place, "--quiet"))
    outcome = px("report", made, "--out", place)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


def test_nothing_is_added_to_a_run_folder(px: Px, images: Path, folder: Path) -> None:
    """Its files would no longer be those that it has digests of, and `verify` and `explain` would refuse it."""
    shutil.copytree(folder, folder.with_name("other"))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for words in (
        ("certify", folder, "--data", images, "--max-drop", 0.9, "--out", folder),
        ("report", folder, "--out", folder / "report.html", "--force"),
        ("report", folder, "--figures", folder),
        ("explain", folder.with_name("other"), "--out", folder),
    ):
        assert "is a run folder" in one_line(px(*words))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_place_that_cannot_be_written_is_named_before_any_work(px: Px, images: Path, folder: Path) -> None:
    (folder.parent / "file").write_text("mine")
    place = folder.parent / "file" / "below"
    for words in (
        ("certify", folder, "--data", images, "--max-drop", 0.9, "--out", place),
        ("report", folder, "--out", place / "page.html"),
        ("report", folder, "--figures", place),
        ("explain", folder, "--out", place),
    ):
        assert "cannot write to" in one_line(px(*words))
    assert "is spent" not in px("certify", folder, "--data", images, "--max-drop", 0.9).out.partition("for 95 %")[2]


Edit = Callable[[Path], None]


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _weights(change: Callable[[dict[str, str], dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            facts, state = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(facts, state)
        save_file(state, path, facts)

    return edit


def _other_unit(plan: dict[str, Any]) -> None:
    removed = plan["removed"]["conv1"]
    removed[0] = next(unit for unit in range(8) if unit not in removed)


PLAN, WEIGHTS = "plan.json", "model.safetensors"


ALTERED: dict[str, Edit] = {
    "another unit": _json(PLAN, _other_unit),
    "one unit fewer": _json(PLAN, lambda plan: plan["removed"]["conv1"].pop()),
    "a unit that is not there": _json(PLAN, lambda plan: plan["removed"].update(conv1=[99])),
    "a path for a group": _json(PLAN, lambda plan: plan["removed"].update({"../../x": [0]})),
    "no text": _bytes(PLAN, lambda _: b"\xff\xfe"),
    "one bit": _bytes(WEIGHTS, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "half": _bytes(WEIGHTS, lambda content: content[: len(content) // 2]),
    "no facts": _weights(lambda facts, state: facts.clear()),
    "a function of Python": _weights(
        lambda facts, state: facts.update(architecture='{"name": "os:abort", "kwargs": {}}')
    ),
    "another shape": _weights(lambda facts, state: facts.update(input_shape="[3]")),
    "a shape without end": _weights(lambda facts, state: facts.update(input_shape=f"[{TOO_MUCH}]")),
    "a parameter fewer": _weights(lambda facts, state: state.pop("fc2.bias")),
    "a module more": _weights(lambda facts, state: state.update({"nothing.weight": torch.zeros(1)})),
}


SILENT = {"another unit", "one bit"}
"""What only the hash can tell."""


# --- altered files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALTERED)
def test_altered_plans_and_weights_are_refused(px: Px, folder: Path, name: str) -> None:
    ALTERED[name](folder)
    with pytest.raises(InputError, match="is not the file that the run wrote"):
        pxcompress.load(folder)
    for command in ("explain", "report"):
        assert "is not the file that the run wrote" in one_line(px(command, folder))
    outcome = px("verify", folder, "--quiet")
    assert outcome.code == 3
    assert "is not the certified one" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    "edit",
    [
        _json("recipe.json", lambda recipe: recipe.update(seed=1)),
        _json("recipe.json", lambda recipe: recipe.update(data="../../elsewhere")),
        _bytes("model.onnx", lambda content: content + b"\x00"),
        _bytes("dense.onnx", lambda content: content[:-1]),
        _bytes("scores.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
    ids=["seed", "data", "model", "dense", "scores"],
)
def test_altered_recipes_and_other_files_are_refused(px: Px, folder: Path, edit: Edit) -> None:
    edit(folder)
    for command in ("explain", "report"):
        assert "is not the file that the run wrote" in one_line(px(command, folder))


@pytest.mark.parametrize("name", sorted(ALTERED.keys() - SILENT))
def test_they_are_refused_with_the_right_hash_too(folder: Path, name: str) -> None:
    ALTERED[name](folder)
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (PLAN, WEIGHTS)}
    _json("report.json", lambda report: report["sha256"].update(hashes))(folder)
    with pytest.raises(InputError) as caught:
        pxcompress.load(folder)
    assert "\n" not in str(caught.value)


def test_the_whole_folder_is_hashed_and_readable(made: Path) -> None:
    recorded = json.loads((made / "report.json").read_text())["sha256"]
    later = {"report.json", "report.html", "predict.py", "SHA256SUMS"}
    assert recorded.keys() == {path.name for path in made.iterdir()} - later
    for name, digest in recorded.items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    assert len({path.stat().st_mode for path in made.iterdir()}) == 1


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"schema_version": 1, "sha256": []}'])
def test_a_report_that_is_none_is_refused(px: Px, folder: Path, text: bytes) -> None:
    (folder / "report.json").write_bytes(text)
    assert "report" in one_line(px("report", folder))


def test_names_of_files_stay_in_the_folder(px: Px, folder: Path) -> None:
    _json("report.json", lambda report: report["sha256"].update({"../secret": "0"}))(folder)
    assert "is not in the folder" in one_line(px("report", folder))
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    set_external_data(tensor, "../secret")
    tensor.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not beside it"):
        artifact_of(folder / "model.onnx")


class Attributes(HTMLParser):
    """All attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


# --- names that look like markup --------------------------------------------------------------------------------------


def test_class_names_are_no_markup(px: Px, folder: Path, tmp_path: Path) -> None:
    assert px("explain", folder, "--samples", 24, "--quiet").code == 0
    assert px("report", folder, "--out", tmp_path / "page.html").code == 0
    for page in (folder / "report.html", tmp_path / "page.html"):
        attributes = Attributes(page.read_text())
        assert "onerror" not in attributes.names
    assert MARKUP in Attributes((folder / "report.html").read_text()).words
