"""Names of files in a run folder."""

DENSE, SLIM, PLAN, WEIGHTS = "dense.onnx", "model.onnx", "plan.json", "model.safetensors"

TOKENIZER = "tokenizer.json"
"""Name of the tokenizer's file, in the format of the library tokenizers; only models for texts have one."""

RECIPE = "recipe.json"
"""Name of the file that marks a folder as a run folder: only such a folder is ever replaced."""
AGAINST = "against"
