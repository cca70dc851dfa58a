"""Samples that served before: counted, left out, and known again in data that have grown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from certified import PREPROCESSING, SIZE, draw_roles, read_certificate
from command import Outcome, Px, image_folder, one_line
from models import CLASSES
from PIL import Image

from pxcompress.certify.used import FILE, Use, add_use, count_seen_elsewhere
from pxcompress.data import load_splits, open_source
from pxcompress.data.samples import USER_LIMITS
from pxcompress.errors import InputError


def test_the_record_tells_data_apart_and_says_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    assert [add_use("digits", "split", "ABC", Use(text)) for text in ("a", "a", "b", "c", "b")] == [0, 0, 1, 2, 2]
    assert add_use("glyphs", "split", "DE", Use("a")) == add_use("digits", "other", "F", Use("a")) == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    (tmp_path / FILE).write_text("[")
    with pytest.raises(InputError, match="damaged"):
        add_use("digits", "split", "ABC", Use("a"))


def test_the_record_knows_samples_again_in_data_that_have_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a certificate has looked at counts, wherever the samples are now."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    assert add_use("monday", "split", "ABCDEF", Use("first", 0, 3)) == 0
    assert count_seen_elsewhere("tuesday", "grown", "FEDCBAGH") == 3
    assert count_seen_elsewhere("tuesday", "grown", "FEDGH") == 0
    assert count_seen_elsewhere("monday", "split", "ABCDEF") == 0, "what is left of a split is told by its own uses"
    assert add_use("tuesday", "grown", "FEDGHA", Use("second", 0, 5)) == 0
    assert add_use("tuesday", "grown", "FEDGHA", Use("third", 5, 6)) == 1
    (tmp_path / FILE).write_text(json.dumps({"old": ["hash"], "newer": [{"certificate": "hash", "begins": 2}]}))
    assert add_use("tuesday", "grown", "FEDGHA", Use("third")) == 0, "earlier versions kept no samples"


def test_data_that_have_grown_are_known_again(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name, too; what told something already is not looked at again in silence."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    command = ["certify", certified[0], "--max-drop", 0.6, "--anytime", "--quiet"]
    assert px(*command, "--out", tmp_path / "one").code == 0
    image_folder(tmp_path / "more", {"val": 10}, CLASSES, SIZE)
    shutil.copytree(images, tmp_path / "grown")
    for file in (tmp_path / "more").rglob("*.png"):
        pixels = 255 - np.asarray(Image.open(file))
        Image.fromarray(pixels).save(tmp_path / "grown" / "val" / file.parent.name / f"more-{file.name}")
    again = one_line(px(*command, "--data", tmp_path / "grown"))
    assert "samples served certificates before the data changed; to go on from one" in again
    assert "--resume FOLDER" in again
    resumed = ["certify", certified[0], "--data", tmp_path / "grown", "--resume", tmp_path / "one"]
    outcome = px(*resumed, "--out", tmp_path / "two", "--quiet")
    assert outcome.code == 0, outcome.err
    first, second = read_certificate(tmp_path / "one"), read_certificate(tmp_path / "two")
    assert second["looked_at"][: first["n"]] == first["looked_at"]
    assert "as the earlier certificate says" in px("verify", tmp_path / "two", "--quiet").out
    fixed = px("certify", certified[0], "--data", tmp_path / "grown", "--max-drop", 0.6, "--quiet")
    assert "their guarantee is spent" in fixed.out


def _grown(images: Path, root: Path) -> Path:
    """The images under other names, with as many more to hold out."""
    image_folder(root / "more", {"val": 30}, CLASSES, SIZE)
    for file in images.rglob("*.png"):
        place = root / "grown" / file.relative_to(images).parent
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"old-{file.name}")
    for file in (root / "more").rglob("*.png"):
        pixels = 255 - np.asarray(Image.open(file))
        Image.fromarray(pixels).save(root / "grown" / "val" / file.parent.name / file.name)
    return root / "grown"


def test_samples_that_served_in_another_role_are_never_certified_on(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that have grown are cut anew: whatever chose something before is known by its content, and left out."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    grown = _grown(images, tmp_path)
    served = {name for role, ids in draw_roles(images).items() if role != "certify" for name in ids}
    certify = draw_roles(grown)["certify"]
    fresh = [name for name in certify if name.replace("old-", "") not in served or "old-" not in name]
    assert 0 < len(fresh) < len(certify)
    command = ["certify", certified[0], "--data", grown, "--max-drop", 0.6]
    outcome = px(*command, "--out", tmp_path / "out")
    assert f"{len(certify) - len(fresh)} samples are left out: the runs of these models used them" in outcome.err
    assert read_certificate(tmp_path / "out")["reserved"] == len(fresh)
    assert px("verify", tmp_path / "out", "--quiet").code == (0 if read_certificate(tmp_path / "out")["chosen"] else 3)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dense.onnx", "model.onnx"):
        shutil.copy(certified[0] / name, bare)
    outcome = px("certify", bare / "dense.onnx", bare / "model.onnx", *command[2:], "--json")
    assert f"no served.txt in '{bare}'" in outcome.err
    assert json.loads(outcome.out)["reserved"] == len(certify)


def test_all_samples_of_new_data_are_certified_on(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of select; and where one image is not new, or the data have a half to train on, a share as in a run."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path, {"new": 20}, CLASSES, SIZE)
    for file in (tmp_path / "new").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    command = ["certify", certified[0], "--max-drop", 0.6, "--data", tmp_path / "new"]
    outcome = px(*command, "--out", tmp_path / "out")
    everything = 20 * CLASSES
    expected = everything - round(0.15 * everything) - 2
    assert f"seen none of these data, so that {expected} of {everything} samples certify" in outcome.err
    assert f"check it with pxcompress verify {tmp_path / 'out'}" in outcome.err
    assert "give --out FOLDER to keep it" in px(*command, "--json").err
    assert read_certificate(tmp_path / "out")["reserved"] == expected
    assert px("verify", tmp_path / "out", "--quiet").code == (0 if read_certificate(tmp_path / "out")["chosen"] else 3)
    share = len(draw_roles(tmp_path / "new")["certify"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dense.onnx", "model.onnx"):
        shutil.copy(certified[0] / name, bare)
    outcome = px("certify", bare / "dense.onnx", bare / "model.onnx", *command[2:], "--json")
    assert json.loads(outcome.out)["reserved"] == share, "nobody knows what chose these models"
    old = images / draw_roles(images)["score"][0]
    strange = next((tmp_path / "new").iterdir()) / "old.png"
    shutil.copy(old, strange)
    outcome = px(*command, "--json")
    assert abs(json.loads(outcome.out)["reserved"] - share) <= 1
    strange.unlink()
    for role in ("score", "repair"):  # an old image that no role of the draw has
        monkeypatch.setitem(USER_LIMITS, role, 2)
    ids = draw_roles(tmp_path / "new")
    unread = next(
        name for name in open_source(str(tmp_path / "new")).train.ids if name not in ids["score"] + ids["repair"]
    )
    shutil.move(tmp_path / "new" / unread, tmp_path / "aside.png")
    shutil.copy(old, tmp_path / "new" / unread)
    assert json.loads(px(*command, "--json").out)["reserved"] == len(ids["certify"])
    shutil.move(tmp_path / "aside.png", tmp_path / "new" / unread)
    halves = tmp_path / "halves"
    shutil.copytree(tmp_path / "new", halves / "train")
    image_folder(halves, {"val": 8}, CLASSES, SIZE)
    for file in (halves / "val").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file))[::-1]).save(file)
    assert len(draw_roles(halves)["certify"]) == json.loads(px(*command[:-1], halves, "--json").out)["reserved"]


def test_a_run_of_what_a_run_made_keeps_to_its_samples(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path
) -> None:
    """Another seed cuts the same images in another way."""
    command = ["run", "--model", certified[0] / "model.onnx", "--data", images, "--max-drop", 0.3, "--ratio", 0.2]
    refused = one_line(px(*command, "--seed", 1, "--out", tmp_path / "out", "--quiet"))
    certify = load_splits(open_source(str(images), seed=1), PREPROCESSING, seed=1).ids["certify"]
    served = {name for role, ids in draw_roles(images).items() if role != "certify" for name in ids}
    assert f"{len(served.intersection(certify))} samples to certify on served the run that made" in refused


def test_a_run_from_the_weights_of_a_run_keeps_to_its_samples(
    px: Px, certified: tuple[Path, Outcome], options: list[object], images: Path, tmp_path: Path
) -> None:
    """Weights of the same layers beside a list of what has served."""
    weights = Path(shutil.copy(options[options.index("--checkpoint") + 1], tmp_path))
    shutil.copy(certified[0] / "served.txt", tmp_path)
    command = ["run", *options, "--checkpoint", weights, "--max-drop", 0.3, "--ratio", 0.2, "--seed", 1]
    assert f"served the run that made '{weights}'" in one_line(px(*command, "--out", tmp_path / "out"))


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_list_of_what_has_served_that_cannot_be_read_is_one_line(px: Px, copy: Path, content: bytes | None) -> None:
    (copy / "served.txt").unlink()
    if content is None:
        (copy / "served.txt").mkdir()
    else:
        (copy / "served.txt").write_bytes(content)
    line = one_line(px("certify", copy, "--max-drop", 0.3, "--quiet"))
    assert f"served.txt of '{copy}' cannot be read" in line
    assert "put it back" in line


def test_images_without_labels_are_known_as_well(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path
) -> None:
    ids = draw_roles(images)
    for name in (*ids["select"], *ids["test"], *ids["certify"]):
        shutil.copy(
            images / "val" / name if (images / "val" / name).exists() else images / name,
            tmp_path / "".join(name.split("/")),
        )
    outcome = px("certify", certified[0], "--unlabelled", tmp_path, "--max-drop", 0.6, "--out", tmp_path / "out")
    assert f"{len(ids['select'] + ids['test'])} samples are left out" in outcome.err
    assert json.loads((tmp_path / "out" / "request.json").read_text())["images"] == len(ids["certify"])
