"""A new word: trained rows of the token embedding (Textual Inversion, Gal et al., 2022, arXiv 2208.01618).

The rows are a separate `[n, d]` parameter per text encoder, scattered into the lookup; the stock
embedding matrix is not touched. Initialised from the initializer word's token row only (no position
embedding).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

CLASS = "CLASS"
"""Stands for the concept's class noun where an initializer word is asked for; `fit` puts it in."""


class TokenEmbedding(Adapter):
    """One modifier token with `vectors` rows in every text encoder.

    Args:
        token: For example "<new1>"; must not be in the vocabulary.
        init: Initializer word; must be one token of every tokenizer. In a configuration, CLASS is the concept's noun.
        vectors: Rows; prompts are expanded to `<t> <t>_1 ...` as diffusers does.
    """

    def __init__(
        self,
        token: str,
        init: str,
        vectors: int = 1,
        name: str | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name or f"token:{token}", lr, weight_decay)
        if vectors < 1:
            raise UsageError(f"{token}: vectors must be at least 1, not {vectors}")
        if not token or any(c.isspace() for c in token):
            raise UsageError(f"token {token!r} must be one word without spaces, such as <new1>")
        self.token = token
        self.init = init
        self.vectors = vectors

    @property
    def tokens(self) -> list[str]:
        """Names of all rows: `<t>`, `<t>_1`, ..."""
        return [self.token, *(f"{self.token}_{i}" for i in range(1, self.vectors))]

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        pairs = zip(base.text_encoders, base.tokenizers, strict=True)
        initial = [self._initial_row(encoder, tokenizer) for encoder, tokenizer in pairs]
        for tokenizer in base.tokenizers:
            vocabulary = tokenizer.get_vocab()
            if taken := [t for t in self.tokens if t in vocabulary or f"{t.lower()}</w>" in vocabulary]:
                raise UsageError(f"token {taken[0]!r} is already in the vocabulary of {base.source}; choose another")
        base.register(self)
        for i, row in enumerate(initial):
            if base.tokenizers[i].add_tokens(self.tokens) != self.vectors:
                raise UsageError(f"the tokenizer of {base.source} did not accept {self.tokens}")
            rows = row.detach().float().expand(self.vectors, -1)
            self.add_factor(f"{_encoder(i)}:{self.token}", rows)
            self.register_buffer(f"initial_{i}", rows.clone(), persistent=False)
            base.added_rows[i].add(partial(self.rows, i))
        base.vectors_of_token[self.token] = self.vectors
        self.attached = True

    def _initial_row(self, encoder: nn.Module, tokenizer: object) -> Tensor:
        ids = tokenizer(self.init, add_special_tokens=False).input_ids  # type: ignore[operator]
        if len(ids) != 1:
            raise UsageError(f"initializer word {self.init!r} is {len(ids)} tokens; choose a word that is one token")
        return encoder.get_input_embeddings().weight[ids[0]].detach()[None]  # type: ignore[operator]

    def rows(self, encoder: int = 0) -> Tensor:
        """The rows `[vectors, d]` in use: trained ones, or the initial ones while inactive."""
        return self.factor(f"{_encoder(encoder)}:{self.token}") if self.active else getattr(self, f"initial_{encoder}")

    def layers(self) -> list[str]:
        return []

    def delta(self, layer: str) -> Tensor:
        raise KeyError(f"{self.name} changes no layer; read `rows`")

    @property
    def trains_text(self) -> bool:
        return any(p.requires_grad for p in self.factors.values())

    def export_weights(self) -> AdapterWeights:
        rows = [p.detach().float().cpu().clone() for p in self.factors.values()]
        return AdapterWeights(tokens={self.token: rows})


def _encoder(index: int) -> str:
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
