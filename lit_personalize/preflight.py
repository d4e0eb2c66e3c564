"""What must hold between an objective and its data before training, so that no part of it teaches nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.token_rows import pieces_of
from lit_personalize.batch import Role
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.objectives.prior_preservation import PriorPreservation

log = logging.getLogger(__name__)


def check(objective: Denoising, data: Any, later: Iterable[int] = ()) -> None:
    """Compare an objective whose base is loaded with a data module that is set up; one without samples passes.

    Args:
        later: Roles of pictures that are still to be drawn.

    Raises:
        UsageError: A trained token that no caption names, or prior preservation without prior pictures.
    """
    samples = getattr(data, "samples", None)
    if samples is None:
        return
    refuse_missing_prior(objective, {*(sample.role for sample in samples), *later})
    captions = list(dict.fromkeys(c for s in samples if s.role == Role.INSTANCE for c in s.captions))
    tokens = [concept.token for concept in getattr(data, "concepts", ())]
    refuse_untaught_tokens(objective, captions, tokens)
    warn_of_split_tokens(objective, tokens)


def refuse_formats(adapters: Iterable[Adapter], formats: Iterable[str]) -> None:
    """Refuse to export in a format that would lose what an adapter learns.

    Raises:
        UsageError: There is one.
    """
    for adapter in adapters:
        for name in formats:
            if name in adapter.cannot_export:
                why = adapter.cannot_export[name]
                raise UsageError(f"export format {name} is not for {type(adapter).__name__}: {why}")


def refuse_missing_prior(objective: Denoising, roles: set[int]) -> None:
    """Refuse prior preservation on instances alone, which would be plain denoising under another name.

    Raises:
        UsageError: No sample has another role than instance, and the prior has a weight.
    """
    if isinstance(objective, PriorPreservation) and objective.prior_weight and roles <= {Role.INSTANCE}:
        raise UsageError(
            "PriorPreservation has no prior pictures: give data.regularization a set, for example "
            "[{generate: 200, prompt: photo of a CLASS}], or set model.init_args.prior_weight: 0 to train without one"
        )


def refuse_untaught_tokens(objective: Denoising, captions: list[str], tokens: list[str | None]) -> None:
    """Refuse a trained token that stands in no caption as the text encoder reads it.

    Args:
        captions: Of the instances.
        tokens: Of the concepts, in order.

    Raises:
        UsageError: There is one; its rows would keep their initial values.
    """
    trained = trained_tokens(objective)
    for token in trained:
        if any(is_named(objective.built, caption, token) for caption in captions):
            continue
        wrong = next((i for i, other in enumerate(tokens) if other not in trained), None)
        if wrong is None:
            fix = "write it into them (at the front, if they are long), or drop its TokenEmbedding"
        else:
            now = f"is {tokens[wrong]}" if tokens[wrong] else "is missing"
            fix = f"data.concepts[{wrong}].token {now}, set it to {token}, or drop its TokenEmbedding"
        raise UsageError(f"token {token} is trained, but no caption of a concept's pictures has it: {fix}")


def warn_of_split_tokens(objective: Denoising, tokens: list[str | None]) -> None:
    """Warn of a concept's token that is neither trained nor one word to the tokenizer."""
    tokenizer = objective.built.tokenizers[0]
    for i, token in enumerate(tokens):
        if token and token not in trained_tokens(objective):
            pieces = len(tokenizer(token, add_special_tokens=False).input_ids)
            if pieces != 1:
                log.warning(
                    "data.concepts[%d].token %s: no adapter trains it, and the base reads it as %d pieces; "
                    "add a TokenEmbedding for it, or choose a rare word that is one token, such as sks",
                    i, token, pieces,
                )  # fmt: skip


def trained_tokens(objective: Denoising) -> list[str]:
    return [adapter.token for adapter in objective.trained if isinstance(adapter, TokenEmbedding)]


def is_named(base: Base, caption: str, token: str) -> bool:
    """Whether the first text encoder sees the token in a caption, after any cut to its length."""
    number = base.tokenizers[0].convert_tokens_to_ids((pieces_of(token) or [token])[0])
    return bool((base.tokenize([caption])[0] == number).any())
