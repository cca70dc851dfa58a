"""ONNX files that cannot be pruned are refused in one line."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_nets import Plain, export, make_node, make_proto

from pxcompress.deploy.onnx_modules import check_agrees, read_onnx
from pxcompress.errors import ModelError


def test_another_result_than_onnx_runtime_is_refused_with_the_node(tmp_path: Path) -> None:
    module = read_onnx(export(Plain, tmp_path / "net.onnx"))
    with torch.no_grad():
        module.get_submodule("inner").weight[0, 0, 0, 0] += 0.5
    with pytest.raises(ModelError, match="first at Conv '/inner/Conv'"):
        check_agrees(module)


def _huge(rows: int = 1 << 40) -> onnx.ModelProto:
    """A weight that says it has more rows than there are."""
    proto = make_proto(make_node("MatMul", "x", "w"), w=np.zeros((4, 4), np.float32))
    proto.graph.initializer[0].dims[0] = rows
    return proto


def _if_on_data() -> onnx.ModelProto:
    """A branch that the mean of the input chooses."""
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x"], [kind])],
            kind,
            [],
            [helper.make_tensor_value_info(kind, TensorProto.FLOAT, ["n", 4])],
        )
        for kind in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["high"]),
        helper.make_node("If", ["high"], ["y"], "gate", then_branch=branches[0], else_branch=branches[1]),
    ]
    return make_proto(*nodes, zero=np.zeros((), np.float32))


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "quantised": (make_proto(make_node("QLinearMatMul")), "quantised already .*float32 file it was made from"),
    "runtime's own": (
        make_proto(make_node("FusedConv", domain="com.microsoft")),
        "com.microsoft .FusedConv.*before optim",
    ),
    "QDQ": (
        make_proto(
            make_node("QuantizeLinear", "x", "s"), make_node("DequantizeLinear", "x", "s"), s=np.ones((), np.float32)
        ),
        r"quantised already \(DequantizeLinear, QuantizeLinear\).*--targets int8",
    ),
    "loop": (make_proto(make_node("Loop")), "has a loop"),
    "scan": (make_proto(make_node("Scan")), "has a loop .Scan"),
    "if on data": (_if_on_data(), "If 'gate': which way it goes depends on the input's values"),
    "nothing makes it": (
        make_proto(make_node("Relu", "other")),
        "Relu '' reads 'other', which nothing in the file makes",
    ),
    "bfloat16": (
        make_proto(make_node("MatMul", "x", "w"), w=np.zeros((16, 16), ml_dtypes.bfloat16)),
        "bfloat16.*export it in float32 or float16",
    ),
    "too new": (make_proto(make_node("Relu"), opset=99), "opset 99; known are 7 to"),
    "too large": (_huge(), r"tensor 'w' says it has the shape \[1099511627776, 4\]; refused"),
    "not its bytes": (_huge(8), r"tensor 'w' of shape \[8, 4\] has 64 bytes, not 128; fetch the whole file"),
    "unknown": (
        make_proto(make_node("Det"), make_node("Det"), make_node("NonMaxSuppression")),
        r"Det \(2x\), NonMaxSuppression \(1x\)",
    ),
    "opset": (make_proto(make_node("Relu"), opset=5), "opset 5"),
    "double": (make_proto(make_node("MatMul", "x", "w"), w=np.zeros((16, 16))), "weights in float64"),
    "no graph": (onnx.ModelProto(), "no ONNX file"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_pruned_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    proto, message = REFUSED[case]
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message) as refusal:
        read_onnx(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12"])
def test_files_that_are_no_onnx_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="no ONNX file"):
        read_onnx(tmp_path / "net.onnx")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = export(Plain, tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        read_onnx(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/w.bin", "", "link.bin", "short.bin"])
def test_external_weights_from_elsewhere_are_refused_before_they_are_read(location: str, tmp_path: Path) -> None:
    proto = make_proto(make_node("MatMul", "x", "w"), w=np.zeros((4, 4), np.float32))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path / "short.bin").write_bytes(b"1234")
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"not beside it|fetch the whole file"):
        read_onnx(tmp_path / "net.onnx")
