"""Prompt-to-prompt editing (Hertz et al., 2022, arXiv 2208.01626): an edited prompt drawn with the source's maps.

Source and edits are drawn side by side from one start noise. In each cross-attention layer an edit reads its own values
with the source's probabilities, in the first share of the steps (sec. 3.2; `words.Alignment`), and self-attention maps
of low resolution are the source's in a first share, too. Re-weighting multiplies the map of a word by a factor.
Nothing but the processors' probability taps is used, so K and V come from whatever adapters are active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_kernels.attention import AttentionProcessor
from lit_kernels.attention.processor import Tap
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.errors import UsageError
from lit_personalize.sampling.heat_maps import HeatMaps
from lit_personalize.sampling.local_blend import LocalBlend
from lit_personalize.sampling.sampler import SamplingOptions, denoise
from lit_personalize.sampling.words import AlignmentKind, Words, align, words_of


@dataclass(frozen=True)
class EditOptions:
    """How maps of the source are taken over."""

    kind: AlignmentKind = "auto"
    """"replace" (word n takes the attention of word n), "refine" (common tokens take it), "auto" chooses by length."""
    cross_share: float = 0.8
    """Share of the steps, from the start, in which cross-attention maps are the source's."""
    self_share: float = 0.4
    """The same for self-attention maps."""
    self_side: int | None = None
    """Largest side of self-attention maps that are taken over; None is a quarter of the latent's (16 of 64)."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Factors of the maps of words of the edited prompt, while cross-attention maps are taken over."""
    blend: Sequence[str] = ()
    """Words, of the source or of edits, outside of whose maps an edit is the source; none lets it change anywhere."""

    def __post_init__(self) -> None:
        for name, share in (("cross", self.cross_share), ("self", self.self_share)):
            if not 0 <= share <= 1:
                raise UsageError(f"the {name} share is a part of the steps from 0 to 1, not {share:g}")
        if self.self_side is not None and self.self_side < 0:
            raise UsageError(f"the largest side of self-attention maps cannot be {self.self_side}")


class MapEdit:
    """A tap that gives edits the maps of the source; rows of a branch are the source and then the edits.

    Args:
        side: Of the latent, in cells.

    Raises:
        UsageError: The prompts cannot be aligned, or no edit has a word that is to be weighed.
    """

    def __init__(self, base: Base, source: str, edits: Sequence[str], options: EditOptions, side: int):
        self.options, self.rows = options, 1 + len(edits)
        self.limit = (side // 4 if options.self_side is None else options.self_side) ** 2
        """Most cells of a self-attention map that is taken over."""
        words, targets = words_of(base, source), [words_of(base, edit) for edit in edits]
        aligned = [align(words, target, options.kind) for target in targets]
        # [E, 1 head, source, target], and [E, 1 head, 1 cell, target]
        self.map = torch.stack([a.map for a in aligned])[:, None].to(base.device)
        self.shared = torch.stack([a.shared for a in aligned])[:, None, None].to(base.device)
        self.factors = torch.stack([_factors(options.weights, target) for target in targets])[:, None, None]
        self.factors = self.factors.to(base.device)
        for word in options.weights:
            if not any(target.has(word) for target in targets):
                targets[0].positions(word)  # says which words there are
        self.cross = self.own = False

    def at(self, number: int, count: int) -> None:
        """Hear which step comes: which maps are the source's in it."""
        self.cross = number < self.options.cross_share * count
        self.own = number < self.options.self_share * count

    def __call__(self, processor: AttentionProcessor, probabilities: Tensor) -> Tensor | None:
        if not (self.cross if processor.is_cross else self.own):
            return None
        before = len(probabilities) - self.rows  # the unconditional branch, if there is one
        source, edits = probabilities[before : before + 1], probabilities[before + 1 :]
        if processor.is_cross:
            moved = source @ self.map.to(source.dtype)
            edits = (self.shared * moved + (1 - self.shared) * edits) * self.factors
        else:
            edits = source.expand_as(edits)
        return torch.cat([probabilities[: before + 1], edits.to(source.dtype)])


def _factors(weights: Mapping[str, float], words: Words) -> Tensor:
    factors = torch.ones(len(words.ids))
    for word, factor in weights.items():
        if words.has(word):
            factors[words.positions(word)] *= factor
    return factors


@contextmanager
def tapped(base: Base, *taps: Tap, self_limit: int = 0) -> Iterator[None]:
    """Let taps, in order, see the maps of every cross-attention layer, and of self-attention of few cells.

    Args:
        self_limit: Most cells of a self-attention layer that is seen.
    """

    def chain(processor: AttentionProcessor, probabilities: Tensor) -> Tensor:
        for tap in taps:
            changed = tap(processor, probabilities)
            probabilities = probabilities if changed is None else changed
        return probabilities

    before = {name: (processor.tap, processor.tap_limit) for name, processor in base.processors.items()}
    for processor in base.processors.values():
        processor.tap, processor.tap_limit = chain, None if processor.is_cross else self_limit
    try:
        yield
    finally:
        for name, processor in base.processors.items():
            processor.tap, processor.tap_limit = before[name]


@torch.no_grad()
def edit_latents(
    base: Base,
    source: str,
    edits: Sequence[str],
    start: Tensor,
    adapters: Sequence[Adapter] = (),
    options: SamplingOptions | None = None,
    how: EditOptions | None = None,
    unconditional: Tensor | None = None,
    recorder: HeatMaps | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw a prompt and its edits from one start: `[1 + len(edits), C, h, w]`, scaled, the source first.

    Args:
        start: Noise or an inverted latent, `[1, C, h, w]` of unit variance.
        unconditional: Text states of the unconditional branch by step, `[steps, S, E]`, from null-text inversion.
        recorder: Sees the maps of all rows, after they were edited.
        seed: Of the noise that some schedulers add; all rows get the same.

    Raises:
        UsageError: The prompts cannot be aligned or blended, or unconditional states are given without guidance.
    """
    options, how = options or SamplingOptions(), how or EditOptions()
    if unconditional is not None and options.guidance == 1:
        raise UsageError("guidance 1 has no unconditional branch for null-text states; invert by ddim, or raise it")
    editor = MapEdit(base, source, edits, how, start.shape[-1]) if edits else None
    rows = 1 + len(edits)
    blend = LocalBlend([words_of(base, p) for p in (source, *edits)], how.blend) if how.blend and edits else None

    def steer(number: int, count: int, told: Conditioning) -> Conditioning:
        if editor is not None:
            editor.at(number, count)
        if unconditional is None:
            return told
        states = unconditional[number].to(told.states).expand(rows, -1, -1)
        return Conditioning(torch.cat([states, told.states[rows:]]), told.pooled, told.time_ids)

    for adapter in adapters:
        adapter.refresh(base.dtype)
    taps = [tap for tap in (blend, editor, recorder) if tap is not None]  # blend by maps that no edit has replaced
    with base.only(adapters), ExitStack() as stack:
        if taps:
            stack.enter_context(tapped(base, *taps, self_limit=editor.limit if editor else 0))
        start = start.expand(rows, *start.shape[1:])
        after_step = blend.blend if blend else None
        return denoise(base, [source, *edits], [seed] * rows, start, options, steer, after_step)
