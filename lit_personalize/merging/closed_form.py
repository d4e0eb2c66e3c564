"""Concepts of Custom Diffusion merged without training: states, constraints and the change of every layer.

The mathematics is in `constrained_key_value`. Targets are the states of the concept's words as the reference method
takes them: of "<new1> cat" all words, of "photo of a <new1> cat" those from the token on, both with the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_personalize.adapters.key_value_delta import LAYERS
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.adapters.shadow import weight_layers
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.merging.constrained_key_value import ConstrainedMerge

SENTENCE = "photo of a"
BATCH = 32
SOME = 64
"""States on which changes are compared."""
TINY = 1e-30


@dataclass(frozen=True)
class Concept:
    """What was learned, and how it is spoken of.

    Args:
        weights: Changes of cross-attention's K and V, and one token.
        phrase: The class noun, or for a style a phrase with {} for the token: "painting in the style of {}".
    """

    weights: AdapterWeights
    phrase: str

    @property
    def token(self) -> str:
        return next(iter(self.weights.tokens))


def merge_concepts(
    base: Base, concepts: Sequence[Concept], captions: Sequence[str], ridge: float = 0.0
) -> tuple[AdapterWeights, dict[str, object]]:
    """One adapter with the tokens of all concepts, an exact LoRA on every K and V; and what to report of it.

    The tokens are added to `base`. A token that an earlier concept has is renamed to the next free <newN>.

    Args:
        captions: C_reg: sentences in which nothing should change; at least as many words as the states are wide.
        ridge: See `ConstrainedMerge`.

    Raises:
        UsageError: Fewer than two concepts, one without exactly one token or with changes elsewhere, or a singular
            problem.
    """
    if len(concepts) < 2:
        raise UsageError("a merge needs at least two concepts")
    for concept in concepts:
        _check(concept)
    named = distinct(concepts)
    tokens = {concept.token: concept.weights.tokens[concept.token] for concept in named}
    LoadedAdapter(AdapterWeights(tokens=tokens), "tokens of the merge").attach(base)
    regularization = caption_states(base, captions)
    parts = without_repeats([target_states(base, concept) for concept in named])
    low_rank = solve([concept.weights for concept in named], parts, regularization, ridge)
    report = {
        "concepts": {concept.token: concept.phrase for concept in named}, "rank": sum(map(len, parts)),
        "captions": len(captions), "states": len(regularization),
        **_compared(base, named, parts, low_rank, regularization),
    }  # fmt: skip
    return AdapterWeights(low_rank=low_rank, tokens=tokens), report


def solve(
    concepts: Sequence[AdapterWeights], parts: Sequence[Tensor], regularization: Tensor, ridge: float = 0.0
) -> dict[str, LowRank]:
    """The merged change of every layer that a concept changes, as factors of rank s.

    Args:
        parts: Target states `[s_n, d]` of every concept, s in all.
        regularization: C_reg `[n, d]`.
    """
    merge = ConstrainedMerge(regularization, torch.cat(list(parts)), ridge)
    down, found = merge.down.float(), {}
    for layer in dict.fromkeys(layer for weights in concepts for layer in weights.layers()):
        width = next(_width(weights, layer) for weights in concepts if layer in weights.layers())
        changes = [_changed(weights, layer, part, width) for weights, part in zip(concepts, parts, strict=True)]
        found[layer] = LowRank(down.clone(), merge.up(torch.cat(changes)).float(), float(len(down)))
    return found


def _compared(
    base: Base, concepts: Sequence[Concept], parts: Sequence[Tensor], low_rank: dict[str, LowRank], states: Tensor
) -> dict[str, float]:
    """How well targets are met, and how much less captions change than where the concepts' changes are added.

    Changes are relative to what W0 makes of the states, the mean over layers; of `SOME` captions' states.
    """
    some = states[:: max(1, len(states) // SOME)]
    frozen = {f"unet.{path}": module.weight for path, module in weight_layers(base.unet).items()}
    misses, merged, added = [], [], []
    for layer, factors in low_rank.items():
        width = len(frozen[layer])
        for concept, part in zip(concepts, parts, strict=True):
            wanted = _changed(concept.weights, layer, part, width)
            misses.append(float((_product(factors, part) - wanted).norm() / wanted.norm().clamp_min(TINY)))
        before = (some @ frozen[layer].detach().double().cpu().T).norm()
        merged.append(float(_product(factors, some).norm() / before))
        together = torch.stack([_changed(concept.weights, layer, some, width) for concept in concepts]).sum(0)
        added.append(float(together.norm() / before))
    return {"largest miss of a target": max(misses), "change on captions": sum(merged) / len(merged),
            "change on captions by addition": sum(added) / len(added)}  # fmt: skip


def _check(concept: Concept) -> None:
    if len(concept.weights.tokens) != 1:
        raise UsageError(f"{concept.phrase!r} has {len(concept.weights.tokens)} tokens; a concept has exactly one")
    endings = LAYERS["cross_kv"]
    if others := [layer for layer in concept.weights.layers() if not layer.endswith(endings)]:
        raise UsageError(
            f"{concept.phrase!r} changes {others[0]}; this merge is of cross-attention's K and V alone: use another"
        )
    if not concept.weights.layers():
        raise UsageError(f"{concept.phrase!r} changes no K or V: nothing is to be merged")


def distinct(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts with a token of their own each."""
    taken: set[str] = set()
    found = []
    for concept in concepts:
        token = concept.token
        number = 1
        while token in taken:
            token, number = f"<new{number}>", number + 1
        taken.add(token)
        rows = concept.weights.tokens[concept.token]
        found.append(replace(concept, weights=replace(concept.weights, tokens={token: rows})))
    return found


@torch.no_grad()
def caption_states(base: Base, captions: Sequence[str]) -> Tensor:
    """States fp64 `[n, d]` of all words of the captions and of their end tokens, on the CPU."""
    rows = []
    for start in range(0, len(captions), BATCH):
        rows += _rows(base, captions[start : start + BATCH])
    return torch.cat(rows)


@torch.no_grad()
def target_states(base: Base, concept: Concept) -> Tensor:
    """States fp64 `[s, d]` of a concept's words."""
    if "{}" in concept.phrase:
        return _rows(base, [concept.phrase.format(concept.token)])[0]
    words = f"{concept.token} {concept.phrase}"
    alone, inside = _rows(base, [words, f"{SENTENCE} {words}"])
    before = len(base.tokenizers[0](SENTENCE, add_special_tokens=False).input_ids)
    return torch.cat([alone, inside[before:]])


def _rows(base: Base, captions: Sequence[str]) -> list[Tensor]:
    """Of each caption the states from the first word to the end token."""
    ids = base.tokenize(captions)
    states, _ = base.encode_text([i.to(base.device) for i in ids])
    ends = (ids[0] == base.tokenizers[0].eos_token_id).int().argmax(1).tolist()
    return [row[1 : end + 1].double().cpu() for row, end in zip(states, ends, strict=True)]


def without_repeats(parts: Iterable[Tensor]) -> list[Tensor]:
    """Each part without the rows that it or an earlier one has."""
    seen: set[bytes] = set()
    found = []
    for part in parts:
        keys = [row.numpy().tobytes() for row in part]
        new = [i for i, key in enumerate(keys) if key not in seen and key not in keys[:i]]
        seen.update(keys)
        found.append(part[new])
    return found


def _width(weights: AdapterWeights, layer: str) -> int:
    return len(weights.dense[layer]) if layer in weights.dense else len(weights.low_rank[layer].up)


def _changed(weights: AdapterWeights, layer: str, states: Tensor, width: int) -> Tensor:
    """ΔW c `[n, width]` for states `[n, d]`; zeros where the concept left the layer as it was."""
    found = torch.zeros(len(states), width, dtype=states.dtype)
    if layer in weights.low_rank:
        found = found + _product(weights.low_rank[layer], states)
    if layer in weights.dense:
        found = found + states @ weights.dense[layer].double().T
    return found


def _product(factors: LowRank, states: Tensor) -> Tensor:
    """s B A c for states `[n, d]`, in fp64."""
    scale = factors.alpha / factors.rank
    return scale * (states @ factors.down.double().T) @ factors.up.double().T
