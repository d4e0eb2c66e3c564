"""The difference of two full models as a LoRA: ΔW = W_tuned - W_base of every layer, truncated.

Only linear and convolution weights fit into LoRA factors, and of those a few are known to no stock client. What else
changed is counted, with its share of the whole change, so that it shows how much of a fine-tuning is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import matrix_shape, weight_layers
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError
from lit_personalize.merging.arithmetic import Energy
from lit_personalize.merging.truncation import Cut, truncate_dense
from lit_personalize.merging.writing import MergeReport, check_output, write_merged

DEFAULT = Cut(energy=0.99)
UNKNOWN_TO_CLIENTS = ("unet.add_embedding.*", "text_encoder_2.text_projection")
"""Layers that diffusers does not load from a kohya file, or from none."""


@dataclass
class Left:
    """Weights of one kind that changed and that a LoRA does not carry."""

    tensors: int = 0
    energy: float = 0.0
    share: float = 0.0
    """Of the energy of the whole difference."""

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.share:.2%} of the change"


@dataclass
class Difference:
    """What distinguishes a tuned model from its base."""

    weights: AdapterWeights = field(default_factory=AdapterWeights)
    energy: Energy = field(default_factory=Energy)
    left: dict[str, Left] = field(default_factory=dict)
    """By kind: norms, biases, embeddings, other layers, vae."""


@torch.no_grad()
def difference(base: Base, tuned: Base, cut: Cut = DEFAULT) -> Difference:
    """Factor the difference of two models of one architecture; new words of the tuned tokenizers become tokens.

    A tuned weight that equals the base's in fp16 or bf16 has not changed: the model was only stored in less precision.

    Raises:
        DataError: The models are of different architectures, or the same.
    """
    found = Difference()
    theirs = tuned.components()
    for component, own in base.components().items():
        _same_architecture(component, own, theirs.get(component), tuned)
        layers = {} if component == "vae" else weight_layers(own)
        carried = {f"{path}.weight": (path, module) for path, module in layers.items()}
        for name, weight in own.state_dict().items():
            delta = _change(weight, theirs[component].state_dict()[name])
            if delta is None:
                continue
            path, module = carried.get(name, ("", None))
            if module is None or any(fnmatchcase(f"{component}.{path}", known) for known in UNKNOWN_TO_CLIENTS):
                left = found.left.setdefault(_kind(component, own, name), Left())
                left.tensors, left.energy = left.tensors + 1, left.energy + float(delta.square().sum())
                continue
            layer = f"{component}.{path}"
            factors = truncate_dense(delta.reshape(matrix_shape(module)), cut)
            found.energy.add(layer, factors)
            found.weights.low_rank[layer] = factors.low_rank(weight.shape)
    found.weights.tokens = _new_tokens(base, tuned)
    whole = found.energy.exact + sum(left.energy for left in found.left.values())
    if not whole and not found.weights.tokens:
        raise DataError(f"{tuned.source} has the weights of {base.source}: there is no difference to extract")
    for left in found.left.values():
        left.share = left.energy / whole
    return found


def extract(
    base: str | Base,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    config: str | Path | None = None,
    formats: tuple[str, ...] | list[str] = ("diffusers", "kohya"),
    verify: bool = True,
    prompt: str | None = None,
) -> MergeReport:
    """Write the difference of a tuned model and its base as an adapter, verified through the stock client.

    Args:
        tuned: Diffusers directory, or a single file.
        rank: Largest rank of a layer; without it and `energy`, layers keep 0.99 of their energy.
        energy: Smallest share of every layer's energy to keep.
        config: Of a single-file `tuned`: directory with configs and tokenizers.

    Raises:
        DataError: See `difference`; or a model cannot be read.
        UsageError: Rank or energy out of range, or the output folder holds other files.
    """
    cut = Cut(rank, energy) or DEFAULT
    check_output(Path(output), [Path(tuned)], formats)
    built = base if isinstance(base, Base) else load_base(base)
    found = difference(built, load_base(tuned, config=config, device=built.device), cut)
    adapters: list[dict[str, Any]] = [{"name": str(tuned), "strength": 1.0, "layers": len(found.weights.low_rank)}]
    report = MergeReport("extract", str(output), adapters)
    report.options = {"rank": cut.rank} if cut.rank else {"energy": cut.energy}
    report.extra = {f"left out, {kind}": str(left) for kind, left in found.left.items()}
    return write_merged(found.weights, found.energy, report, built, formats, verify, prompt)


def _same_architecture(component: str, own: nn.Module, other: nn.Module | None, tuned: Base) -> None:
    if other is None:
        raise DataError(f"{tuned.source} has no {component}: it is a model of another architecture")
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (own, other)]
    for name in [*shapes[0], *shapes[1]]:
        mine, theirs = (s.get(name) for s in shapes)
        grown = mine and theirs and mine[1:] == theirs[1:] and name.endswith("token_embedding.weight")
        if mine != theirs and not grown:
            raise DataError(
                f"{tuned.source} was tuned from another base: its {component}.{name} is {theirs or 'missing'}, "
                f"the base's is {mine or 'missing'}"
            )


def _change(weight: Tensor, tuned: Tensor) -> Tensor | None:
    """W_tuned - W_base in fp64, or None where nothing but the precision changed."""
    tuned = tuned[: len(weight)] if weight.ndim else tuned  # rows of added words are tokens
    if not weight.is_floating_point() or torch.equal(weight, tuned):
        return None
    if any(torch.equal(weight.to(dtype).to(weight.dtype), tuned) for dtype in (torch.float16, torch.bfloat16)):
        return None
    return tuned.double() - weight.double()


def _kind(component: str, module: nn.Module, name: str) -> str:
    """What a weight is that LoRA does not carry."""
    if component == "vae":
        return "vae"
    owner = module.get_submodule(name.rpartition(".")[0])
    if "Norm" in type(owner).__name__:
        return "norms"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    return "biases" if name.endswith(".bias") else "other layers"


def _new_tokens(base: Base, tuned: Base) -> dict[str, list[Tensor]]:
    """Words that only the tuned tokenizers know, with their rows; `<t>_1`, `<t>_2` are further rows of `<t>`."""
    found: dict[str, list[Tensor]] = {}
    pairs = zip(base.tokenizers, tuned.tokenizers, tuned.text_encoders, strict=True)
    for own, theirs, encoder in pairs:
        known, vocabulary = set(own.get_vocab()), theirs.get_vocab()
        new = sorted((word for word in vocabulary if word not in known), key=vocabulary.__getitem__)
        embedding = encoder.get_input_embeddings().weight  # type: ignore[operator]
        for word in (w for w in new if re.sub(r"_\d+$", "", w) not in new or not re.search(r"_\d+$", w)):
            count = 1
            while f"{word}_{count}" in vocabulary:
                count += 1
            ids = [vocabulary[w] for w in (word, *(f"{word}_{i}" for i in range(1, count)))]
            found.setdefault(word, []).append(embedding[ids].float().cpu().clone())
    if uneven := [word for word, rows in found.items() if len(rows) != len(base.tokenizers)]:
        raise DataError(f"{tuned.source} knows the word {uneven[0]} in one of its tokenizers only")
    return found
