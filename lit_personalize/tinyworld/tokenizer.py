"""The tokenizer of tinyworld: a stock `CLIPTokenizer` in which every word of the grammar is one token.

The merges come from byte-pair training on the word list alone, carried on until every word is whole
(Sennrich et al. 2016, "Neural machine translation of rare words with subword units", algorithm 1),
so that applying them in order rebuilds each word. Any other word falls back to pieces and bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

from lit_personalize.tinyworld import captions
from lit_personalize.tinyworld import vocabulary as v

MODEL_MAX_LENGTH = 40
START, END = "<|startoftext|>", "<|endoftext|>"

# Words that prompts use though no caption of the grammar does: the templates of textual inversion and
# DreamBooth, the prompt tags of Custom Diffusion, the prompts of the evaluation suites, rare identifiers.
PROMPT_WORDS = (
    "a an the of in on at to from with without and or by for as is are it its my your this that these two three one "
    "photo photograph picture image rendering rendition depiction drawing sketch painting illustration art artwork "
    "poster icon logo sculpture figurine toy plush sticker close up closeup cropped zoomed far away very near next "
    "front behind under over top side inside outside between beside small big large little tiny huge clean dirty dark "
    "bright light cool nice weird good bad new old many plain style color colour colored shape object thing subject "
    "animal character face man woman people wearing holding standing sitting swimming jumping flying sleeping running "
    "looking background backdrop scene landscape floating surrounded cat dog house tree flower mountain river lake "
    "street wooden metal glass stone water grass sky sun moon cloud rain red green blue concept attribute empty "
    "sks zwx ktn pll ucd olis"
)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _strings(item)


def world_words() -> list[str]:
    """Every word that is to be one token, sorted: the vocabulary's, the captions' and the prompts'."""
    texts = [PROMPT_WORDS]
    for module in (v, captions):
        for name, value in vars(module).items():
            if name.isupper() and name not in ("GLYPHS", "CRITTER_BODY"):
                texts.extend(_strings(value))
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    return sorted(words | {"letter", "letters", "clothes"})


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that rebuild every word (ASCII letters) as one `word</w>` symbol."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(symbols) > 1 for symbols in split):
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols in split:
            pairs.update(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(symbols, best) for symbols in split]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write the tokenizer's stock files into `folder` and return it as a client would load it.

    Ids as in CLIP: bytes, bytes that end a word, merges, then the start and the end token; padding
    with the end token, as Stable Diffusion 1 does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(world_words())
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MODEL_MAX_LENGTH, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    # Clients that know no tokenizer.json (transformers 4, ComfyUI's loader) read these two.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
