"""Files of a run folder that others read."""

DENSE, SLIM, PLAN, WEIGHTS = "dense.onnx", "model.onnx", "plan.json", "model.safetensors"

RECIPE = "recipe.json"
"""By this file a folder is known as one of ours: only such a folder is ever replaced."""
AGAINST = "against"
