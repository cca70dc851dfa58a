"""How many ONNX files can be pruned as they are: read, the groups that PyTorch has, half of the MACs, parity.

    python benchmarks/onnx_in.py --files FOLDER [--only TEXT] [--missing]
    python benchmarks/onnx_in.py --files FOLDER --readers       # needs onnx2torch and onnx2pytorch

`onnx_files.py` makes the files, two of which have to be refused. A process for each, with a time limit. Weights are
random, so what is measured is the surgery, not the accuracy: units are ranked by the size of their weights, and
folded on two random inputs. Where weights are trained, units are ranked by relevance: a net that has lost what it
lives by multiplies rounding errors. Parity holds the written file against the pruned module, on another batch where
it can, in shares of the outputs' scale, which is 1 for what a sigmoid or softmax makes. Seconds are those of one
thread of the processor. Rows of earlier runs are kept. `--quick` takes the first three files.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import onnx
import torch
from torch import Tensor

from pxcompress import compress_module
from pxcompress.cost.count import count_macs
from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import check_agrees, least_scales, relative_difference
from pxcompress.errors import ParityError, PxError
from pxcompress.graph import find_groups
from pxcompress.guard import describe
from pxcompress.models.loading import classifier_names
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.half import HALF_TOLERANCE
from pxcompress.onnx_in.trial import draw_inputs
from pxcompress.state import seeded

RATIO = 0.5
SAMPLES = 2
SECONDS = 600
PARITY = 1e-4
LEAST_REMOVED = 0.45
"""Share of the MACs that has to be gone, of the half that is asked for."""
SIZES = {"yolo11n": (320, 320), "rec": (48, 320), "det": (320, 320), "cls": (48, 192)}
"""Sizes of images for files that leave them open; for all others 128 x 128."""
REFUSED, TRAINED = "refused", "rapidocr"
"""What the names of files begin with that have to be refused, or that have trained weights."""

Row = dict[str, Any]


def examine(path: Path) -> Row:
    """One row; "failure" is empty where the file was pruned with parity, else the line that refuses it."""
    row: Row = {"file": path.name, "bytes": path.stat().st_size, "failure": "", "unforeseen": False, **_facts(path)}
    torch.set_num_threads(1)
    try:
        with seeded(0):
            begin = time.process_time()
            module = read_file(path, {} if path.stem.startswith(REFUSED) else _sizes(path))
            row["read_s"] = round(time.process_time() - begin, 2)
            check_agrees(module)
            row["read_and_compared_s"] = round(time.process_time() - begin, 2)
            _prune(row, module, path)
    except PxError as error:
        row["failure"] = str(error)
    except Exception as error:  # noqa: BLE001  (a defect is one row of the table)
        row |= {"failure": describe(error), "unforeseen": True}
    return row


def _facts(path: Path) -> Row:
    proto = onnx.load(path, load_external_data=False)
    return {
        "opset": next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), 0),
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "nodes": len(proto.graph.node),
    }


def _sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample, for inputs whose size the file leaves open."""
    proto = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in proto.graph.initializer}
    sides = next((sides for part, sides in SIZES.items() if part in path.stem), (128, 128))
    last = "nhwc" in path.stem
    return {
        value.name: (*sides, 3) if last else (3, *sides) for value in proto.graph.input if value.name not in weights
    }


def _prune(row: Row, module: OnnxModule, path: Path) -> None:
    (name, example), *_ = module.source.example.items()
    single = example[:1]
    groups = find_groups(module, single, classifier_names(module, single)).groups
    row["units"] = {
        kind: sum(group.units for group in groups if group.kind == kind) for kind in ("channel", "neuron", "head")
    }
    row["groups"] = len(groups)
    if (beside := path.with_suffix(".json")).exists():
        expected = Counter(map(tuple, json.loads(beside.read_text())["groups"]))
        row["same_groups"] = expected <= (own := Counter((group.kind, group.units) for group in groups))
        row["more_groups"] = sum((own - expected).values())
    inputs = _draw(module, name, SAMPLES, 1)[name].to(example.dtype)
    dense = count_macs(module, single)
    begin = time.process_time()
    scorer = "lrp-residual" if path.stem.startswith(TRAINED) else "magnitude"
    slim = compress_module(module, single, [inputs], RATIO, scorer=scorer, repair=("fold",)).pruned.model
    row["prune_s"] = round(time.process_time() - begin, 1)
    row["macs_left"] = round(count_macs(slim, single) / dense, 3)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        slim.write_onnx(Path(folder) / "slim.onnx", {})
        row["write_s"] = round(time.process_time() - begin, 2)
        row["bytes_left"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        _compare(row, slim, (path, Path(folder) / "slim.onnx"), name)
    if row["macs_left"] > 1 - LEAST_REMOVED:
        raise ParityError(f"{row['macs_left']:.0%} of the MACs are left where half were to go")


def _draw(module: OnnxModule, name: str, samples: int, seed: int) -> dict[str, Tensor]:
    """Random inputs by name, so many of the input `name`."""
    example = module.source.example
    shapes = {each: list(value.shape) for each, value in example.items()}
    shapes[name][0] = samples
    drawn = draw_inputs(module.source.model, shapes, seed)
    return {each: value.to(example[each].dtype) for each, value in drawn.items()}


def _compare(row: Row, slim: OnnxModule, paths: tuple[Path, Path], name: str) -> None:
    """Parity, and the same ports; `name` is the input's. Raises `ParityError`."""
    before, after = (onnx.load(path, load_external_data=False) for path in paths)
    weights = {tensor.name for tensor in before.graph.initializer}
    for kind in ("input", "output"):
        ports = [
            [str(port) for port in getattr(proto.graph, kind) if port.name not in weights] for proto in (before, after)
        ]
        if ports[0] != ports[1]:
            raise ParityError(f"the {kind}s are not those of the file")
    fixed = before.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    inputs = _draw(slim, name, max(fixed, 0) or 3, 7)
    with torch.no_grad():
        made = slim.file_outputs(**inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    written = run_graph(paths[1], {key: value.numpy() for key, value in slim.file_inputs(inputs).items()})
    row["parity"] = max(map(relative_difference, outputs, written, least_scales(slim)))
    if not row["parity"] <= (HALF_TOLERANCE if slim.source.types else PARITY):
        raise ParityError(f"the written file differs from the pruned module by {row['parity']:.1e} of the outputs")


def alone(path: Path) -> Row:
    """`examine` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: send.send(examine(path)))
    worker.start()
    send.close()
    row: Row = {"file": path.name, "failure": f"no end within {SECONDS} s", "unforeseen": True}
    if receive.poll(SECONDS):
        try:
            row = receive.recv()
        except EOFError:
            row["failure"] = "its process ended without an answer (out of memory, or a crash)"
    worker.kill()
    worker.join()
    return row


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    passed = [row for row in rows if not row["failure"]]
    compared = [row for row in rows if "same_groups" in row]
    return [
        common.claim("files", len(rows), 40, "higher"),
        common.claim("of them pruned at half of the MACs with parity", len(passed), 36, "higher"),
        common.claim("fail with a line that is not ours", sum(row["unforeseen"] for row in rows), 0, "equal"),
        common.claim(
            "share with all groups of the module in PyTorch, where there is one",
            sum(row["same_groups"] for row in compared) / max(len(compared), 1),
            1.0,
            "higher",
        ),
        common.claim(
            "largest seconds to read a file", max((row.get("read_s", 0) for row in rows), default=0), 5, "lower"
        ),
    ]


def show(row: Row) -> None:
    facts = f"read {row.get('read_s', float('nan')):5.1f} s  MACs left {row.get('macs_left', float('nan')):.2f}"
    groups = {True: "same groups", False: "OTHER GROUPS"}.get(row.get("same_groups"), "")  # type: ignore[arg-type]
    print(f"{row['file']:58s} {facts}  {groups:12s}  {row['failure'] or 'passes'}", flush=True)


def result_file(quick: bool) -> Path:
    """Where the rows are."""
    return common.RESULTS / ("quick" if quick else "") / "onnx_in.json"


def earlier_rows(quick: bool) -> list[Row]:
    """Rows of earlier runs: of files, of tasks, and of readers."""
    file = result_file(quick)
    return json.loads(file.read_text())["rows"] if file.exists() else []


def is_file_row(row: Row) -> bool:
    """Whether a row is of a file that was pruned, not of a task or another reader."""
    return "task" not in row and "reader" not in row


def save(rows: Sequence[Row], quick: bool) -> None:
    """Write rows of files, of tasks and of readers, with the claims about them."""
    from onnx_ocr import claims as task_claims

    tasks = [row for row in rows if "task" in row]
    files = [row for row in rows if is_file_row(row)]
    command = "python benchmarks/onnx_in.py --files FOLDER" + " --quick" * quick
    readers = [row for row in rows if "reader" in row]
    common.write("onnx_in", command, [*files, *tasks, *readers], [0], [*claims(files), *task_claims(tasks)])


def measure_readers(paths: Sequence[Path], quick: bool) -> None:
    """Put rows of all readers on these files in place of those of an earlier run, file by file."""
    from onnx_readers import compare_readers, show_readers

    for path in paths:
        if not path.stem.startswith(REFUSED):
            rows = compare_readers(path, _sizes(path))
            save(
                [*(row for row in earlier_rows(quick) if "reader" not in row or row["file"] != path.name), *rows], quick
            )
    show_readers([row for row in earlier_rows(quick) if "reader" in row])


def add_tasks(label: str, rows: Sequence[Row], quick: bool) -> None:
    """Put the rows of one task in place of those of an earlier run with the same tools."""
    anew = {(row["task"], _maker(row["tool"])) for row in rows}
    others = [row for row in earlier_rows(quick) if "task" not in row or (row["task"], _maker(row["tool"])) not in anew]
    save([*others, *rows], quick)


def _maker(tool: str) -> str:
    return tool if tool in ("dense", "ours") else "onnxsim"


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--files", type=Path, required=True, help="a folder that onnx_files.py has filled")
    parser.add_argument("--only", default="", help="a part of the names of the files to measure anew")
    parser.add_argument("--missing", action="store_true", help="only files that have no row, or did not pass")
    parser.add_argument("--readers", action="store_true", help="compare our reader with those of other packages")
    args = parser.parse_args()
    paths = sorted(args.files.glob("*.onnx"))[: 3 if args.quick else None]
    if args.readers:
        measure_readers([path for path in paths if args.only in path.name], args.quick)
        return
    file, names = result_file(args.quick), {path.name for path in paths}
    rows = {row["file"]: row for row in earlier_rows(args.quick) if is_file_row(row) and row["file"] in names}
    for path in paths:
        if args.only in path.name and not (args.missing and path.name in rows and not rows[path.name]["failure"]):
            rows[path.name] = alone(path)
            show(rows[path.name])
            file.parent.mkdir(parents=True, exist_ok=True)
            others = [row for row in earlier_rows(args.quick) if not is_file_row(row)]
            file.write_text(json.dumps({"rows": [*rows.values(), *others]}))  # what is there when it is stopped
    others = [row for row in earlier_rows(args.quick) if not is_file_row(row)]
    save([*(rows[path.name] for path in paths if path.name in rows), *others], args.quick)


if __name__ == "__main__":
    main()
