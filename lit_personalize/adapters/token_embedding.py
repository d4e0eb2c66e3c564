"""A new word: trained rows of the token embedding (Textual Inversion, Gal et al., 2022, arXiv 2208.01618).

The rows are a separate `[n, d]` parameter per text encoder, scattered into the lookup; the stock
embedding matrix is not touched. Initialised from the initializer word's token row only (no position
embedding), or at random with the spread of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lit_personalize import randomness
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.token_rows import AddedRows, pieces_of, row_names
from lit_personalize.errors import UsageError

CLASS = "CLASS"
"""Stands for the concept's class noun where an initializer word is asked for; `fit` puts it in."""
RANDOM = "RANDOM"
"""Stands for N(0, σ²) where an initializer word is asked for, σ that of the encoder's whole embedding matrix."""
Norm = Literal["free", "vocabulary", "initial", "deviation"]
DEVIATION_RATE = 0.1
"""Of diffusers' advanced scripts."""


class TokenEmbedding(Adapter):
    """One modifier token with `vectors` rows in every text encoder.

    Args:
        token: For example "<new1>"; must not be in the vocabulary. "<s0><s1>" is two rows of these names.
        init: Initializer word, or one for each row; each must be one token of every tokenizer. In a configuration,
            CLASS is the concept's noun; RANDOM draws the row from N(0, σ²), σ that of all rows of the encoder.
        vectors: Rows; prompts are expanded to `<t> <t>_1 ...` as diffusers does.
        norm: After every optimizer step, v ← v·(wanted / size)^norm_rate: "vocabulary" wants the mean norm of the
            encoder's rows, "initial" the norm that the row began with, "deviation" σ of the encoder's rows for the
            standard deviation of all rows of this token together; "free" leaves them.
        norm_rate: In (0, 1]; None is 1, and 0.1 for "deviation".
        init_weight: λ of λ·‖v - v_init‖², summed over rows and encoders and added to the loss.
        unlock_every: Begin with one row and unlock one more every so many optimizer steps. Captions hold only the
            unlocked ones.
    """

    def __init__(
        self,
        token: str,
        init: str | list[str],
        vectors: int = 1,
        norm: Norm = "free",
        norm_rate: float | None = None,
        init_weight: float = 0.0,
        unlock_every: int | None = None,
        name: str | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        span: tuple[float, float] = (0, 1),
    ):
        super().__init__(name or f"token:{token}", lr, weight_decay, span)
        if vectors < 1:
            raise UsageError(f"{token}: vectors must be at least 1, not {vectors}")
        if not token or any(c.isspace() for c in token):
            raise UsageError(f"token {token!r} must be one word without spaces, such as <new1>")
        if (pieces := len(pieces_of(token))) and vectors not in (1, pieces):
            raise UsageError(f"token {token} names {pieces} rows: leave vectors out, not {vectors}")
        self.token = token
        self.init = init
        self.vectors = pieces or vectors
        if isinstance(init, list) and len(init) != self.vectors:
            raise UsageError(f"{token}: {len(init)} initializer words for {self.vectors} vectors; give one for each")
        if norm_rate is not None and not 0 < norm_rate <= 1:
            raise UsageError(f"{token}: norm_rate must be in (0, 1], not {norm_rate}")
        if init_weight < 0:
            raise UsageError(f"{token}: init_weight must not be negative, not {init_weight}")
        if unlock_every is not None and unlock_every < 1:
            raise UsageError(f"{token}: unlock_every must be at least 1 step, not {unlock_every}")
        self.norm = norm
        self.norm_rate = norm_rate or (DEVIATION_RATE if norm == "deviation" else 1.0)
        self.init_weight = init_weight
        self.unlock_every = unlock_every
        self.unlocked = self.vectors if unlock_every is None else 1
        """Rows in use, from the first; the others keep their initial values."""
        self._added: list[tuple[AddedRows, list[int]]] = []
        self._sides: list[tuple[nn.Module, object]] = []
        """Text encoders and their tokenizers."""
        self._lent: Mapping[str, Tensor] | None = None

    @property
    def tokens(self) -> list[str]:
        """Names of all rows: `<t>`, `<t>_1`, ..., or the pieces of <s0><s1>."""
        return row_names(self.token, self.vectors)

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        pairs = zip(base.text_encoders, base.tokenizers, strict=True)
        initial = [self._initial_rows(i, *pair, seed, self.words()) for i, pair in enumerate(pairs)]
        for tokenizer in base.tokenizers:
            vocabulary = tokenizer.get_vocab()
            if taken := [t for t in self.tokens if t in vocabulary or f"{t.lower()}</w>" in vocabulary]:
                raise UsageError(f"token {taken[0]!r} is already in the vocabulary of {base.source}; choose another")
        base.register(self)
        for i, rows in enumerate(initial):
            if base.tokenizers[i].add_tokens(self.tokens) != self.vectors:
                raise UsageError(f"the tokenizer of {base.source} did not accept {self.tokens}")
            self.add_factor(f"{_encoder(i)}:{self.token}", rows)
            self.register_buffer(f"initial_{i}", rows.clone(), persistent=False)
            self.register_buffer(f"wanted_{i}", self._wanted(base.text_encoders[i], rows), persistent=False)
            base.added_rows[i].add(partial(self.rows, i))
            self._added.append((base.added_rows[i], base.tokenizers[i].convert_tokens_to_ids(self.tokens)))
            self._sides.append((base.text_encoders[i], base.tokenizers[i]))
        base.vectors_of_token[self.token] = self.vectors
        self._unlock(self.unlocked)
        self.attached = True

    def words(self, class_noun: str = CLASS) -> list[str]:
        """What every row begins at, with a noun in the place of CLASS."""
        words = [self.init] * self.vectors if isinstance(self.init, str) else self.init
        return [class_noun if word == CLASS else word for word in words]

    def _initial_rows(
        self, index: int, encoder: nn.Module, tokenizer: object, seed: int, words: Sequence[str]
    ) -> Tensor:
        """fp32 `[vectors, d]`."""
        matrix = _matrix(encoder)
        found = []
        for i, word in enumerate(words):
            if word == RANDOM:
                key = f"{_encoder(index)}:{self.token}:{i}"
                draw = randomness.normal(matrix.shape[1:], seed, "token-init", 0, [key])[0]
                found.append(draw * matrix.float().std())
                continue
            ids = tokenizer(word, add_special_tokens=False).input_ids  # type: ignore[operator]
            if len(ids) != 1:
                raise UsageError(f"initializer word {word!r} is {len(ids)} tokens; choose a word that is one token")
            found.append(matrix[ids[0]].float())
        return torch.stack(found)

    def _wanted(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        """What the size of the rows is drawn to: `[vectors, 1]`, or `[1, 1]` for all of them."""
        if self.norm == "initial":
            return rows.norm(dim=1, keepdim=True)
        if self.norm == "vocabulary":
            return _matrix(encoder).float().norm(dim=1).mean().reshape(1, 1)
        return _matrix(encoder).float().std().reshape(1, 1) if self.norm == "deviation" else torch.ones(1, 1)

    def why_not_in_a_bank(self) -> str:
        return "" if self.unlock_every is None else "it has unlock_every"

    @torch.no_grad()
    def begin(self, seed: int, class_noun: str = "") -> None:
        if CLASS in self.words() and not class_noun:
            raise UsageError(f"{self.name} has init: {CLASS}: give every adapter of the bank a class noun")
        for i, (encoder, tokenizer) in enumerate(self._sides):
            rows = self._initial_rows(i, encoder, tokenizer, seed, self.words(class_noun))
            self.factor(f"{_encoder(i)}:{self.token}").copy_(rows)
            self.get_buffer(f"initial_{i}").copy_(rows)
            self.get_buffer(f"wanted_{i}").copy_(self._wanted(encoder, rows))

    def lend(self, stacked: Mapping[str, Tensor] | None) -> None:
        self._lent = stacked

    def rows(self, encoder: int = 0) -> Tensor:
        """The rows `[vectors, d]` in use: trained ones, or the initial ones while inactive; of a bank `[G, ...]`."""
        if not self.active:
            return self._constant(f"initial_{encoder}")
        rows = self._trained(encoder)
        return rows if self.learning else rows.detach()

    def _trained(self, encoder: int) -> Tensor:
        name = f"{_encoder(encoder)}:{self.token}"
        return self.factor(name) if self._lent is None else self._lent[name]

    def _constant(self, name: str) -> Tensor:
        return self.get_buffer(name) if self._lent is None else self._lent[name]

    # ---- training ---------------------------------------------------------------------------------

    def at_step(self, step: int, steps: int) -> None:
        """Take up what holds at a step.

        Raises:
            UsageError: The span is over before every row is unlocked.
        """
        super().at_step(step, steps)
        if self.unlock_every is None:
            return
        end = min(self.span_in_steps(steps)[1], steps)
        if (needed := (self.vectors - 1) * self.unlock_every + 1) > end:
            raise UsageError(
                f"{self.name}: unlocking {self.vectors} vectors, one every {self.unlock_every} steps, takes {needed} "
                f"steps, but they train for {end}; lower unlock_every or vectors"
            )
        self._unlock(min(self.vectors, 1 + step // self.unlock_every))

    def _unlock(self, count: int) -> None:
        self.unlocked = count
        for added, ids in self._added:
            added.hide(ids, ids[count:])

    @torch.no_grad()
    def after_step(self) -> None:
        """Draw the rows to their wanted size, and locked rows back to where they were: weight decay moved them."""
        for i in range(len(self._sides)):
            rows = self._trained(i)
            rows[..., self.unlocked :, :] = self._constant(f"initial_{i}")[..., self.unlocked :, :]
            if self.norm != "free":
                moving = rows[..., : self.unlocked, :]
                if self.norm == "deviation":
                    size = moving.flatten(-2).std(dim=-1)[..., None, None]
                else:
                    size = moving.norm(dim=-1, keepdim=True)
                wanted = self._constant(f"wanted_{i}")[..., : self.unlocked, :]
                moving.mul_((wanted / size.clamp(min=torch.finfo(size.dtype).tiny)) ** self.norm_rate)

    def penalty(self) -> Tensor | None:
        """λ·‖v - v_init‖², or None where λ is 0 or the rows rest; of a bank one for each adapter, `[G]`."""
        if not (self.init_weight and self.learning):
            return None
        pairs = [(self._trained(i), self._constant(f"initial_{i}")) for i in range(len(self._sides))]
        moved = [(rows - initial).square().sum(dim=(-2, -1)) for rows, initial in pairs]
        return self.init_weight * torch.stack(moved).sum(dim=0)

    # ---- the protocol -----------------------------------------------------------------------------

    @property
    def corrects(self) -> bool:
        """Where rows are drawn to a size, or are locked at first."""
        return self.norm != "free" or self.unlock_every is not None

    def place(self) -> dict[str, nn.Parameter]:
        """Nothing moves: the rows are small."""
        return {}

    def layers(self) -> list[str]:
        return []

    def delta(self, layer: str) -> Tensor:
        raise KeyError(f"{self.name} changes no layer; read `rows`")

    @property
    def trains_text(self) -> bool:
        return self.learning and any(p.requires_grad for p in self.factors.values())

    def export_weights(self) -> AdapterWeights:
        rows = [p.detach().float().cpu().clone() for p in self.factors.values()]
        return AdapterWeights(tokens={self.token: rows})


def _encoder(index: int) -> str:
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


def _matrix(encoder: nn.Module) -> Tensor:
    return encoder.get_input_embeddings().weight.detach()  # type: ignore[no-any-return,operator]
