"""Everything about exported files: ONNX export, precision, and measurement of latency and quality on runtimes."""
