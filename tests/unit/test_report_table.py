"""The table on a terminal, of a run and of bench."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from reports import REPORT, compare, make_report, make_target, measurement

from pxcompress.deploy.bench import BenchRow
from pxcompress.deploy.comparison import verdict
from pxcompress.proof import (
    Latency,
    Placement,
    Speedup,
)
from pxcompress.report import to_table
from pxcompress.report.compare import to_comparison_table
from pxcompress.report.record import PlanCosts
from pxcompress.report.summary import (
    describe_conditions,
    write_headline,
)
from pxcompress.report.table import format_bench


def test_tables_fit_into_80_columns() -> None:
    """Those of the widest figures that a run may have; prose may be longer, a terminal breaks it."""
    times = Latency(100.0, 0.0804, 0.123, 0.2, 200, (0.08,) * 21)
    names = ("dense.onnx", "model.onnx", "model.fp16.onnx", "model.int8.onnx")
    change = Speedup(1.02, 0.97, 12.06)
    placed = Placement("cuda", "CUDAExecutionProvider", 100, 142, "x", {"CPUExecutionProvider": 42})
    perfect = dataclasses.replace(measurement(1.0, 3.0, 10), onnx_bytes=12_300_000, latency_ms=times)
    rows = [make_target(name, "fp32", perfect, change, 360) for name in names]
    targets = [dataclasses.replace(row, provider=placed) for row in rows]
    report = make_report(targets=tuple(targets))
    lines = to_table(report).splitlines()
    places = [lines.index("", start) for start in (0, 12)]
    assert all(len(line) <= 80 for line in lines[: places[-1]] if not line.startswith("nodes: "))
    compared = to_comparison_table({"a" * 40: report, "b": REPORT}).splitlines()
    assert all(len(line) <= 80 for line in compared[: compared.index("")] if line.startswith("  "))


def test_table_golden() -> None:
    assert to_table(REPORT).splitlines() == [
        "                          dense          pruned  ratio",
        "top-1                     90.0%           85.0%  -5.0 points",
        "  95 % interval  86.7% to 92.6%  81.2% to 88.2%  -9.6 to -0.4 points",
        "MACs                       80 M            20 M  0.250 (4x fewer)",
        "parameters                 40 k            10 k  0.250 (4x fewer)",
        "file size                200 kB           50 kB  0.250 (4x smaller)",
        "latency p50               12 ms            3 ms  0.250 (4x lower)",
        "latency p90               18 ms         4.50 ms  0.250 (4x lower)",
        "throughput               83.3/s           333/s  4.000 (4x more)",
        "",
        "Some CPU, CPUExecutionProvider, 2 CPU threads, batch 1, fp32, 400 test samples, input 3x32x32, "
        "weights trained here",
        "0.75 of the MACs removed: 0.44 of the channels and heads, 0.75 of the milliseconds",
        "2 of 2 classes lost answers, 0 gained some; most: 'cat', 180 -> 170 of 200 samples right",
        "note: embedded data: a demonstration",
        REPORT.verdict,
        "next: to lose less: a smaller --ratio, more images, or more steps, --repair closed-form "
        "--repair finetune:steps=3000",
    ]


@pytest.mark.parametrize(
    ("budget", "p50", "line"),
    [
        (
            ("channels", "units", 40.0, 20.0, 20.0),
            3.0,
            "0.44 of the channels and heads removed: 0.75 of the MACs, 0.75 of",
        ),
        (("latency", "ms", 4.0, 2.0, 2.0), 3.0, "0.75 of the milliseconds removed: 0.75 of the MACs, 0.44 of the"),
        (
            ("params", "parameters", 4.0, 1.0, 2.0),
            15.0,
            "0.75 of the parameters removed: 0.75 of the MACs, 0.44 of the",
        ),
        (
            ("macs", "MACs", 80e6, 20e6, 40e6),
            15.0,
            "0.75 of the MACs removed: 0.44 of the channels and heads, 0.25 more",
        ),
    ],
)
def test_the_table_says_what_a_ratio_came_to_in_other_units(budget: tuple[Any, ...], p50: float, line: str) -> None:
    assert f"\n{line} " in to_table(make_report(p50=p50, plan=PlanCosts(*budget)))


def test_table_names_the_path_of_the_artefact_and_is_ascii() -> None:
    assert to_table(REPORT).splitlines()[-2].endswith(": exported/run/model.onnx")
    assert to_table(REPORT).isascii()


def test_table_names_the_gpu_only_where_it_ran() -> None:
    on_gpu = make_report(provider=Placement("auto", "CUDAExecutionProvider", 17, 17, device="cuda"))
    told = Placement("cuda", "CUDAExecutionProvider", 17, 17, options={"use_tf32": "0", "enable_cuda_graph": "1"})
    assert "CUDAExecutionProvider (use_tf32 0, enable_cuda_graph 1)" in describe_conditions(make_report(provider=told))
    assert "Some GPU, CUDAExecutionProvider" in to_table(on_gpu)
    assert "Some GPU" not in to_table(REPORT)


def bench_row(path: str, p50: float, change: Speedup | None, **placed: Any) -> BenchRow:
    times = Latency(p50, p50, p50, p50, 200, (p50,) * 21)
    placement = Placement("cuda", "CUDAExecutionProvider", **{"nodes_on_provider": 6, "nodes_total": 6, **placed})
    shape = (1, 3, 8, 8)
    return BenchRow(
        path,
        shape,
        1,
        times,
        1000 / p50,
        10**6,
        "fp32",
        2,
        "not pinned, of 4 cores",
        placement,
        25.0,
        0.031,
        change,
    )


def test_bench_table_compares_with_the_first_line() -> None:
    rows = [
        bench_row("dense.onnx", 10.0, None),
        bench_row("model.onnx", 5.0, Speedup(2.0, 1.9, 2.1)),
        bench_row("other.onnx", 9.8, Speedup(1.02, 0.97, 1.06)),
    ]
    lines = format_bench(rows).splitlines()
    assert max(map(len, lines[:13])) <= 80
    assert lines[2].split() == ["model.onnx", "1", *4 * ["5", "ms"], "200/s"]
    assert lines[6].endswith("reference")
    assert lines[7].endswith("25 ms  2.00x (1.90 to 2.10)")
    assert lines[8].endswith("no difference shown, 1.02x (0.97 to 1.06)")
    assert lines[10] == "dense.onnx: fp32, 6 nodes on CUDA"
    assert lines[14:16] == [
        "200 runs of each file, in turns; CPU threads: 2, not pinned, of 4 cores; random inputs",
        "noise: half of the calls are within 3.1% of p50",
    ]


def test_bench_table_says_that_the_machine_is_busy() -> None:
    row = dataclasses.replace(bench_row("dense.onnx", 10.0, None), noise=0.3)
    assert "within 30.0% of p50; THE MACHINE IS BUSY" in format_bench([row])


def slow_on_average(mean: float) -> Latency:
    """Of calls most of which take 3 ms."""
    return dataclasses.replace(REPORT.pruned.latency_ms, mean=mean)


def test_what_p50_and_mean_say_is_no_speed_where_they_disagree() -> None:
    for mean, agree in ((14.0, False), (13.0, True)):  # the dense model's is 13.2
        pruned = dataclasses.replace(REPORT.pruned, latency_ms=slow_on_average(mean))
        comparison = compare(REPORT.dense, pruned, Speedup(4.0, 3.9, 4.1))
        report = make_report(pruned=pruned, verdict=verdict(comparison))
        assert comparison.disagrees is not agree
        assert ("4x faster" in report.verdict) is agree
        assert ("SPEED UNCLEAR at batch 1: 4.00x by p50, 0.94x by the mean" in report.verdict) is not agree
        assert ("4x faster" in write_headline(report)) is agree
    slower = compare(REPORT.pruned, REPORT.dense, Speedup(0.25, 0.2, 0.3))
    assert "NOT FASTER" in verdict(slower)
    held_up = dataclasses.replace(REPORT.pruned, latency_ms=slow_on_average(20.0))
    assert "SPEED UNCLEAR" in verdict(dataclasses.replace(slower, dense=held_up))


def test_bench_says_where_p50_and_mean_disagree() -> None:
    first, second = bench_row("dense.onnx", 10.0, None), bench_row("model.onnx", 5.0, Speedup(2.0, 1.9, 2.1))
    assert "SPEED UNCLEAR" not in format_bench([first, second])
    held_up = dataclasses.replace(second, latency_ms=slow_on_average(20.0))
    assert "SPEED UNCLEAR: model.onnx at batch 1 is 2.00x as fast by p50, but 0.50x" in format_bench([first, held_up])


def test_bench_table_names_the_nodes_that_run_elsewhere() -> None:
    reason = "2 of 6 nodes run elsewhere: 2 Shape on CPUExecutionProvider"
    placed = {"nodes_on_provider": 4, "elsewhere": {"CPUExecutionProvider": 2}, "fallback_reason": reason}
    lines = format_bench([bench_row("dense.onnx", 10.0, None, **placed)]).splitlines()
    assert "dense.onnx: fp32, 4 of 6 on CUDA, 2 on CPU" in lines
    assert lines[-1] == f"note: {reason}"
