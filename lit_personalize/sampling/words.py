"""Words of a prompt by their token positions, and which tokens of two prompts correspond.

An alignment of a source and a target prompt says of every target position n where its attention comes from:

    P'[n] = shared[n] · Σ_w P_source[w] map[w, n] + (1 - shared[n]) · P_target[n].

Positions are those of the base's text states: start, words, end, padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

AlignmentKind = Literal["auto", "replace", "refine"]


@dataclass(frozen=True)
class Words:
    """A prompt: its words as typed, the positions `[first, last)` of each, and the ids of all positions."""

    words: list[str]
    spans: list[tuple[int, int]]
    ids: list[int]
    end: int
    """Position of the end token; what follows is padding."""

    def has(self, word: str) -> bool:
        return plain(word) in map(plain, self.words)

    def positions(self, word: str) -> list[int]:
        """Positions of every occurrence of a word; case and punctuation around it do not count.

        Raises:
            UsageError: The prompt has no such word.
        """
        wanted = plain(word)
        found = [p for w, span in zip(self.words, self.spans, strict=True) if plain(w) == wanted for p in range(*span)]
        if not found:
            raise UsageError(f"the prompt has no word {word!r}; its words are {', '.join(map(plain, self.words))}")
        return found


@dataclass(frozen=True)
class Alignment:
    """See the module: `map` fp32 `[S, S]` from source to target positions, `shared` fp32 `[S]`."""

    map: Tensor
    shared: Tensor


def plain(word: str) -> str:
    """A word in small letters without the punctuation around it."""
    return word.strip(".,;:!?\"'()").lower() or word


def words_of(base: Base, prompt: str) -> Words:
    """Find the tokens of every word; a concept's token of several vectors is one word.

    Raises:
        UsageError: The prompt is longer than the text encoder reads, or two tokenizers cut it differently.
    """
    cut = [_cut(base, number, prompt) for number in range(len(base.tokenizers))]
    if any(other.spans != cut[0].spans for other in cut[1:]):
        raise UsageError(f"the tokenizers of {base.source} cut {prompt!r} differently: its words have no one position")
    return cut[0]


def _cut(base: Base, number: int, prompt: str) -> Words:
    tokenizer = base.tokenizers[number]
    ids = base.tokenize([prompt])[number][0].tolist()
    words, spans, place = prompt.split(), [], 1
    for word in words:
        pieces = tokenizer(base.expand(word), add_special_tokens=False).input_ids
        if ids[place : place + len(pieces)] != pieces or place + len(pieces) >= len(ids):
            raise UsageError(
                f"{prompt!r} is too long or cannot be cut at {word!r}; an edit needs every word: shorten it"
            )
        spans.append((place, place + len(pieces)))
        place += len(pieces)
    return Words(words, spans, ids, place)


def align(source: Words, target: Words, kind: AlignmentKind = "auto") -> Alignment:
    """Align two prompts; "auto" replaces where both have the same number of words, else refines.

    Raises:
        UsageError: "replace", and the prompts differ in their number of words.
    """
    same = len(source.words) == len(target.words)
    if kind == "replace" and not same:
        raise UsageError(
            f"replace needs prompts of as many words: {len(source.words)} in {' '.join(source.words)!r}, "
            f"{len(target.words)} in {' '.join(target.words)!r}; leave the kind out, or say refine"
        )
    return (
        _replacement(source, target) if kind == "replace" or (kind == "auto" and same) else _refinement(source, target)
    )


def _replacement(source: Words, target: Words) -> Alignment:
    """Word n takes the attention of word n. Each source row of the map sums to 1: no attention is lost."""
    size = len(source.ids)
    table = torch.zeros(size, size)
    table[0, 0] = table[source.end, target.end] = 1
    for (a, b), (c, d) in zip(source.spans, target.spans, strict=True):
        table[a:b, c:d] = torch.eye(b - a) if b - a == d - c else 1 / (d - c)
    common = size - 1 - max(source.end, target.end)
    for n in range(1, common + 1):
        table[source.end + n, target.end + n] = 1
    table[source.end + common + 1 :, target.end + common] = 1  # padding that only the source has
    if common and (extra := size - 1 - target.end - common):  # padding that only the target has
        table[source.end + common, target.end + common :] = 1 / (extra + 1)
    return Alignment(table, torch.ones(size))


def _refinement(source: Words, target: Words) -> Alignment:
    """Tokens that both prompts have in order (a longest common subsequence) keep their attention, others their own.

    That is Needleman and Wunsch (1970) with gap 0, match 1 and mismatch -1, as the reference implementation aligns.
    """
    size = len(source.ids)
    table, shared = torch.zeros(size, size), torch.zeros(size)
    pairs = _common(source.ids[: source.end + 1], target.ids[: target.end + 1])
    padding = range(1, size - max(source.end, target.end))
    for w, n in [*pairs, *((source.end + i, target.end + i) for i in padding)]:
        table[w, n] = shared[n] = 1
    return Alignment(table, shared)


def _common(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    """Positions in both of a longest common subsequence."""
    best = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i, j] = best[i + 1, j + 1] + 1 if a[i] == b[j] else max(best[i + 1, j], best[i, j + 1])
    i = j = 0
    pairs = []
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1, j] >= best[i, j + 1]:
            i += 1
        else:
            j += 1
    return pairs
