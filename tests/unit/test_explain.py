"""`pxcompress explain` on the run folder of a tiny trained model: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Px, call_once, check_sums, image_folder, one_line
from models import CLASSES, FlattenCNN
from PIL import Image
from safetensors.torch import save_file

from pxcompress.demo.dna import LENGTH, LETTERS, dna_sample
from pxcompress.demo.nets import dna_cnn
from pxcompress.errors import InputError
from pxcompress.explain.cases import _color_line
from pxcompress.explain.compare import ExplanationRequest, explain
from pxcompress.explain.folder import write
from pxcompress.pipeline import compress
from pxcompress.recipe import Recipe
from pxcompress.report import to_html
from pxcompress.report.build import check_files, read_report, sha256_of
from pxcompress.report.explanation import TARGET_COLOUR, format_explanation
from pxcompress.report.heatmap_figures import draw_line
from pxcompress.run_folder.saved import load_pruned
from pxcompress.state import seeded

SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), {"train": 12, "val": 12}, CLASSES, SIZE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def made(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--model", "models:FlattenCNN", "--data", images, "--checkpoint", weights, "--input-size", SIZE]
    options += ["--score", "lrp:composite=gamma", "--ratio", 0.5, "--round-to", 1, "--quiet", "--out", out]
    assert call_once("run", *options).code == 0
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_writes_page_record_and_figures(px: Px, folder: Path) -> None:
    result = px("explain", folder, "--samples", 20, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert all(len(line) <= 80 for line in result.out.splitlines()[:-1])
    assert result.out.splitlines()[-1] == str(folder / "report.html")
    assert not (folder / "explain.html").exists()
    record = json.loads((folder / "explain.json").read_text())
    cases = record["cases"]
    assert record["composite"] == "gamma"  # the scorer's
    rows = {row["kind"]: row for row in record["similarity"]}
    assert rows["all"]["samples"] == 20 == sum(row["samples"] for kind, row in rows.items() if kind != "all")
    files = sorted(path.name for path in (folder / "explain").iterdir())
    assert files == sorted(f"case-{n:02d}.{kind}" for n in range(1, len(cases) + 1) for kind in ("png", "svg"))
    with Image.open(folder / "explain" / "case-01.png") as picture:
        assert picture.width > picture.height
    text = (folder / "report.html").read_text()
    assert "Cases" in text
    assert to_html(read_report(folder)).partition("<footer")[0][-200:] in text  # what the run wrote is still there
    page = Page(text)
    pictures = [attributes for tag, attributes in page.found if tag == "img"]
    assert len(pictures) == sum(3 + (case["dense"]["name"] != case["pruned"]["name"]) for case in cases)
    assert all(each["alt"] and str(each["src"]).startswith("data:image/png;base64,") for each in pictures)
    assert text.isascii()
    assert "script" not in {tag for tag, _ in page.found}
    assert not re.search(r"https?://|url\(", text)
    check_files(folder, read_report(folder).sha256)
    check_sums(folder)
    again = px("explain", folder, "--samples", 1, "--json", "--quiet")  # what is left of the first call goes
    assert len(json.loads(again.out)["cases"]) == 1
    assert len(list((folder / "explain").iterdir())) == 2
    check_sums(folder)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_report_with_cases_renders_in_a_browser_without_a_complaint(folder: Path, tmp_path: Path) -> None:
    page = write(explain(folder, request=ExplanationRequest(samples=4)), folder)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    run = ["chromium", *options.split(), *more.split(), "--dump-dom", page.as_uri()]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert "What the removed units carried" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_what_it_says_is_what_the_models_say(made: Path) -> None:
    result = explain(made, request=ExplanationRequest(samples=8, composite="epsilon"))
    pruned = load_pruned(made)
    removed = {group.name: set(pruned.plan.removed.get(group.name, ())) for group in pruned.groups}
    for case in result.cases:
        assert len(case.units) == 6
        assert [unit.kept for unit in case.units] == [unit.unit not in removed[unit.layer] for unit in case.units]
        sizes = [unit.relevance for unit in case.units]
        assert sizes == sorted(sizes, reverse=True)
        assert case.pictures.image.shape == (SIZE, SIZE, 3)
        assert (case.pictures.own is None) == (case.dense.name == case.pruned.name)
    for layer in result.layers:
        assert layer.units - layer.kept == len(removed[layer.name])
        assert 0 <= layer.removed <= 1
        assert bool(layer.removed) == bool(removed[layer.name])


def test_images_of_any_size_and_mode(px: Px, folder: Path, tmp_path: Path) -> None:
    modes = {"grey.png": ("L", (40, 31)), "palette.gif": ("P", (16, 16)), "alpha.png": ("RGBA", (9, 120))}
    for name, (mode, size) in modes.items():
        Image.new(mode, size, 77).save(tmp_path / name)
    options = [word for name in modes for word in ("--image", tmp_path / name)]
    out = tmp_path / "elsewhere"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = px("explain", folder, *options, "--out", out, "--quiet")
    assert result.code == 0
    cases = json.loads((out / "explain.json").read_text())["cases"]
    assert [Path(case["sample"]).name for case in cases] == list(modes)
    assert {case["label"] for case in cases} == {None}
    assert (out / "explain.html").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pruned_relevance(made: Path) -> None:
    chosen = explain(made, request=ExplanationRequest("plrp-lambda", samples=6))
    share_given = explain(made, request=ExplanationRequest("plrp-lambda", samples=6, share=0.3))
    plain = explain(made, request=ExplanationRequest(samples=6))
    assert share_given.share == 0.3
    assert bool(chosen.notes) == (chosen.share == 0)  # it says so where nothing is pruned
    assert share_given.similarity[0].gini_dense > plain.similarity[0].gini_dense


def test_data_that_moved(px: Px, folder: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "moved")
    result = px("explain", folder, "--data", tmp_path / "moved", "--samples", 5, "--json", "--quiet")
    assert result.code == 0
    assert json.loads(result.out)["inputs"] == f"5 inputs of the test split of {tmp_path / 'moved'}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lrpx"], "unknown method 'lrpx'; did you mean lrp"),
        (["--composite", "nothing"], "unknown composite or rule 'nothing'"),
        (["--share", "0.2"], "share 0.2 has no effect on method 'lrp'"),
        (["--method", "plrp-m", "--share", "1"], "share of pruned relevance is 1.0; expected 0 or more"),
        (["--samples", "0"], "samples is 0; expected 1 or more"),
        (["--image", "a.png", "--samples", "3"], "--samples 3 has no effect beside --image"),
        (["--image", "missing.png"], "image 'missing.png' cannot be read"),
        (["--image", __file__], "cannot be read"),
        (["--data", "nowhere"], "unknown data 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(px: Px, made: Path, options: list[str], message: str) -> None:
    assert message in one_line(px("explain", made, *options, "--quiet"))
    assert not (made / "explain.json").exists()


def test_no_run_folder(px: Px, tmp_path: Path) -> None:
    assert "give a run folder" in one_line(px("explain", tmp_path, "--quiet"))


def test_dense_weights_that_are_gone_or_others(px: Px, folder: Path, weights: Path, tmp_path: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["checkpoint"] = str(tmp_path / "gone.safetensors")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert "recipe.json' is not the file that the run wrote" in one_line(px("explain", folder, "--quiet"))
    report = json.loads((folder / "report.json").read_text())
    report["sha256"]["recipe.json"] = sha256_of(folder / "recipe.json")  # as if it had been so from the start
    (folder / "report.json").write_text(json.dumps(report))
    assert "gone.safetensors" in one_line(px("explain", folder, "--quiet"))
    with seeded(2):
        save_file(FlattenCNN().state_dict(), tmp_path / "gone.safetensors")
    assert "the dense model of" in (message := one_line(px("explain", folder, "--quiet")))
    assert "is gone" in message
    (folder / "dense.onnx").unlink()
    assert "dense.onnx" in one_line(px("explain", folder, "--quiet"))


def test_report_json_that_was_altered(px: Px, folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text())
    content["dense"]["quality"]["value"] = 2
    (folder / "report.json").write_text(json.dumps(content))
    assert "dense.quality.value: expected a share from 0 to 1, not 2" in one_line(px("explain", folder, "--quiet"))
    content |= {"dense": content["pruned"], "certificate": {"chosen": 1}}
    (folder / "report.json").write_text(json.dumps(content))
    message = one_line(px("explain", folder, "--samples", 2, "--quiet"))
    assert "certificate.risk: it is missing" in message
    assert not (folder / "explain.json").exists()


def test_an_empty_list_of_images_is_refused(made: Path) -> None:
    with pytest.raises(InputError, match="no image is given"):
        explain(made, images=[])


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of an untrained net for sequences."""
    folder = tmp_path_factory.mktemp("sequences")
    with seeded(1):
        save_file(dna_cnn().state_dict(), folder / "dna.safetensors")
    data, weights = "dna:train=240,select=60,held_out=120", str(folder / "dna.safetensors")
    options = {"scorer": "magnitude", "round_to": 4, "repair": ("fold",)}
    compress(Recipe("pxcompress.demo.nets:dna_cnn", 0.5, data=data, checkpoint=weights, **options), folder / "run")
    return folder / "run"


def test_sequences_are_lines_of_letters(sequences: Path) -> None:
    result = explain(sequences, request=ExplanationRequest(samples=20))
    assert result.target_relevance is not None
    assert result.target_relevance.samples == 20
    assert result.target_relevance.covered == pytest.approx(0.1)  # two motifs of 10 letters among 200
    places = (
        result.target_relevance.mass_dense,
        result.target_relevance.mass_pruned,
        result.target_relevance.rank_dense,
        result.target_relevance.rank_pruned,
    )
    assert all(0 <= each <= 1 for each in places)
    for case in result.cases:
        sample = case.sample.split("/")
        letters, planted = dna_sample(sample[1], int(sample[2]))
        assert "".join(case.pictures.text) == "".join(LETTERS[row] for row in letters.argmax(0))
        assert ((case.pictures.image != 255).any(1) == planted).all()
        assert case.pictures.dense.shape == case.pictures.pruned.shape == (LENGTH,)
    text = format_explanation(result)
    assert "relevance where the data know" in text
    long = "net.encoder.layer.11.attention.self.query"
    text = format_explanation(replace(result, layers=(replace(result.layers[0], name=long),)))
    assert "\n...yer.11.attention.self.query  " in text  # the end tells it from others


def test_sequences_are_no_images(px: Px, sequences: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    message = one_line(px("explain", sequences, "--image", tmp_path / "a.png", "--quiet"))
    assert message.endswith("is given, the model takes inputs of shape 4x200; leave --image out")


def test_a_line_has_a_cell_for_every_position() -> None:
    colours = np.zeros((41, 3), np.uint8)
    picture = draw_line(colours, "")
    assert picture.shape == (2 * 28 + 8, 40 * 20, 3)
    assert (picture == 0).all(2).sum() == 41 * 20 * 28
    assert (draw_line(colours, "A" * 41) == 255).all(2).sum() > (picture == 255).all(2).sum()  # ink, white on black


def test_numbers_are_shades_of_grey() -> None:
    values = torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 4.0]])
    assert _color_line(values, None, "")[:, 0].tolist() == [0, 64, 255]
    assert _color_line(torch.tensor([3.0, 3.0]), None, "").tolist() == [[0, 0, 0]] * 2
    marked = _color_line(values, np.array([True, False, False]), "ACG").tolist()
    assert marked == [list(TARGET_COLOUR), [255] * 3, [255] * 3]
