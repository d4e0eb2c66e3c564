"""What is merged: adapters with their strengths, by layer and as factors; and the tokens that they bring along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import layers_of
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.loading import exports_of, read_adapter
from lit_personalize.merging.truncation import Factors


@dataclass(frozen=True)
class BlockStrength:
    """A factor for the layers that a pattern names, of every adapter or of one.

    `up_blocks.1` names every layer with these parts of its path in a row (so not `up_blocks.10`); each part may hold
    `*` and `?`. Where several fit a layer, the last counts.
    """

    pattern: str
    factor: float
    adapter: int | None = None
    """Number of the adapter, from 1; None is every adapter."""

    @classmethod
    def parse(cls, text: str) -> BlockStrength:
        """Read `[N:]PATTERN=FACTOR`.

        Raises:
            UsageError: It is something else.
        """
        match = re.fullmatch(r"(?:(\d+):)?([^=:]+)=([^=]+)", text)
        try:
            if match is None:
                raise ValueError
            return cls(match[2], float(match[3]), int(match[1]) if match[1] else None)
        except ValueError:
            raise UsageError(
                f"block strength {text!r} is no [N:]PATTERN=FACTOR, such as up_blocks.1=0.5 or 2:attn2=0"
            ) from None

    def fits(self, layer: str) -> bool:
        parts, wanted = layer.split("."), self.pattern.split(".")
        starts = range(len(parts) - len(wanted) + 1)
        return any(all(map(fnmatchcase, parts[i : i + len(wanted)], wanted)) for i in starts)


@dataclass
class Source:
    """One adapter and how strongly it takes part."""

    name: str
    weights: AdapterWeights
    strength: float = 1.0
    blocks: Sequence[BlockStrength] = field(default_factory=list)
    """Those that concern this adapter."""

    def scale(self, layer: str) -> float:
        """Strength of one layer."""
        found = [b.factor for b in self.blocks if b.fits(layer)]
        return self.strength * (found[-1] if found else 1.0)

    def layers(self) -> list[str]:
        """Layers that the adapter changes at its strengths."""
        return [layer for layer in self.weights.layers() if self.scale(layer)]

    def rank(self, layer: str) -> int:
        """Columns of the factors; of a dense change the smaller side."""
        rank = self.weights.low_rank[layer].rank if layer in self.weights.low_rank else 0
        if layer in self.weights.dense:
            rank += min(self.weights.dense[layer].shape)
        return rank

    def factors(self, layer: str) -> Factors:
        """strength · ΔW of one layer; a dense change stands beside an identity, which is exact."""
        scale = self.scale(layer)
        ups, downs = [], []
        if layer in self.weights.low_rank:
            low = self.weights.low_rank[layer]
            ups.append(low.up.flatten(1).double() * (scale * low.alpha / low.rank))
            downs.append(low.down.flatten(1).double())
        if layer in self.weights.dense:
            dense = scale * self.weights.dense[layer].double()
            out, width = dense.shape
            ups.append(torch.eye(out, dtype=torch.double) if out <= width else dense)
            downs.append(dense if out <= width else torch.eye(width, dtype=torch.double))
        return Factors(torch.cat(ups, 1), torch.cat(downs))

    def delta(self, layer: str) -> Tensor:
        """strength · ΔW `[out, in]`, fp64."""
        return self.scale(layer) * self._exact(layer)

    def _exact(self, layer: str) -> Tensor:
        low, dense = self.weights.low_rank.get(layer), self.weights.dense.get(layer)
        if low is None:
            return self.weights.dense[layer].double()
        product = (low.alpha / low.rank) * (low.up.flatten(1).double() @ low.down.flatten(1).double())
        return product if dense is None else product + dense.double()


def read_sources(
    adapters: Sequence[tuple[Path, float]],
    base: Base,
    blocks: Sequence[BlockStrength] = (),
    renames: Mapping[tuple[int, str], str] | None = None,
    force: bool = False,
) -> list[Source]:
    """Read every adapter (file, folder or run) for one base.

    Args:
        adapters: Path and strength of each.
        renames: (number of the adapter from 1, token) -> its new name.

    Raises:
        DataError: See `export.loading.read_adapter`.
        UsageError: A block strength fits no layer, a rename names a token that is not there, or an adapter changes
            norms or biases.
    """
    sources = []
    for number, (path, strength) in enumerate(adapters, 1):
        own = [b for b in blocks if b.adapter in (None, number)]
        source = Source(str(path), matrices_only(read_adapter(exports_of(path), base, force), str(path)), strength, own)
        _rename(source, {old: new for (n, old), new in (renames or {}).items() if n == number}, base)
        sources.append(source)
    for block in blocks:
        concerned = sources if block.adapter is None else sources[block.adapter - 1 : block.adapter]
        if not any(block.fits(layer) for source in concerned for layer in source.weights.layers()):
            raise UsageError(f"block strength {block.pattern}: no layer of {_names(concerned)} has this in its name")
    if wrong := [n for n, _ in renames or {} if not 1 <= n <= len(sources)]:
        raise UsageError(f"a token of adapter {wrong[0]} is to be renamed, but there are {len(sources)} adapters")
    return sources


def matrices_only(weights: AdapterWeights, name: str) -> AdapterWeights:
    """The same weights.

    Raises:
        UsageError: They change norms, biases or embeddings, which no LoRA holds.
    """
    if weights.parameters:
        raise UsageError(
            f"{name} changes {len(weights.parameters)} norms, biases or embeddings, such as {min(weights.parameters)}, "
            "which a merge would lose; merge its LoRA instead (litp export --formats diffusers, or litp merge extract)"
        )
    return weights


def _names(sources: Iterable[Source]) -> str:
    return " or ".join(source.name for source in sources) or "these adapters"


def _rename(source: Source, names: Mapping[str, str], base: Base) -> None:
    tokens = source.weights.tokens
    if missing := [old for old in names if old not in tokens]:
        raise UsageError(f"{source.name} has no token {missing[0]} to rename; it has {', '.join(tokens) or 'none'}")
    words = {word for tokenizer in base.tokenizers for word in tokenizer.get_vocab()}
    for new in names.values():
        if any(c.isspace() for c in new):
            raise UsageError(f"token {new!r} must be one word without spaces, such as <new2>")
        if new in words or f"{new.lower()}</w>" in words:
            raise UsageError(f"token {new!r} is in the vocabulary of {base.source} already; choose another")
    renamed = [names.get(token, token) for token in tokens]
    if twice := [token for token in renamed if renamed.count(token) > 1]:
        raise UsageError(f"{source.name} would have two tokens {twice[0]}; choose another name")
    source.weights.tokens = dict(zip(renamed, tokens.values(), strict=True))


def tokens_of(sources: Sequence[Source]) -> dict[str, list[Tensor]]:
    """The tokens of all adapters; the same token with the same rows counts once.

    Raises:
        DataError: Two adapters have a token of one name.
    """
    found: dict[str, list[Tensor]] = {}
    owner: dict[str, str] = {}
    for number, source in enumerate(sources, 1):
        for token, rows in source.weights.tokens.items():
            if token not in found:
                found[token], owner[token] = rows, source.name
            elif len(found[token]) != len(rows) or not all(map(torch.equal, found[token], rows)):
                raise DataError(
                    f"token {token} is in {owner[token]} and, with other rows, in {source.name}; "
                    f"rename one: --rename '{number}:{token}=<other>'"
                )
    return found


def weight_shapes(base: Base) -> dict[str, torch.Size]:
    """Shape of the weight of every linear and convolution layer of UNet and text encoders, by `<component>.<path>`."""
    parts = {c: module for c, module in base.components().items() if c != "vae"}
    return {layer: m.weight.shape for layer, m in layers_of(parts).items()}
