"""What ships: the ONNX file, its precision, and what it costs and gets right on ONNX Runtime."""
