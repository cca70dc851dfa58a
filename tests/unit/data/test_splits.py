"""Roles: disjoint, of the right sizes, drawn from folders with and without halves."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_data import ROLES, SMALL, labels_of, save_images
from PIL import Image

from pxcompress.data import keep_for_certificates, load_splits, open_source, restrict_classes
from pxcompress.data.samples import draw_order
from pxcompress.errors import DataError

TINY_GLYPHS = "glyphs:train=60,select=12,held_out=24"


@pytest.mark.parametrize("spec", ["digits", TINY_GLYPHS])
def test_roles_are_disjoint_and_well_formed(spec):
    source = open_source(spec)
    splits = load_splits(source, SMALL, batch_size=7)
    assert source.embedded
    assert source.native_size == 32
    apart = [set(splits.ids["score"] + splits.ids["repair"]), *(set(splits.ids[role]) for role in ROLES[2:])]
    assert len(set().union(*apart)) == sum(map(len, apart))
    for role in ROLES:
        assert len(set(splits.ids[role])) == len(splits.ids[role])
        batches = getattr(splits, role)
        assert batches.samples == len(splits.ids[role]) == len(labels_of(batches))
        assert all(0 < len(inputs) <= 7 and inputs.shape[1:] == (3, 8, 8) for inputs, _ in batches)
        assert len(list(batches)) == len(batches)
        inputs, labels = next(iter(batches))
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert 0 <= labels.min() <= labels.max() < len(source.classes)
    assert torch.equal(splits.example, next(iter(splits.score))[0][:1])


def test_digits_sizes():
    splits = load_splits(open_source("digits"), SMALL)
    sizes = {role: getattr(splits, role).samples for role in ROLES}
    assert sizes == {"score": 256, "repair": 512, "select": 150, "certify": 150, "test": 497}
    for role, spread in (("score", 1), ("repair", 2)):  # repair may begin and end within a round
        counts = Counter(labels_of(getattr(splits, role)).tolist()).values()
        assert max(counts) - min(counts) <= spread


def test_digits_are_the_digits():
    """An image is scikit-learn's, 0 to 16 spread over 0 to 255, under its label."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pool = open_source("digits").train
    for index in (0, 5, 999):
        number = int(pool.ids[index].removeprefix("digits/"))
        pixels = np.asarray(pool.load(index)).astype(float)
        assert np.abs(pixels / 255 * 16 - bunch.images[number][..., None]).max() < 0.05
        assert pool.labels[index] == bunch.target[number]


def test_seed_changes_draws_but_never_what_is_trained_on():
    one, two = (open_source("digits", seed=seed) for seed in (0, 1))
    assert one.train.ids == two.train.ids
    first, again, other = (load_splits(one, SMALL, seed=seed) for seed in (5, 5, 6))
    assert first.ids == again.ids
    assert all(first.ids[role] != other.ids[role] for role in ROLES)


def test_limits_cap_and_share():
    source = open_source("digits")
    splits = load_splits(source, SMALL, limits={"score": 30, "repair": 40, "select": 10, "certify": 20, "test": 50})
    assert [getattr(splits, role).samples for role in ROLES] == [30, 40, 10, 20, 50]
    shared = load_splits(source, SMALL, limits={"score": 1000, "repair": 3000, "certify": 5000, "select": 9999})
    assert [getattr(shared, role).samples for role in ROLES] == [1000, 1000, 150, 323, 324]


@pytest.mark.parametrize(
    ("score", "repair", "both"), [(300, 700, 0), (300, 701, 1), (300, 1000, 300), (1000, 300, 300)]
)
def test_score_and_repair_overlap_no_more_than_they_have_to(score, repair, both):
    source = open_source("digits")
    splits = load_splits(source, SMALL, limits={"score": score, "repair": repair})
    ids = {role: set(splits.ids[role]) for role in ROLES}
    assert (len(ids["score"]), len(ids["repair"]), len(ids["score"] & ids["repair"])) == (score, repair, both)
    assert not splits.notes, "what serves both is no copy"


@pytest.mark.parametrize(
    ("limits", "words"), [({"scores": 9}, "did you mean score"), ({"test": 1}, "limit of role 'test' is 1")]
)
def test_wrong_limits(limits, words):
    with pytest.raises(DataError, match=words):
        load_splits(open_source("digits"), SMALL, limits=limits)


def test_folder_without_halves(folder):
    source = open_source(str(folder))
    assert source.classes == ("cat", "dog", "eel")
    assert (source.embedded, source.native_size) == (False, None)
    splits = load_splits(source, SMALL)
    everything = {sample for role in ROLES for sample in splits.ids[role]}
    assert sorted(everything) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    for role in ("select", "certify", "test"):  # 2 : 2 : 1
        counts = Counter(sample.split("/")[0] for sample in splits.ids[role])
        assert abs(counts["cat"] - counts["dog"]) <= 1
        assert abs(counts["cat"] - 2 * counts["eel"]) <= 2
    assert open_source(str(folder), seed=1).train.ids != source.train.ids


def test_folder_with_halves(halves):
    splits = load_splits(open_source(str(halves)), SMALL)
    for role in ROLES:
        half = "train/" if role in ("score", "repair", "select") else "val/"
        assert all(sample.startswith(half) for sample in splits.ids[role])
    assert splits.certify.samples + splits.test.samples == 24


@pytest.mark.parametrize(("train", "held_out"), [("train", "test"), ("Train", "Validation"), ("training", "valid")])
def test_spellings_of_halves(tmp_path, train, held_out):
    save_images(tmp_path / train, {"a": 12, "b": 12})
    save_images(tmp_path / held_out, {"a": 3, "b": 3})
    source = open_source(str(tmp_path))
    assert len(source.held_out) == 6
    assert all(sample.startswith(f"{held_out}/") for sample in source.held_out.ids)


def test_one_half_alone_is_cut(tmp_path):
    save_images(tmp_path / "val", {"a": 20, "b": 20})
    splits = load_splits(open_source(str(tmp_path)), SMALL)
    assert len(set().union(*splits.ids.values())) == 40


def test_unused_half_and_empty_class_are_noted(halves):
    save_images(halves / "test", {"cat": 1, "dog": 1})
    (halves / "train" / "fox").mkdir()
    source = open_source(str(halves))
    assert source.classes == ("cat", "dog")
    assert any("'fox'" in note for note in source.notes)
    assert any("test/ is not used" in note for note in source.notes)


def test_hidden_and_other_files_are_no_images(folder):
    (folder / "cat" / "._0.png").write_bytes(b"resource fork")
    (folder / "cat" / "notes.txt").write_text("x")
    save_images(folder, {".thumbnails": 2})
    assert len(load_splits(open_source(str(folder)), SMALL).ids["test"]) > 0
    assert open_source(str(folder)).classes == ("cat", "dog", "eel")


def test_nested_folders_belong_to_their_class(tmp_path):
    save_images(tmp_path / "a", {"deep": 12})
    save_images(tmp_path, {"b": 12})
    assert open_source(str(tmp_path)).classes == ("a", "b")


@pytest.mark.parametrize("even", [True, False])
def test_drawing_order_mixes_every_beginning(even):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = draw_order(labels, np.random.default_rng(0), balanced=even)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(labels[order[:n]], minlength=3)
        expected = np.minimum([n / 3] * 3, [60, 30, 10]) if even else n * np.array([0.6, 0.3, 0.1])
        if not even or n <= 30:
            assert np.abs(counts - expected).max() <= 1.5


def test_too_few_images(tmp_path):
    source = open_source(str(save_images(tmp_path, {"a": 4, "b": 4})))
    with pytest.raises(DataError, match="has 1 images for select; each needs at least 2"):
        load_splits(source, SMALL)


def test_contents_are_those_of_the_samples_also_where_some_have_served(folder):
    """A certificate counts the samples that it looked at by their content."""
    source = open_source(str(folder))
    every = load_splits(source, SMALL)
    served = set(every.contents["certify"][1::3])
    splits = load_splits(source, SMALL, has_served=served.__contains__)
    assert splits.served == len(served)
    content_by_id = dict(zip(every.ids["certify"], every.contents["certify"], strict=True))
    expected = {name: content for name, content in content_by_id.items() if content not in served}
    assert dict(zip(splits.ids["certify"], splits.contents["certify"], strict=True)) == expected


@pytest.mark.parametrize("select", [5, 7, 8, 11])
def test_what_is_kept_for_certificates_leaves_every_role_its_least(folder, select):
    source = open_source(str(folder))
    source = replace(source, select=source.select.take(np.arange(select)))
    most = keep_for_certificates(source)
    splits = load_splits(most, SMALL)
    assert (most is source) == (select < 8), "two samples for score and repair, and two to select"
    if most is not source:
        assert {role: getattr(splits, role).samples for role in ("score", "repair", "test")} == dict.fromkeys(
            ("score", "repair", "test"), 2
        )
        assert splits.certify.samples == len(source.train) + len(source.held_out) - 2


def test_some_classes_of_data_in_one_piece_are_cut_as_the_whole(folder):
    """Their select split has seen no training, and nobody is told that it has."""
    part = restrict_classes(open_source(str(folder)), ("dog", "cat"))
    assert part.select_from == "everything"
    assert not load_splits(part, SMALL).notes


def test_deep_images_are_counted_once(tmp_path):
    """Score and repair share samples where these are few."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(15):
            pixels = np.random.default_rng([label, index]).integers(0, 65536, (8, 8), np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    splits = load_splits(open_source(str(tmp_path)), SMALL)
    samples = set().union(*splits.ids.values())
    assert set(splits.ids["score"]) & set(splits.ids["repair"])
    assert [note.split()[0] for note in splits.notes] == [str(len(samples))]


def test_score_and_repair_have_the_classes_evenly_and_the_others_as_they_come(tmp_path):
    """What shapes a model sees rare classes as often; what judges it has them as they are."""
    source = open_source(str(save_images(tmp_path, {"cat": 60, "dog": 60, "eel": 20})))
    splits = load_splits(source, SMALL, limits={"score": 12, "repair": 12})
    shares = [
        {name: sum(each.startswith(name) for each in splits.ids[role]) for name in source.classes} for role in ROLES
    ]
    assert shares[:2] == [{"cat": 4, "dog": 4, "eel": 4}] * 2
    assert all(2 * counts["eel"] < counts["cat"] for counts in shares[2:])
