"""Texts as a model takes them: token ids, what counts of them, and which of two texts they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pxcompress.errors import DataError, ModelError, short
from pxcompress.models.signature import MASK
from pxcompress.types import Input

IDS, KINDS = "input_ids", "token_type_ids"
"""Names of the inputs that hold token ids, and 0 for tokens of the first and 1 for those of the second text."""

NAMES = (IDS, MASK, KINDS)
"""Inputs that can be made of texts."""

Text = tuple[str, ...]
"""One text, or two that belong together."""


@dataclass(frozen=True)
class Tokenizer:
    """How texts become inputs: `content` is a tokenizer.json of the library `tokenizers`.

    `names` are the inputs in the order in which they are packed; `longest` is the most tokens that the model takes,
    `vocabulary` how many token ids it knows.
    """

    content: str
    names: tuple[str, ...] = (IDS, MASK)
    longest: int = 512
    vocabulary: int = 2**24

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs of the model, whole numbers of an open length."""
        high = {IDS: self.vocabulary - 1}
        return tuple(Input(name, (None,), torch.int64, 0, high.get(name, 1)) for name in self.names)

    def encode(self, texts: Sequence[Text]) -> tuple[Tensor, int]:
        """Packed inputs (n, inputs, length) int32, as long as the longest text, and how many texts had to be cut.

        Raises `DataError` for texts without tokens, and for tokens that the model does not know.
        """
        encodings = [self._library.encode(*text) for text in texts]
        length = max((len(encoding.ids) for encoding in encodings), default=1)
        packed = torch.zeros(len(texts), len(self.names), max(length, 1), dtype=torch.int32)
        if IDS in self.names:
            packed[:, self.names.index(IDS)] = self._padding
        for rows, encoding, text in zip(packed, encodings, texts, strict=True):
            self._check(encoding.ids, text)
            columns = {IDS: encoding.ids, MASK: encoding.attention_mask, KINDS: encoding.type_ids}
            for row, name in zip(rows, self.names, strict=True):
                row[: len(encoding.ids)] = torch.tensor(columns[name], dtype=torch.int32)
        return packed, sum(bool(encoding.overflowing) for encoding in encodings)

    def words(self, ids: Sequence[int]) -> list[str]:
        """The tokens with these ids, as the vocabulary spells them; "?" where it has none."""
        return [self._library.id_to_token(number) or "?" for number in ids]

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """Characters from which and up to which every token of the (first) text goes; (0, 0) for added tokens."""
        spans: list[tuple[int, int]] = self._library.encode(*text).offsets
        return spans

    def _check(self, ids: Sequence[int], text: Text) -> None:
        if not ids:
            raise DataError(f"text {short(text[0], 40)!r} has no tokens; leave it out, or give another tokenizer")
        if max(ids) >= self.vocabulary:
            raise DataError(
                f"text {short(text[0], 40)!r} has the token {max(ids)}, the model knows {self.vocabulary} (0 to "
                f"{self.vocabulary - 1}); give the tokenizer that the model was trained with"
            )

    @cached_property
    def _padding(self) -> int:
        """The id that fills up texts."""
        declared = (json.loads(self.content).get("padding") or {}).get("pad_id")
        for name in ("[PAD]", "<pad>"):
            if declared is None:
                declared = self._library.token_to_id(name)
        return int(declared or 0)

    @cached_property
    def _library(self) -> Any:
        """The tokenizer of the library, cutting texts that are too long."""
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.content)
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"the tokenizer cannot be read ({short(error)}); give a tokenizer.json") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.longest)
        return tokenizer
