"""Data that are no images: the cubist spiral and sequences with planted motifs, from the data to the run folder."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Px, one_line
from safetensors.torch import save_file

from pxcompress import load
from pxcompress.data import load_splits, open_source
from pxcompress.demo.dna import CLASSES, ERRORS, LENGTH, LETTERS, MOTIFS, PAIRS, dna_arrays, dna_sample
from pxcompress.demo.spiral import POINTS, spiral_arrays
from pxcompress.errors import DataError, ModelError
from pxcompress.models.loading import load_model
from pxcompress.types import Preprocessing

TINY_DNA = "dna:train=192,select=24,held_out=96"
NETS = {"spiral": "pxcompress.demo.nets:spiral_mlp", TINY_DNA: "pxcompress.demo.nets:dna_cnn"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_spiral_is_the_papers() -> None:
    """Against a slow walk along the polyline, from the formula."""
    points, labels = spiral_arrays()
    walked = np.array([_walked(sign, step) for sign in (-1, 1) for step in range(0, POINTS, 199)])
    assert (points.shape, points.dtype) == ((2 * POINTS, 2), np.float32)
    assert np.bincount(labels).tolist() == [POINTS, POINTS]
    assert np.allclose([points.mean(0), points.std(0)], [[0, 0], [1, 1]], atol=1e-5)
    ours = np.concatenate([points[labels == label][::199] for label in (0, 1)]).astype(float)
    for axis in (0, 1):  # standardised: the same line but for its scale and its place
        scale, offset = np.polyfit(walked[:, axis], ours[:, axis], 1)
        assert np.abs(scale * walked[:, axis] + offset - ours[:, axis]).max() < 1e-5
        assert scale > 0


def _walked(sign: int, step: int) -> tuple[float, float]:
    """The point after `step` of the equal steps along one class's polyline."""
    angles = [math.pi + place * 4 * math.pi / 16 + 0.4 * math.pi for place in range(17)]
    radii = [10 * angle + math.pi + 15 * sign for angle in angles]
    corners = [
        (radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)
    ]
    left = sum(math.dist(*piece) for piece in pairwise(corners)) * step / (POINTS - 1)
    for start, end in pairwise(corners):
        length = math.dist(start, end)
        if left <= length:
            break
        left -= length
    return tuple(a + (b - a) * left / length for a, b in zip(start, end, strict=True))


def test_dna_is_repeatable_and_its_motifs_are_where_it_says() -> None:
    letters, labels = dna_arrays("train", 60)
    again, _ = dna_arrays("train", 12)
    assert np.array_equal(letters[:12], again)
    assert not np.array_equal(letters[:12], dna_arrays("train", 12, seed=1)[0])
    assert not np.array_equal(letters[:12], dna_arrays("held-out", 12)[0])
    assert (letters.sum(1) == 1).all()
    source = open_source(TINY_DNA)
    wrong = 0
    for index in range(60):
        mask = source.mask(f"dna/train/{index}")
        assert np.array_equal(mask, dna_sample("train", index)[1])
        assert mask.shape == (LENGTH,)
        places = np.flatnonzero(mask)
        assert len(places) == 20
        texts = [
            "".join(LETTERS[letter] for letter in letters[index].argmax(0)[part]) for part in (places[:10], places[10:])
        ]
        pair = [MOTIFS[motif] for motif in PAIRS[labels[index]]]
        assert CLASSES[labels[index]] == "+".join(pair)
        wrong += min(
            sum(a != b for motif, text in zip(order, texts, strict=True) for a, b in zip(motif, text, strict=True))
            for order in (pair, pair[::-1])
        )
    assert wrong / (60 * 20) == pytest.approx(0.75 * ERRORS, abs=0.03)


@pytest.mark.parametrize(("spec", "shape"), [("spiral", (2,)), (TINY_DNA, (4, LENGTH))])
def test_numbers_reach_the_model_as_they_are(spec: str, shape: tuple[int, ...]) -> None:
    source = open_source(spec)
    assert source.native_size == shape
    splits = load_splits(source, Preprocessing(shape), batch_size=16)
    assert splits.example.shape == (1, *shape)
    pools = {sample: (pool, place) for pool in (source.train, source.held_out) for place, sample in enumerate(pool.ids)}
    for role in ("score", "test"):
        inputs = torch.cat([inputs for inputs, _ in getattr(splits, role)])
        assert inputs.dtype == torch.float32
        for row, sample in zip(inputs[:5], splits.ids[role], strict=False):
            pool, place = pools[sample]
            assert np.array_equal(row, pool.read.values[pool.positions[place]])


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match="shape 2, the model takes 3"):
        load_splits(open_source("spiral"), Preprocessing((3,)))
    with pytest.raises(DataError, match="takes inputs of shape 4x200, the data are images"):
        load_splits(open_source("digits"), Preprocessing((4, 200)))
    with pytest.raises(ModelError, match="shape 2, no images"):
        load_model(NETS["spiral"], classes=None, input_size=32)
    with pytest.raises(ModelError, match=r"does not run on a 4x200 input.*give other data"):
        load_model("resnet18", classes=6, input_size=(4, 200))


def test_a_net_of_ones_own_needs_no_word_about_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a checkpoint, for which the classifier is sought before anything has run."""
    (tmp_path / "own_sequence_net.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv1d(4, 5, 7), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(5, 6))\n"
    )
    monkeypatch.chdir(tmp_path)
    size = (4, LENGTH)
    made = load_model("own_sequence_net:net", classes=6, input_size=size, device="cpu")
    save_file(made.model.state_dict(), tmp_path / "net.safetensors")
    loaded = load_model(
        "own_sequence_net:net", classes=6, input_size=size, checkpoint=tmp_path / "net.safetensors", device="cpu"
    )
    assert loaded.weights == "checkpoint"
    assert loaded.preprocessing == Preprocessing(size)
    assert torch.equal(loaded.model(torch.ones(1, *size)), made.model(torch.ones(1, *size)))


def test_command_says_what_does_not_fit(px: Px) -> None:
    def refused(*args: str) -> str:
        return one_line(px("run", "--ratio", "0.5", "--quiet", *args))

    assert "leave it out" in refused("--model", NETS["spiral"], "--data", "spiral", "--input-size", "32")
    assert "no images" in refused("--model", NETS["spiral"], "--data", "digits")
    assert "give other data" in refused("--model", "resnet18", "--data", "spiral")
    assert "has no options" in refused("--model", NETS["spiral"], "--data", "spiral:train=3")
    assert "did you mean train" in refused("--model", NETS[TINY_DNA], "--data", "dna:trian=3")


@pytest.mark.parametrize(("spec", "words"), [("spiral", "MACs at 2, 2 classes"), (TINY_DNA, "at 4 x 200, 6 classes")])
def test_inspect_needs_no_data(px: Px, spec: str, words: str) -> None:
    shown = px("inspect", "--model", NETS[spec], "--relevance")
    assert shown.code == 0
    assert words in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("spec", list(NETS))
def test_run_bench_and_load(px: Px, tmp_path: Path, spec: str) -> None:
    out = tmp_path / "run"
    ran = px("run", "--model", NETS[spec], "--data", spec, "--ratio", "0.5", "--out", out, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    shape = tuple(report["input_shape"])
    assert shape == ((2,) if spec == "spiral" else (4, LENGTH))
    assert report["parity"]["passed"]
    assert report["pruned"]["macs"] < 0.8 * report["dense"]["macs"]
    if spec == "spiral":
        assert report["pruned"]["quality"]["value"] > 0.99
    assert "pixels" not in " ".join(note["text"] for note in report["notes"])
    assert load(out)(torch.zeros(3, *shape)).shape == (3, len(report["data"]["classes"]))
    timed = px("bench", out, "--json")
    assert timed.code == 0, timed.err
    assert json.loads(timed.out)[0]["input_shape"] == [1, *shape]
