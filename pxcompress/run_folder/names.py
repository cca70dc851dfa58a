"""Files of a run folder that others read."""

DENSE, SLIM, PLAN, WEIGHTS = "dense.onnx", "model.onnx", "plan.json", "model.safetensors"

TOKENIZER = "tokenizer.json"
"""What makes inputs of texts, as the library tokenizers reads it; only models of texts have one."""

RECIPE = "recipe.json"
"""Name of the file that marks a folder as a run folder: only such a folder is ever replaced."""
AGAINST = "against"
