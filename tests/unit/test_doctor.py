"""`pxcompress doctor`: what it tries, and what it says to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Px

from pxcompress.deploy import doctor, hardware, plugins, runtime
from pxcompress.deploy.doctor import Finding


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked by nobody."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_everything_is_tried_and_what_fails_comes_with_advice(px: Px) -> None:
    outcome = px("doctor", "--json")
    assert outcome.code == 0
    checks = {each["what"]: each for each in json.loads(outcome.out)}
    assert checks["provider cpu"]["works"] is True
    for name in ("cuda", "tensorrt"):
        assert checks[f"provider {name}"]["works"] == (not runtime.explain_failure(name))
    assert {
        "python",
        "packages",
        "threads",
        "cache",
        "current folder",
        "model hub",
        "several processes",
    } <= checks.keys()
    assert "onnxruntime-gpu" in checks["packages"]["result"]
    assert checks["packages"]["result"].count("pytest") == 0  # only what the tool itself needs
    assert checks["model hub"] == {
        "what": "model hub",
        "works": False,
        "result": "HF_HUB_OFFLINE is set",
        "advice": "give weights with --checkpoint or --model local-dir:PATH",
    }
    for each in checks.values():
        assert "\n" not in each["result"]
        assert each["advice"] or each["works"] is not False or each["what"] == "NVIDIA driver"


def test_the_table_marks_what_fails_and_says_what_to_do() -> None:
    text = doctor.to_table((Finding("a", True, "x"), Finding("bcd", False, "y", "do z"), Finding("e", None, "f")))
    assert text.splitlines() == ["ok  a    x", "NO  bcd  y", "         -> do z", "    e    f"]


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("", ""),
        ("the NVIDIA driver is too old: it runs CUDA up to 12.4, ...", "update"),
        ("no package onnxruntime-ep-* is installed", "onnxruntime-ep-openvino"),
        ("no NVIDIA driver (libcuda.so.1 is not there)", "install its driver"),
        ("onnxruntime 1.31 was built without CUDAExecutionProvider (...)", "pip install onnxruntime-gpu"),
        ("libnvinfer.so.10: cannot open shared object file", "pip install tensorrt"),
        ("libcudnn.so.9: cannot open shared object file", "packages"),
        ("something new", "see the reason"),
    ],
)
def test_advice_fits_the_reason(reason: str, advice: str) -> None:
    assert advice in doctor._advise(reason)
    assert bool(doctor._advise(reason)) == bool(reason)


def test_a_library_is_found_as_a_package_or_on_the_system() -> None:
    assert doctor._find_library("it", "onnx", "libnothing.so.1").result.startswith("onnx ")
    system = doctor._find_library("it", "no-such-package", "libc.so.6")
    assert (system.works, system.result) == (True, "libc.so.6 of this system")
    missing = doctor._find_library("it", "no-such-package", "libnothing.so.1")
    assert missing.works is False
    assert "libnothing.so.1" in missing.result
    assert "pip install" in missing.advice


@pytest.mark.parametrize(("newest", "too_old"), [("12.9", True), ("13.0", False), ("13.2", False), ("14.0", False)])
def test_a_driver_runs_what_is_built_for_its_major_version(
    monkeypatch: pytest.MonkeyPatch, newest: str, too_old: bool
) -> None:
    monkeypatch.setattr(hardware, "get_newest_cuda", lambda: newest)
    reason = hardware.explain_old_driver("13.0")
    assert bool(reason) == too_old
    assert not too_old or f"runs CUDA up to {newest}, onnxruntime needs 13.0; update it" in reason
    assert hardware.explain_old_driver("") == ""


def test_a_provider_from_a_package_is_found_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugins.find_plugins.cache_clear()
    (tmp_path / "onnxruntime_ep_nothing.py").write_text(
        "def get_ep_name(): return 'NoSuchExecutionProvider'\n"
        f"def get_library_path(): return {str(tmp_path / 'libnothing.so')!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        plugin = next(each for each in plugins.find_plugins() if each.package == "onnxruntime-ep-nothing")
        assert plugin.devices == ()
        assert "libnothing.so" in plugin.failure
        assert "\n" not in plugin.failure
        lines = {each.what: each for each in doctor._list_plugins()}
        assert lines["onnxruntime-ep-nothing of unknown version"].works is False
        assert "CPU (onnxruntime" in lines["built-in providers"].result
    finally:
        plugins.find_plugins.cache_clear()


def test_a_cache_that_cannot_be_made_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "file"))
    checks = {each.what: each for each in doctor._check_folders()}
    assert checks["cache"].works is False
    assert checks["cache"].advice == "set PXCOMPRESS_CACHE"
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "new"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").write_bytes(bytes(200_000_000))
    assert ", 0.2 GB kept" in next(iter(doctor._check_folders())).result


def test_a_hub_that_does_not_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    (check,) = doctor._try_hub()
    assert check.works is False
    assert "127.0.0.1:1" in check.result
    assert check.advice
