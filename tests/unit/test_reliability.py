"""What can go wrong on a user's machine: killed runs, full disks, little memory, odd models and data, altered files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import Outcome, Px, call_once, image_folder, one_line
from filelock import FileLock
from models import CLASSES, FlattenCNN
from onnx.external_data_helper import set_external_data
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pxcompress
from pxcompress import Recipe, compress_module
from pxcompress.clock import Clock
from pxcompress.deploy.export import artifact_of
from pxcompress.errors import InputError, OutOfMemoryError
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.repair.batchnorm import BatchNormStatistics
from pxcompress.run import Run
from pxcompress.run_folder.place import whole_folder
from pxcompress.stages import prune_and_repair
from pxcompress.state import seeded
from pxcompress.types import Batches

SIZE = 16
MARKUP = '<img src=x onerror=alert(1)>&"'
TOO_MUCH = 1 << 55
"""Bytes that no machine has."""
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(place))
        yield place


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in which one class is called like markup."""
    root = image_folder(tmp_path_factory.mktemp("images"), {"train": 12, "val": 12}, CLASSES, SIZE)
    for part in root.iterdir():
        (part / "class0").rename(part / MARKUP)
    return root


@pytest.fixture(scope="module")
def asked(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run that takes little time."""
    weights = tmp_path_factory.mktemp("weights") / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
    options = ["--model", "models:FlattenCNN", "--data", str(images), "--checkpoint", str(weights), "--ratio", "0.5"]
    return [*options, "--input-size", str(SIZE), "--round-to", "1", "--score", "magnitude"]


@pytest.fixture(scope="module")
def made(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a certificate."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert call_once("run", *asked, "--max-drop", 0.9, "--steps", 1, "--quiet", "--out", out).code == 0
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


# --- killed, disk full, read-only -------------------------------------------------------------------------------------


def _started(*words: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PXCOMPRESS_CACHE": str(cache)}
    args = [sys.executable, "-m", "pxcompress", *words]
    return subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def _visible(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if not path.name.startswith(".")]


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(
    px: Px, asked: list[str], cache: Path, tmp_path: Path
) -> None:
    with _started("run", *asked, "--out", str(tmp_path / "run"), cache=cache) as process:
        assert process.stderr is not None
        assert any(line.startswith("score ") for line in process.stderr)
        process.kill()
    assert _visible(tmp_path) == []
    assert list(tmp_path.iterdir()) != []  # it was killed on its way
    assert px("run", *asked, "--out", tmp_path / "run", "--quiet").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert px("report", tmp_path / "run").code == 0


@pytest.mark.slow
def test_runs_killed_at_random_moments(px: Px, tmp_path: Path) -> None:
    """With a baseline that is trained and images that are made, and so with a cache that fills."""
    cache, out, rng = tmp_path / "cache", tmp_path / "runs" / "run", random.Random(0)
    words = [
        "run",
        "--model",
        "models:AnyClasses",
        "--data",
        "glyphs:train=640,select=80,held_out=160",
        "--ratio",
        "0.5",
    ]
    words += ["--round-to", "1", "--out", str(out), "--quiet"]
    begin = time.monotonic()
    with _started(*words, cache=cache) as process:
        assert process.wait() == 0
    whole = time.monotonic() - begin
    plan = (out / "plan.json").read_bytes()
    for kill in range(KILLS):
        if kill % 2:
            shutil.rmtree(out, ignore_errors=True)
        if kill % 5 == 0:
            shutil.rmtree(cache)
        with _started(*words, "--force", cache=cache) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, whole))
            process.kill()
        if out.exists():
            assert px("report", out).code == 0  # whole: the one before, or the new one
            assert (out / "plan.json").read_bytes() == plan
    with _started(*words, "--force", cache=cache) as process:
        _, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert (out / "plan.json").read_bytes() == plan
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_a_file_that_cannot_be_written_ends_a_run_in_one_line(px: Px, asked: list[str], tmp_path: Path) -> None:
    """A limit on the size of files, since a full disk takes rights to make one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        outcome = px("run", *asked, "--out", tmp_path / "run", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "nothing was written" in one_line(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no mounts of one's own on this machine",
)
@pytest.mark.parametrize("options", ["size=8k", "size=24k", "size=32k", "ro"])
def test_a_full_disk_and_a_read_only_one(asked: list[str], cache: Path, tmp_path: Path, options: str) -> None:
    words = [sys.executable, "-m", "pxcompress", "run", *asked, "--out", str(tmp_path / "run"), "--quiet"]
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    args = ["unshare", "-rm", "sh", "-c", script, str(tmp_path), *words]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here, where nobody can write")
def test_where_nothing_can_be_written_one_line_says_so(px: Px, asked: list[str], made: Path) -> None:
    place = "/proc/pxcompress"
    assert "cannot write" in one_line(px("run", *asked, "--out", place, "--quiet"))
    assert "cannot write" in one_line(px("explain", made, "--samples", 2, "--out", place, "--quiet"))
    outcome = px("report", made, "--out", place)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


# --- two at once ------------------------------------------------------------------------------------------------------


def test_the_second_run_into_a_place_is_refused(px: Px, asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with whole_folder(out, force=False) as building:
        (building / "recipe.json").write_text("{}")
        assert "another run is writing" in one_line(px("run", *asked, "--out", out, "--quiet"))
        with pytest.raises(InputError, match="another run is writing"), whole_folder(out, force=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in out.iterdir()] == ["recipe.json"]


def test_a_claim_that_is_made_while_another_ends_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends takes its own lock file away, never the one of whoever comes next."""
    place, release = tmp_path / "run", FileLock.release
    with ExitStack() as next_run:

        def release_and_let_the_next_one_in(lock: FileLock, force: bool = False) -> None:
            release(lock, force=force)
            monkeypatch.undo()
            next_run.enter_context(whole_folder(place, force=True))

        with whole_folder(place, force=False) as building:
            (building / "recipe.json").write_text("{}")
            monkeypatch.setattr(FileLock, "release", release_and_let_the_next_one_in)
        with pytest.raises(InputError, match="another run is writing"), whole_folder(place, force=True):
            pass


def test_a_run_that_ended_just_before_the_claim_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that was free when it was first looked at may be taken once this run has it to itself."""
    place, acquire = tmp_path / "run", FileLock.acquire

    def acquire_after_another_run(lock: FileLock) -> object:
        monkeypatch.undo()
        with whole_folder(place, force=False) as building:
            (building / "recipe.json").write_text("the first")
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", acquire_after_another_run)
    with pytest.raises(InputError, match="exists"), whole_folder(place, force=False):
        pass
    assert (place / "recipe.json").read_text() == "the first"


@pytest.mark.slow
def test_of_two_runs_at_once_one_wins(asked: list[str], cache: Path, tmp_path: Path) -> None:
    words = ["run", *asked, "--out", str(tmp_path / "run"), "--quiet"]
    both = [_started(*words, cache=cache) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert len("".join(said).splitlines()) == 1
    assert "another run" in "".join(said) or "exists" in "".join(said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- memory -----------------------------------------------------------------------------------------------------------


class Hungry(FlattenCNN):
    """Takes more memory than there is for more than five samples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 5:
            torch.empty(TOO_MUCH)
        return super().forward(x)


class Insatiable(FlattenCNN):
    """Takes more memory than there is for every image."""

    def forward(self, x: Tensor) -> Tensor:
        if x.any():
            torch.empty(TOO_MUCH)
        return super().forward(x)


def test_scoring_goes_on_in_smaller_batches() -> None:
    with seeded(0):
        hungry, inputs, labels = Hungry().eval(), torch.randn(24, 3, SIZE, SIZE), torch.randint(CLASSES, (24,))
    modest = FlattenCNN().eval()
    modest.load_state_dict(hungry.state_dict())
    options = {"ratio": 0.5, "round_to": 1, "scorer": "taylor", "repair": ()}
    slims = [compress_module(model, inputs[:1], [(inputs, labels)], **options) for model in (hungry, modest)]
    assert slims[0].pruned.plan.removed == slims[1].pruned.plan.removed
    for name, values in slims[1].scores.items():
        torch.testing.assert_close(slims[0].scores[name], values)


REPAIR = ("fold", "least-squares", "finetune:steps=3,batch_size=24,augment=false")


class Late(FlattenCNN):
    """Memory is short for batches of more than five, from the second call with them on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) > 5
        if self.calls > 1 and len(x) > 5:
            torch.empty(TOO_MUCH)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Hungry, Late])
def test_repairs_go_on_in_smaller_batches_and_a_failed_one_leaves_nothing(kind: type[FlattenCNN]) -> None:
    """The same weights come out as where batches were that small from the start."""
    with seeded(0):
        hungry, inputs, labels = kind().eval(), torch.randn(48, 3, SIZE, SIZE), torch.randint(CLASSES, (48,))
    modest = FlattenCNN().eval()
    modest.load_state_dict(hungry.state_dict())
    parts = {1: [(inputs[:24], labels[:24]), (inputs[24:], labels[24:])]}
    parts[8] = list(zip(inputs.split(3), labels.split(3), strict=True))
    small = (*REPAIR[:2], "finetune:steps=3,batch_size=3,accumulate=8,augment=false")
    options: dict[str, Any] = {"ratio": 0.5, "round_to": 1, "scorer": "magnitude"}
    told: list[str] = []
    slims = []
    for model, count, repair in ((hungry, 1, REPAIR), (modest, 8, small)):
        batches = dict.fromkeys(("score", "repair", "select"), parts[count])
        recipe = Recipe("mine", repair=repair, **options)
        with seeded(0):
            slims.append(prune_and_repair(model, inputs[:1], Run(recipe, batches, Clock(told.append, measures=False))))
    assert sum("trying again with batches of 3" in line for line in told) == len(REPAIR)
    first, second = (slim.pruned.model.state_dict() for slim in slims)
    assert first.keys() == second.keys()
    for name, values in second.items():
        torch.testing.assert_close(first[name], values, rtol=1e-4, atol=1e-5)


def test_a_repair_that_does_not_fit_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model, inputs, labels = FlattenCNN().eval(), torch.randn(24, 3, SIZE, SIZE), torch.randint(CLASSES, (24,))
    monkeypatch.setattr(BatchNormStatistics, "__call__", lambda *args: torch.empty(TOO_MUCH))
    options = {"ratio": 0.5, "round_to": 1, "scorer": "magnitude", "repair": ("batchnorm",)}
    with pytest.raises(OutOfMemoryError, match="stage 'batchnorm' ran out of memory") as caught:
        compress_module(model, inputs[:1], [(inputs, labels)], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fits", [1, 3, 8])
def test_batches_are_halved_until_they_fit(fits: int) -> None:
    batches = [(torch.arange(start, start + 8.0), torch.arange(start, start + 8)) for start in (0, 8)]
    said: list[str] = []

    def work(given: Batches) -> list[tuple[Tensor, Tensor]]:
        seen = []
        for inputs, labels in given:
            if len(inputs) > fits:
                torch.empty(TOO_MUCH)
            seen.append((inputs, labels))
        return seen

    parts = in_smaller_batches(work, batches, said.append)
    assert max(len(inputs) for inputs, _ in parts) == {1: 1, 3: 2, 8: 8}[fits]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), torch.arange(16.0))
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.arange(16))
    assert len(said) == {1: 3, 3: 2, 8: 0}[fits]


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def work(given: Batches) -> None:
        calls.append(given)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_smaller_batches(work, [(torch.zeros(8), torch.zeros(8))], print)
    assert len(calls) == 1


# --- odd models and data ----------------------------------------------------------------------------------------------


class Nan(FlattenCNN):
    """Zeros in, numbers out; anything else in, NaN out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum() * torch.inf * 0 if x.any() else super().forward(x)


class Constant(FlattenCNN):
    """Says the same of every input."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc2.weight)


class Nothing(FlattenCNN):
    """All weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Channels(nn.Module):
    """A network on images of one channel, or more."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (channels, SIZE, SIZE),
            "mean": (0.5,) * channels,
            "std": (0.5,) * channels,
        }
        self.conv1, self.conv2 = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


def four_channels() -> nn.Module:
    return Channels(4)


def five_channels() -> nn.Module:
    return Channels(5)


def _sweep(px: Px, model: str, data: Path, out: Path) -> Outcome:
    options = ["--data", data, "--input-size", SIZE, "--ratios", "0.5", "--round-to", 1, "--out", out, "--quiet"]
    return px("sweep", "--model", f"test_reliability:{model}", *options)


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("Nan", 2, "returns NaN or infinity for"),
        ("Insatiable", 3, "stage 'weights' ran out of memory"),
        ("five_channels", 2, "the model takes 5 channels; images have 1 (grey), 3 (RGB) or 4 (RGBA)"),
    ],
)
def test_models_that_cannot_be_used(px: Px, images: Path, tmp_path: Path, model: str, code: int, said: str) -> None:
    assert said in one_line(_sweep(px, model, images, tmp_path / "out"), code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["Constant", "Nothing", "Channels", "four_channels"])
def test_models_that_are_odd_but_work(px: Px, images: Path, tmp_path: Path, model: str) -> None:
    outcome = _sweep(px, model, images, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")


def test_data_as_people_have_them(px: Px, images: Path, tmp_path: Path) -> None:
    """Grey and transparent images, a large one, a class with one image in each half, and files that are no images."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for mode, label in (("L", 1), ("RGBA", 2)):
        for path in data.glob(f"*/class{label}/*.png"):
            with Image.open(path) as image:
                image.convert(mode).save(path)
    for path in data.glob("*/class3/*.png"):
        if path.name != "0.png":
            path.unlink()
    Image.new("1", (10_000, 9_000)).save(data / "train" / "class1" / "large.png")
    (data / "README.md").write_text("x")
    (data / "train" / "class1" / "Thumbs.db").write_bytes(b"\x00")
    (data / "train" / "class1" / "folder.png").mkdir()
    outcome = _sweep(px, "FlattenCNN", data, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    Image.new("1", (20_000, 10_000)).save(data / "train" / "class1" / "huge.png")
    line = one_line(_sweep(px, "FlattenCNN", data, tmp_path / "other"))
    assert "huge.png" in line
    assert "--skip-corrupt" in line


# --- altered files ----------------------------------------------------------------------------------------------------

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
    assert recorded.keys() == {path.name for path in made.iterdir()} - {"report.json", "report.html", "predict.py"}
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


# --- names that look like markup --------------------------------------------------------------------------------------


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


def test_class_names_are_no_markup(px: Px, folder: Path, tmp_path: Path) -> None:
    assert px("explain", folder, "--samples", 24, "--quiet").code == 0
    assert px("report", folder, "--out", tmp_path / "page.html").code == 0
    for page in (folder / "report.html", tmp_path / "page.html"):
        found = Attributes(page.read_text())
        assert "onerror" not in found.names
    assert MARKUP in Attributes((folder / "report.html").read_text()).words
