"""Reads an ONNX file as a PyTorch module and writes it back: `read_file` and `module.write_onnx`.

No library that turns ONNX into PyTorch makes linear layers of MatMul, sees attention heads, or writes back into the
user's graph, so the reader is our own. A file is opened and refused or tidied (`opening`), run twice to tell constants
from values (`trial`), made a module (`patterns`, `making`, `building`), and its attention found (`walk`, `heads`);
`deploy.onnx_modules` compares it with ONNX Runtime. The operators are in one table (`operators`).
"""

from pxcompress.onnx_in.module import OnnxModule
from pxcompress.onnx_in.reading import read_file

__all__ = ["OnnxModule", "read_file"]
