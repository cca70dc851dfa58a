"""Files of a run folder that others read."""

DENSE, SLIM, PLAN, WEIGHTS = "dense.onnx", "model.onnx", "plan.json", "model.safetensors"

RECIPE = "recipe.json"
"""Name of the file that marks a folder as a run folder: only such a folder is ever replaced."""
