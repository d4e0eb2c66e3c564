"""B-LoRA (Frenkel et al., 2024, arXiv 2403.14572): content of one picture, style of another, from two blocks of SDXL.

A LoRA trained on one picture holds its content in the first transformer of the first up block and its style in the
second. Either half works without the other: a mixture takes the one from A and the other from B, and adds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, UsageError
from lit_personalize.merging.arithmetic import Energy
from lit_personalize.merging.merge import Given, described, paths_and_strengths
from lit_personalize.merging.sources import Source, read_sources, tokens_of
from lit_personalize.merging.writing import MergeReport, check_output, write_merged

HALVES = {"content": "unet.up_blocks.0.attentions.0.", "style": "unet.up_blocks.0.attentions.1."}
Scale = Literal["linear", "reference"]


def half(source: Source, which: str, scale: Scale = "linear") -> AdapterWeights:
    """The content or the style half of an adapter, exact.

    Args:
        scale: "linear": ΔW·α at strength α, as in every client. "reference": ΔW·α², what the method's own code does,
            which multiplies A and B by α each.

    Raises:
        DataError: The adapter changes nothing there.
    """
    found = AdapterWeights()
    for layer in (name for name in source.layers() if name.startswith(HALVES[which])):
        strength = source.scale(layer) ** (2 if scale == "reference" else 1)
        if layer in source.weights.low_rank:
            low = source.weights.low_rank[layer]
            found.low_rank[layer] = LowRank(low.down, low.up * strength, low.alpha)
        if layer in source.weights.dense:
            found.dense[layer] = source.weights.dense[layer] * strength
    if not found.layers():
        raise DataError(f"{source.name} changes no layer of {HALVES[which]}*, the {which} half of a B-LoRA")
    return found


def mix(
    output: str | Path,
    content: Given | None = None,
    style: Given | None = None,
    base: str | Base = "tinyworld",
    *,
    scale: Scale = "linear",
    renames: dict[tuple[int, str], str] | None = None,
    formats: tuple[str, ...] | list[str] = ("diffusers", "kohya"),
    verify: bool = True,
    force: bool = False,
    prompt: str | None = None,
) -> MergeReport:
    """Write the content half of one adapter and the style half of another as one adapter, verified.

    Args:
        content: File, folder or run, or (path, strength); None leaves content to the prompt.
        style: Likewise; at least one of both.
        renames: As in `merge`; content is number 1, or style where it is alone.

    Raises:
        UsageError: Neither half, or a base that is not SDXL.
        DataError: An adapter lacks its half, or see `merge`.
    """
    named = {which: given for which, given in (("content", content), ("style", style)) if given is not None}
    if not named:
        raise UsageError("nothing to mix: name --content, --style, or both")
    if scale not in ("linear", "reference"):
        raise UsageError(f"strengths scale linear or reference, not {scale!r}")
    given = paths_and_strengths(list(named.values()))
    check_output(Path(output), [path for path, _ in given], formats)
    built = base if isinstance(base, Base) else load_base(base)
    if built.family != "sdxl":
        raise UsageError(f"B-LoRA's content and style blocks are those of SDXL; {built.source} is {built.family}")
    sources = read_sources(given, built, (), renames, force)
    weights = AdapterWeights(tokens=tokens_of(sources))
    energy = Energy()
    for which, source in zip(named, sources, strict=True):
        part = half(source, which, scale)
        weights = weights.merge(part)
        for layer in part.layers():
            energy.add(layer, source.factors(layer).measured())
    report = MergeReport("blora", str(output), described(sources))
    for adapter, which in zip(report.adapters, named, strict=True):
        adapter["half"] = which
    report.options = {"scale": scale} if scale != "linear" else {}
    return write_merged(weights, energy, report, built, formats, verify, prompt)
