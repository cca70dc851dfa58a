"""The embedded data set `notes`: generated texts for which the words that decide the class are known.

A note is a line of small talk in which two of four topics come up; the class is the pair. Where a third topic comes up
in passing, by one word, the two have two words each, so that words have to be weighed against each other. A sample
depends only on its part, its index and the seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source
from pxcompress.data.texts import Texts
from pxcompress.demo.baseline import GeneratedData
from pxcompress.models.tokens import Tokenizer

TOPICS = {
    "weather": ("rain", "snow", "wind", "fog", "hail", "storm", "frost", "sun"),
    "travel": ("train", "ticket", "airport", "ferry", "luggage", "hotel", "bus", "harbour"),
    "food": ("soup", "bread", "cheese", "apple", "rice", "lunch", "pepper", "honey"),
    "work": ("meeting", "invoice", "deadline", "office", "salary", "report", "client", "desk"),
}
SMALL_TALK = (
    "the a this that we you they she he it was is has had will can may one two some many here there today "
    "yesterday again still just very quite rather perhaps maybe then now when where while because though "
    "after before with near from into over under about around old new long short big small good fine late "
    "early quiet loud green blue red house street garden window door table chair book page letter word song "
    "picture river tree field hill road morning evening night day week year friend neighbour sister brother "
    "people child dog cat bird said asked told heard saw found left came went took gave made kept looked "
    "waited walked talked "
)
FILLERS = tuple(SMALL_TALK.split())
PAIRS = tuple(combinations(range(len(TOPICS)), 2))
CLASSES = tuple("+".join(list(TOPICS)[topic] for topic in pair) for pair in PAIRS)
PARTS = ("train", "select", "held-out")
LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}
SHORTEST, LONGEST = 8, 40
"""Smallest and largest number of words of a note."""

IN_PASSING = 0.5
"""Share of the notes in which a third topic is mentioned, by one word."""

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *FILLERS, *(word for topic in TOPICS.values() for word in topic))


def _make_tokenizer_json() -> str:
    """A tokenizer file for the library tokenizers: one token a word, "[CLS]" in front and "[SEP]" behind."""
    special = [
        {"id": number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, name in enumerate(SPECIAL)
    ]
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    added = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [
                *single,
                {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
            ],
            "special_tokens": added,
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(WORDS)},
            "unk_token": "[UNK]",
        },
    }
    return json.dumps(content)


TOKENIZER = Tokenizer(_make_tokenizer_json(), longest=LONGEST + 2, vocabulary=len(WORDS))


@EMBEDDED.register("notes")
@dataclass(frozen=True)
class Notes(GeneratedData):
    """Generated texts with two topics each, some with a third topic mentioned in passing."""

    def source(self, spec: str) -> Source:
        """The first texts of each part."""

        def pool(part: str, count: int) -> Samples:
            texts = Texts(tuple((note(part, index)[0],) for index in range(count)))
            labels = np.arange(count, dtype=np.int64) % len(CLASSES)
            return Samples.of([f"notes/{part}/{index}" for index in range(count)], labels, texts)

        return Source(spec, CLASSES, True, None, *self.pools(pool), limits=LIMITS, mask=find_planted)


def note(part: str, index: int, seed: int = 0) -> tuple[str, NDArray[np.bool_]]:
    """Generate text `index` of a part, and a mask (words,) of the words about its two topics.

    Its label, `index` modulo 6, is the pair of topics.
    """
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    pair = PAIRS[index % len(PAIRS)]
    in_passing = bool(rng.uniform() < IN_PASSING)
    evidence = [_draw_word(rng, topic) for topic in pair for _ in range(2 if in_passing else int(rng.integers(1, 3)))]
    others = [topic for topic in range(len(TOPICS)) if topic not in pair]
    others_words = [_draw_word(rng, int(rng.choice(others)))] if in_passing else []
    length = int(rng.integers(SHORTEST, LONGEST + 1)) - len(evidence) - len(others_words)
    words = [*evidence, *others_words, *(str(word) for word in rng.choice(FILLERS, length))]
    order = rng.permutation(len(words))
    return " ".join(words[place] for place in order), order < len(evidence)


def find_planted(sample: str) -> NDArray[np.bool_]:
    """Mask (2 + words,) of the tokens that decide the class, for the sample with this id, such as "notes/train/17"."""
    _, part, index = sample.split("/")
    return np.pad(note(part, int(index))[1], 1)


def _draw_word(rng: np.random.Generator, topic: int) -> str:
    return str(rng.choice(list(TOPICS.values())[topic]))
