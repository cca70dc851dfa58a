"""Every operator of the table against ONNX's own node tests, and against ONNX Runtime in older opsets."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from pxcompress.deploy.all_outputs import run_graph
from pxcompress.onnx_in.opening import settings_of
from pxcompress.onnx_in.operators import OPERATORS
from pxcompress.onnx_in.operators.table import Unsupported, operator

UNTESTED = {"Upsample", "BatchNormalization", "Cast", "CastLike"}
"""Operators without a test of ONNX's own that this reads: deprecated, or with other inputs only."""

ORDER_OF_EQUALS = ("top_k_same_values", "empty_set")
"""Parts of the names of tests about ties and empty tensors, which PyTorch settles in another way."""


def _case_arrays(case: Any) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Inputs and outputs of a test; None for types that PyTorch has not."""
    inputs, outputs = case.data_sets[0]
    readable = all(getattr(getattr(array, "dtype", None), "name", "") in READABLE for array in (*inputs, *outputs))
    return (inputs, outputs) if readable else None


READABLE = {"float32", "float64", "int8", "int32", "int64", "uint8", "bool"}


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Any]]:
    from onnx.backend.test.loader import load_model_tests

    cases_by_operator = defaultdict(list)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    for case in tests:
        nodes = case.model.graph.node if case.model is not None else []
        settled = not any(part in case.name for part in ORDER_OF_EQUALS)
        if settled and len(nodes) == 1 and nodes[0].domain == "" and _case_arrays(case) is not None:
            cases_by_operator[nodes[0].op_type].append(case)
    return cases_by_operator


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_operator_computes_what_onnx_says(kind: str, cases: dict[str, list[Any]]) -> None:
    count = 0
    for case in cases[kind]:
        inputs, outputs = _case_arrays(case) or ([], [])
        node = case.model.graph.node[0]
        values = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
        args = [torch.from_numpy(np.array(values[name])) if name else None for name in node.input]
        settings = settings_of(next(iter(ir.from_proto(case.model).graph)), case.model.opset_import[0].version)
        try:
            made = OPERATORS[kind](settings, *args)
        except Unsupported:
            continue
        made = made if isinstance(made, tuple) else (made,)
        for value, expected in zip(made, outputs, strict=True):
            assert tuple(value.shape) == expected.shape, case.name
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-3, atol=1e-4, err_msg=case.name)
        count += 1
    assert count or kind in UNTESTED


OLD: dict[str, tuple[int, dict[str, Any], list[tuple[int, ...]]]] = {
    "Softmax": (11, {"axis": 1}, [(2, 3, 4)]),
    "LogSoftmax": (11, {}, [(2, 3, 4)]),
    "Slice": (9, {"starts": [1, 0], "ends": [3, 2], "axes": [1, 2]}, [(2, 3, 4)]),
    "Pad": (10, {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5}, [(1, 2, 3, 3)]),
    "Clip": (9, {"min": 0.0, "max": 6.0}, [(2, 3)]),
    "Squeeze": (11, {"axes": [1]}, [(2, 1, 3)]),
    "Unsqueeze": (11, {"axes": [0, 2]}, [(2, 3)]),
    "Split": (11, {"axis": 1, "split": [1, 2]}, [(2, 3)]),
    "ReduceMean": (11, {"axes": [2, 3], "keepdims": 0}, [(2, 3, 4, 4)]),
    "BatchNormalization": (9, {}, [(2, 3, 4, 4), (3,), (3,), (3,), (3,)]),
}


@pytest.mark.parametrize("kind", sorted(OLD))
def test_operator_of_an_older_opset(kind: str) -> None:
    opset, attributes, shapes = OLD[kind]
    outputs = ["y", "z"] if kind == "Split" else ["y"]
    arrays = [np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32) for shape in shapes]
    names = [f"x{place}" for place in range(len(arrays))]
    graph = helper.make_graph(
        [helper.make_node(kind, names, outputs, **attributes)],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in zip(names, arrays, strict=True)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    settings = settings_of(next(iter(ir.from_proto(proto).graph)), opset)
    made = OPERATORS[kind](settings, *map(torch.from_numpy, arrays))
    expected = run_graph(proto.SerializeToString(), dict(zip(names, arrays, strict=True)))
    for value, reference in zip(made if isinstance(made, tuple) else (made,), expected, strict=True):
        np.testing.assert_allclose(value.numpy(), reference, rtol=1e-4, atol=1e-5)


def test_table_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="Relu"):
        operator("Relu")(lambda node, x: x)


def test_all_operators_are_onnx_ones() -> None:
    assert set(OPERATORS) <= {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
