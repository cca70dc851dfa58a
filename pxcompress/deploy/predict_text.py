"""Run the model beside this file on texts: python predict.py "A TEXT" ... [--file TEXTS] [--model model.onnx]

A file has one text a line; two texts that belong together have a tab between them. A classifier's answer is printed, as
are labels and numbers; any other output, such as an embedding, is written into the current folder as texts.npz, in the
order of the texts. Needs onnxruntime, numpy and tokenizers, nothing else; tokenizer.json lies beside this file.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tokenizers


def prepare(text: str, tokenizer: tokenizers.Tokenizer, metadata: dict[str, str]) -> dict[str, np.ndarray]:
    """One text, or two with a tab between them, as the model's inputs: (1, length) each.

    Raises `ValueError` for a text without tokens.
    """
    first, _, second = text.partition("\t")
    encoding = tokenizer.encode(first, second or None)
    columns = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }
    inputs = json.loads(metadata["inputs"])
    if not encoding.ids or max(encoding.ids) > inputs[0]["high"]:
        raise ValueError("it has no tokens, or tokens that the model does not know")
    return {each["name"]: np.array([columns[each["name"]]], dtype=each["dtype"]) for each in inputs}


def show(values: np.ndarray, metadata: dict[str, str]) -> str:
    """The text to print for the first output of one text, depending on the model's task; "" if it is saved instead."""
    task, classes = metadata["task"].partition(":")[0], json.loads(metadata["classes"])
    if task == "classification":
        shares = values if metadata.get("output") == "probabilities" else np.exp(values - values.max())
        best = int(values.argmax())
        return f"{classes[best]}\t{shares[best] / shares.sum():.4f}"
    if task == "multi-label":
        shares = 1 / (1 + np.exp(-values))
        return ", ".join(f"{label} {share:.4f}" for label, share in zip(classes, shares) if share > 0.5) or "none"
    if task == "regression":
        return ", ".join(f"{label} {value:.6g}" for label, value in zip(classes, values.flat))
    return ""


def read(options: argparse.Namespace) -> list[str]:
    """The texts on the command line and in files. Raises `SystemExit` if one is empty or unreadable, or without any."""
    texts = list(options.texts)
    for path in options.file:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            raise SystemExit(f"predict.py: {path} cannot be read as texts: {error}") from error
        texts += [line for line in lines if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise SystemExit('predict.py: no text, or an empty one; expected python predict.py "A TEXT", or --file TEXTS')
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Print or write what the model makes of every text.")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--file", action="append", default=[], help="one text a line")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"))
    options = parser.parse_args()
    texts = read(options)
    session = ort.InferenceSession(options.model, providers=["CPUExecutionProvider"])  # on a GPU: "CUDA..." first
    metadata, names = session.get_modelmeta().custom_metadata_map, [output.name for output in session.get_outputs()]
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(int(metadata["most_tokens"]))
    rows = []
    for text in texts:
        try:
            feed = prepare(text, tokenizer, metadata)
        except ValueError as error:
            raise SystemExit(f"predict.py: {text!r} cannot be read: {error}") from error
        outputs = [value[0].astype(np.float64) for value in session.run(names, feed)]
        if not all(np.isfinite(value).all() for value in outputs):
            raise SystemExit(f"predict.py: the model returns NaN or infinity for {text!r}; do not use it")
        rows.append(outputs)
        if line := show(outputs[0], metadata):
            print(f"{text}\t{line}")
    if metadata["task"].partition(":")[0] not in ("classification", "multi-label", "regression"):
        arrays = {name: np.stack([row[place] for row in rows]) for place, name in enumerate(names)}
        np.savez("texts.npz", **arrays)  # type: ignore[arg-type]
        print(f"texts.npz: {', '.join(f'{name} {value.shape}' for name, value in arrays.items())}")


if __name__ == "__main__":
    main()
