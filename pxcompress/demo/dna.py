"""The embedded data set `dna`: random DNA sequences with two motifs planted at known places.

A class is a pair of the four motifs, so that no single motif tells it, and both have to be found, in either order. A
sample depends only on its part, its index and the seed; letters of a planted motif are now and then wrong, and the
share of G and C in the background changes from sample to sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Numbers, Samples, Source
from pxcompress.demo.baseline import GeneratedData

LETTERS = "ACGT"
LENGTH = 200
MOTIFS = ("TGACTCAGCA", "GGGCGGAAGT", "CACGTGTTAC", "TATAAAGCCA")
PAIRS = tuple(combinations(range(len(MOTIFS)), 2))
CLASSES = tuple(f"{MOTIFS[first]}+{MOTIFS[second]}" for first, second in PAIRS)
PARTS = ("train", "select", "held-out")
LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}

ERRORS = 0.1
"""Share of the letters of a planted motif that are replaced by random ones."""

Mask = NDArray[np.bool_]


@EMBEDDED.register("dna")
@dataclass(frozen=True)
class DNA(GeneratedData):
    """Random DNA sequences with two motifs planted in each."""

    def source(self, spec: str) -> Source:
        """The data: the first sequences of each part, one-hot, as many as the options say."""

        def pool(part: str, count: int) -> Samples:
            letters, labels = dna_arrays(part, count)
            return Samples.of([f"dna/{part}/{index}" for index in range(count)], labels, Numbers(letters))

        pools = self.pools(pool)
        return Source(spec, CLASSES, True, (4, LENGTH), *pools, limits=LIMITS, mask=find_planted, letters=LETTERS)


def dna_sample(part: str, index: int, seed: int = 0) -> tuple[NDArray[np.uint8], Mask]:
    """Sample `index` of a part: one-hot letters (4, length), and a mask (length,) of where motifs were planted.

    Its label is `index` modulo the number of classes.
    """
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    strong = rng.uniform(0.3, 0.7) / 2
    letters = np.searchsorted((0.5 - strong, 0.5, 0.5 + strong), rng.uniform(size=LENGTH))
    is_motif = np.zeros(LENGTH, np.bool_)
    pair = rng.permutation(PAIRS[index % len(PAIRS)])
    for motif, start in zip(pair, _draw_starts(rng, [len(MOTIFS[motif]) for motif in pair]), strict=True):
        place = slice(start, start + len(MOTIFS[motif]))
        motif_letters = rng.integers(4, size=len(MOTIFS[motif]))
        is_wrong = rng.uniform(size=len(motif_letters)) < ERRORS
        letters[place] = np.where(is_wrong, motif_letters, [LETTERS.index(letter) for letter in MOTIFS[motif]])
        is_motif[place] = True
    return (letters == np.arange(4)[:, None]).astype(np.uint8), is_motif


def dna_arrays(part: str, count: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first `count` samples of a part: (n, 4, length) uint8, and labels (n,) that cycle through the classes."""
    letters = np.stack([dna_sample(part, index, seed)[0] for index in range(count)])
    return letters, np.arange(count, dtype=np.int64) % len(CLASSES)


def find_planted(sample: str) -> Mask:
    """Mask of the planted motifs in the sample with this id, such as "dna/train/17": (length,)."""
    _, part, index = sample.split("/")
    return dna_sample(part, int(index))[1]


def _draw_starts(rng: np.random.Generator, lengths: list[int]) -> list[int]:
    """Random start positions for pieces of these lengths, in this order, without overlap, all ways equally likely."""
    gaps = np.sort(rng.integers(0, LENGTH - sum(lengths) + 1, len(lengths)))
    return [int(gap) + sum(lengths[:place]) for place, gap in enumerate(gaps)]
