"""ONNX operators as functions of torch tensors."""

from pxcompress.onnx_in.operators import arithmetic, layers, reductions, resizing, shapes
from pxcompress.onnx_in.operators.table import OPERATORS

__all__ = ["OPERATORS", "arithmetic", "layers", "reductions", "resizing", "shapes"]
