"""Tokenises texts for a model: token ids, attention mask, and which of two texts each token belongs to."""

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
"""Names of the inputs for token ids, and for token types: 0 in the first text, 1 in the second one."""

NAMES = (IDS, MASK, KINDS)
"""Inputs that can be made from texts."""

Text = tuple[str, ...]
"""One text, or two that form one sample."""


@dataclass(frozen=True)
class Tokenizer:
    """Turns texts into a model's inputs; `content` is a tokenizer.json of the library `tokenizers`.

    `names` are the inputs in the order in which they are packed; `longest` is the most tokens that the model takes,
    `vocabulary` the number of token ids that it knows.
    """

    content: str
    names: tuple[str, ...] = (IDS, MASK)
    longest: int = 512
    vocabulary: int = 2**24

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Descriptions of the model's inputs: whole numbers of a common length that may vary."""
        high = {IDS: self.vocabulary - 1}
        return tuple(Input(name, (None,), torch.int64, 0, high.get(name, 1)) for name in self.names)

    def encode(self, texts: Sequence[Text]) -> tuple[Tensor, int]:
        """Packed inputs (n, inputs, length) int32, padded to the longest text, and the number of texts that were cut.

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
        """The tokens with these ids as text; "?" for unknown ids."""
        return [self._library.id_to_token(number) or "?" for number in ids]

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """First and end character of every token in the (first) text; (0, 0) for added tokens."""
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
        """The token id for padding."""
        declared = (json.loads(self.content).get("padding") or {}).get("pad_id")
        for name in ("[PAD]", "<pad>"):
            if declared is None:
                declared = self._library.token_to_id(name)
        return int(declared or 0)

    @cached_property
    def _library(self) -> Any:
        """The tokenizer object of the library, set to cut texts that are too long. Raises `ModelError`."""
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.content)
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"the tokenizer cannot be read ({short(error)}); give a tokenizer.json") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.longest)
        return tokenizer
