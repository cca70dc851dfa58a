"""`verify`: certificates are computed again, and whatever was altered is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from certified import read_certificate
from command import Outcome, Px, one_line

from pxcompress.certify.used import FILE
from pxcompress.recipe import Guarantee
from pxcompress.run_folder.sums import write_sums

# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_recomputes_and_does_not_count(px: Px, certified: tuple[Path, Outcome], cache: Path) -> None:
    before = (cache / FILE).read_bytes()
    outcome = px("verify", certified[0])
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "recomputed on 75 samples: the certificate holds"
    told = json.loads(px("verify", certified[0], "--json").out)
    assert told["holds"] is True
    assert told["problems"] == []
    assert (cache / FILE).read_bytes() == before


def test_verify_takes_data_that_have_moved(px: Px, copy: Path, images: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "moved"
    shutil.copytree(images, elsewhere)
    assert px("verify", copy, "--data", elsewhere, "--quiet").code == 0
    next((elsewhere / "val" / "class0").iterdir()).unlink()
    outcome = px("verify", copy, "--data", elsewhere, "--quiet")
    assert outcome.code == 3
    assert "the split is not the certified one" in outcome.err


def test_verify_detects_another_model(px: Px, copy: Path, refused: tuple[Path, Outcome], tmp_path: Path) -> None:
    shutil.copy(copy / "dense.onnx", copy / "model.onnx")
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert "the model is not the certified one" in outcome.err
    assert "holds" not in outcome.out


def test_verify_detects_any_file_that_was_altered(px: Px, copy: Path) -> None:
    """One line more at the end of each file in turn; what makes a model is measured again, and told by its role."""
    roles = {"model.onnx": "model", "dense.onnx": "dense", "plan.json": "plan", "model.safetensors": "weights"}
    files = sorted(path for path in copy.iterdir() if path.is_file())
    names = {file.name for file in files}
    assert {"report.json", "report.html", "predict.py", "recipe.json", "certificate.json", "SHA256SUMS"} < names
    for file in files:
        before = file.read_bytes()
        comment = b"\x32\x01 " if file.suffix == ".onnx" else b"\n"  # an ONNX file's doc_string
        file.write_bytes(before + comment)
        outcome = px("verify", copy, "--quiet")
        told = f"{file.name!r} is not the file that was written"
        if file.name == "SHA256SUMS":
            told = "SHA256SUMS of"
        if file.name in roles:
            told = f"the {roles[file.name]} is not the certified one"
        assert outcome.code == 3, (file.name, outcome)
        assert told in outcome.err, file.name
        file.write_bytes(before)
    assert px("verify", copy, "--quiet").code == 0


@pytest.mark.parametrize("name", ["recipe.json", "dense.onnx", "model.onnx", "model.safetensors", "certificate.json"])
def test_verify_of_a_file_that_is_no_longer_readable_says_what_was_altered(px: Px, copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"\x00")
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert name in outcome.err or "weights" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_verify_says_what_is_missing(px: Px, copy: Path) -> None:
    (copy / "report.html").unlink()
    outcome = px("verify", copy)
    assert outcome.code == 0
    assert "not there any more, and so not checked: report.html\n" in outcome.err
    for name in ("plan.json", "model.safetensors"):
        (copy / name).rename(copy / "elsewhere")
        assert f"has no {name}, which its certificate is about" in one_line(px("verify", copy, "--quiet"))
        (copy / "elsewhere").rename(copy / name)


def test_verify_detects_a_figure_of_the_report_that_is_on_no_page(px: Px, copy: Path) -> None:
    content = json.loads((copy / "report.json").read_text())
    content["dense"]["latency_ms"]["quantiles"][3] += 1e-6
    (copy / "report.json").write_text(json.dumps(content, indent=1))
    assert "'report.json' is not the file that was written" in px("verify", copy, "--quiet").err


def test_verify_measures_and_does_not_only_compare_hashes(px: Px, copy: Path) -> None:
    """Errors that were written down too low, with p-values that fit them."""
    told = read_certificate(copy)
    row = told["rows"][told["chosen"]]
    low = max(row["errors"] - 1, 0) if row["errors"] else 1
    row["errors"], row["p_value"] = low, Guarantee(0.3).limit.p_value(1.0 * (np.arange(75) < low))
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert f"not {low:g} errors on 75 samples" in outcome.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.update(alpha=0.29), "p = "),
        (lambda told: told.update(delta=1e-15), "does not follow from its own p-values"),
        (lambda told: told["rows"][1].update(p_value=1e-7), "the p-value of 'step 1"),
        (lambda told: told["hashes"].update(plan="0"), "the plan is not the certified one"),
        (lambda told: told.update(chosen=0), "does not follow from its own p-values"),
        (lambda told: told.pop("rows"), "rows: it is missing"),
    ],
)
def test_verify_detects_a_certificate_that_was_edited(
    px: Px, copy: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    told = read_certificate(copy)
    change(told)
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def _remade(px: Px, folder: Path, *options: object) -> dict[str, object]:
    """The certificate of a run folder's two models, as a run with them as its path would have left it there."""
    told = json.loads(px("certify", folder, "--json", *options).out)
    told["hashes"] = read_certificate(folder)["hashes"]
    (folder / "certificate.json").write_text(json.dumps(told))
    write_sums(folder)
    return told


@pytest.mark.parametrize("part", ["confident", "classes"])
def test_verify_honours_the_part(px: Px, copy: Path, part: str) -> None:
    assert _remade(px, copy, "--max-drop", 0.7, "--part", part)["chosen"] == 1
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1].endswith("the certificate holds")


# --- verify what `certify --out` wrote ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], ["--part", "classes"], ["--part", "confident", "--risk", "disagreement"], ["--anytime"]]
)
def test_verify_recomputes_a_certificate_of_files(
    px: Px, copy: Path, images: Path, more: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    out, files = tmp_path / "out", [copy / "dense.onnx", copy / "model.onnx"]
    made = px("certify", *files, "--data", images, "--max-drop", 0.7, *more, "--out", out, "--quiet")
    assert made.code == 0, made.err
    before = (tmp_path / "cache" / FILE).read_bytes()
    outcome = px("verify", out, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"recomputed on {read_certificate(out)['n']} samples: the certificate holds"
    assert (tmp_path / "cache" / FILE).read_bytes() == before, "to verify is no use of the samples"
    for key in ("alpha", "delta", "sentence", "reserved", "coverage", "threshold"):
        told = read_certificate(out)
        if told[key] is not None:
            changed = {**told, key: told[key] + ("x" if key == "sentence" else -0.1 if key != "reserved" else 1)}
            (out / "certificate.json").write_text(json.dumps(changed))
            assert px("verify", out, "--quiet").code == 3, key
            (out / "certificate.json").write_text(json.dumps(told))
    shutil.copy(files[0], files[1])
    assert "is not the certified one" in px("verify", out, "--quiet").err
    files[1].unlink()
    assert "is not there any more" in one_line(px("verify", out, "--quiet"))


def _count_another(classes: list[dict[str, float]]) -> None:
    """One sample more where the risk is clearest: the p-value, that of the weakest class, stays."""
    clearest = min(classes, key=lambda each: each["p_value"])
    clearest["n"] += 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("confident", lambda told: told.update(threshold=told["threshold"] * 1.001), "confident means a softmax"),
        ("confident", lambda told: told.update(coverage=0.7), "confident means a softmax"),
        ("confident", lambda told: told.update(part="all", coverage=None, threshold=None), "on 75 samples"),
        ("confident", lambda told: told.update(part="all"), "coverage has no effect"),
        ("confident", lambda told: told.update(sentence="All is well."), "sentence"),
        ("confident", lambda told: told.update(scope="all predictions"), "sentence"),
        ("classes", lambda told: told.update(part="all"), "dense.onnx' has 0 errors on 75 samples (p = "),
        ("classes", lambda told: _count_another(told["rows"][1]["classes"]), "errors on 15 samples of 'class"),
        ("classes", lambda told: told["rows"][1]["classes"].pop(), "was not tested on the samples"),
        ("classes", lambda told: told["rows"][1]["classes"][0].update(errors=9), "is not that of its errors"),
        ("classes", lambda told: told.pop("part"), "part: it is missing"),
    ],
)
def test_verify_detects_another_part(
    px: Px, copy: Path, part: str, change: Callable[[dict[str, object]], object], message: str
) -> None:
    told = _remade(px, copy, "--max-drop", 0.5, "--part", part)
    change(told)
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert message in outcome.err
    assert "holds\n" not in outcome.out
    assert len(outcome.err.strip().splitlines()) == 1


def test_verify_of_a_run_that_certified_nothing_exits_3(px: Px, refused: tuple[Path, Outcome]) -> None:
    outcome = px("verify", refused[0], "--quiet")
    assert outcome.code == 3
    assert outcome.err.strip().endswith("the certificate does not hold: no smaller model is certified")


@pytest.mark.parametrize("key", ["spent", "size_unit", "sentence"])
def test_verify_of_half_a_certificate_is_one_line(px: Px, copy: Path, key: str) -> None:
    told = read_certificate(copy)
    del told[key]
    (copy / "certificate.json").write_text(json.dumps(told))
    assert f"is not as pxcompress writes it ({key}: it is missing)" in one_line(px("verify", copy, "--quiet"), 3)


def test_verify_without_a_certificate_is_one_line(px: Px, copy: Path, tmp_path: Path) -> None:
    (copy / "certificate.json").unlink()
    assert "--max-drop makes one" in one_line(px("verify", copy, "--quiet"))
    assert "give a run folder" in one_line(px("verify", tmp_path / "nothing", "--quiet"))
